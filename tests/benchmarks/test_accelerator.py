"""The accelerator's parts: a frame that goes on where it stopped, and all of them in miniature."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))  # its scripts import each other by name

from accelerator_parts import frame, launches  # noqa: E402
from accelerator_parts.frame import Case, Clock, OutOfTime, Part, Setting  # noqa: E402


def setting(folder, clock=None, **changes) -> Setting:
    values = {
        "dry": True, "folder": folder, "clock": clock or Clock(1000.0), "images": None,
        "weights": None, "num_rounds": 3, "rate": 0.01, "seed": 0,
    }  # fmt: skip
    return Setting(**(values | changes))


def counting(calls: list[str], stop: bool = False, fail: bool = False) -> Part:
    """Three cases that note their calls; the second one stops or fails at first."""

    def case(name: str) -> Case:
        def run(done, note):
            calls.append(name)
            note({"so_far": 1})
            if name == "b" and stop:
                raise OutOfTime("enough")
            if name == "b" and fail:
                raise ValueError("bad")
            return {"seen": sorted(done)}

        return Case(run)

    ratio = lambda figures: 2.0 if "c" in figures else None
    return Part("toy", lambda _: {name: case(name) for name in "abc"}, ratio, "a toy")


def test_a_part_goes_on_where_its_clock_stopped_it(tmp_path):
    calls: list[str] = []
    line = frame.run_part(counting(calls, stop=True), setting(tmp_path), "1")
    assert calls == ["a", "b"]
    assert not line["complete"]
    assert line["left"] == ["b", "c"]
    assert line["ratio"] is None
    assert line["figures"]["b"] == {"so_far": 1}
    line = frame.run_part(counting(calls), setting(tmp_path), "2")
    assert calls == ["a", "b", "b", "c"]
    assert line["complete"]
    assert line["ratio"] == 2.0
    assert line["figures"]["c"] == {"seen": ["a", "b"]}
    assert json.loads((tmp_path / "toy.json").read_text())["cases"]["b"]["commits"] == ["1", "2"]


def test_a_case_that_fails_leaves_the_others_and_is_tried_again(tmp_path):
    calls: list[str] = []
    line = frame.run_part(counting(calls, fail=True), setting(tmp_path), "1")
    assert calls == ["a", "b", "c"]
    assert line["failed"] == {"b": "ValueError: bad"}
    assert line["left"] == ["b"]
    assert frame.run_part(counting(calls), setting(tmp_path), "1")["complete"]
    assert calls[3:] == ["b"]


def test_no_case_starts_without_its_time(tmp_path):
    calls: list[str] = []
    line = frame.run_part(counting(calls), setting(tmp_path, Clock(0.0)), "1")
    assert calls == []
    assert line["left"] == ["a", "b", "c"]


def test_figures_of_two_cards_do_not_mix(tmp_path):
    frame.run_part(counting([]), setting(tmp_path), "1")
    text = (tmp_path / "toy.json").read_text()
    (tmp_path / "toy.json").write_text(text.replace(frame.card(), "another card"))
    with pytest.raises(ValueError, match=r"was measured on .*another card.* give another folder"):
        frame.run_part(counting([]), setting(tmp_path), "1")


def test_kernels_of_inner_loops_count_as_often_as_they_turn():
    """Of a body with one loop over layers: every layer more adds as many as the one before."""

    def decode(layers: int):
        kernels = jnp.ones((layers, 8, 8))

        def run(x):
            turn = lambda x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0]
            return lax.while_loop(lambda x: x.sum() < 1e9, turn, x)

        return jax.jit(run).lower(jnp.ones((8, 8))).compile().as_text()

    few, some, many = (launches.launched(decode(layers)) for layers in (8, 16, 32))
    assert some - few >= 8
    assert many - some == 2 * (some - few)


def test_kernels_of_a_text_are_those_of_the_unknown_loop():
    text = """HloModule m

%body (p: (f32[8])) -> (f32[8]) {
  %p = (f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=0
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%inside
  %w = (s32[], f32[8]{0}) while(%t), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %r = (f32[8]{0}) tuple(%f)
}

%b (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8]{0} custom-call(%q), custom_call_target="__cublas$gemm"
  %h = f32[8]{0} copy(%g)
  ROOT %s = (s32[], f32[8]{0}) tuple(%g, %h)
}

%cond (p: (f32[8])) -> pred[] {
  ROOT %k = pred[] fusion(%p), kind=kLoop, calls=%inside2
}

ENTRY %main (a: f32[8]) -> (f32[8]) {
  %a = f32[8]{0} parameter(0)
  %other = f32[8]{0} copy(%a)
  ROOT %loop = (f32[8]{0}) while(%a), condition=%cond, body=%body
}
"""  # noqa: E501
    assert launches.kernels(text) == {"fusion": 2, "custom-call": 5, "copy": 5}


class Turns(Clock):
    """A clock that lets a case ask so many times."""

    def __init__(self, turns: int):
        super().__init__(1000.0)
        self.turns = turns

    def check(self, seconds: float) -> None:
        self.turns -= 1
        if self.turns < 0:
            raise OutOfTime("the test says so")


@pytest.mark.slow
def test_a_contest_that_stops_ends_as_one_that_does_not(tmp_path, monkeypatch):
    from accelerator_parts import contest, paper

    monkeypatch.setattr(paper, "ALGORITHMS", ("fed_avg", "scaffold"))
    notes: list[dict] = []

    def play(folder, clock):
        run = paper.cases(setting(folder, clock))["rounds"].run
        return run({"width": {"chosen": 1}}, notes.append)

    (tmp_path / "whole").mkdir()
    whole = play(tmp_path / "whole", Clock(1000.0))
    with pytest.raises(OutOfTime):
        play(tmp_path / "parts", Turns(3))
    assert {name: part["rounds"] for name, part in notes[-1].items()} == {
        "fed_avg": 2, "scaffold": 1,
    }  # fmt: skip
    parts = play(tmp_path / "parts", Clock(1000.0))
    for name in whole:
        assert parts[name]["rounds"] == whole[name]["rounds"] == 3
        for column in contest.COLUMNS:
            assert parts[name].get(column) == whole[name].get(column)


@pytest.mark.slow
def test_a_network_whose_training_stops_ends_as_one_that_is_trained_at_once(tmp_path):
    from accelerator_parts import shrinking

    class Stops(Clock):
        def left(self) -> float:
            return -1.0

    own = setting(tmp_path)
    bench = shrinking.make_bench(own)
    kept = tuple(np.ones(group.size, bool) for group in bench.net.groups)
    tuner = shrinking.Tuner(bench, kept, 0)
    whole = shrinking.tune("whole", tuner, own, lambda figures: None)
    with pytest.raises(OutOfTime):
        shrinking.tune("parts", tuner, own._replace(clock=Stops(0.0)), lambda figures: None)
    parts = shrinking.tune("parts", tuner, own, lambda figures: None)
    assert parts["epochs"] == whole["epochs"] == 2
    assert parts["finetuned"] == whole["finetuned"]


@pytest.mark.slow
def test_the_dry_run_does_every_part_and_is_done_once(tmp_path):
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "accelerator.py"), "--dry_run",
               f"--folder={tmp_path}", "--minutes=30"]  # fmt: skip
    first, again = (
        subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(2)
    )
    for ran in (first, again):
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    lines, repeated = (
        [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
        for ran in (first, again)
    )
    assert [line["name"].split("_")[1] for line in lines] == [f"part{i}" for i in range(7)]
    for line, other in zip(lines, repeated, strict=True):
        assert line["complete"], line
        assert not line["failed"]
        assert line["dry_run"]
        assert other["figures"] == line["figures"]
        assert other["seconds"] < 5
    stored = (tmp_path / "lines.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in stored] == lines + repeated
