"""Laws of configs: flags, text and JSON say the same, and a wrong name never passes silently."""

import dataclasses
import errno
import json
import math
import subprocess
import sys
from typing import Literal

import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st

from jaxfm import config as config_lib
from jaxfm import errors
from jaxfm.config import check, from_dict, option, override, to_dict


@dataclasses.dataclass(frozen=True)
class Model:
    """The network."""

    width: int = option(64, "model width")
    rates: tuple[float, ...] = option((1.0, 0.5), "tiers")
    window: tuple[int, int] | None = option(None, "first and last layer")

    def __post_init__(self):
        check(self)


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    name: str = option("demo", "run name")
    rounds: int = option(10, "rounds of training")
    clip: float | None = option(None, "gradient clipping by global norm")
    resume: bool = option(True, "go on where the folder ends")
    sampler: Literal["uniform", "weighted"] = option("uniform", "how a cohort is drawn")
    bits: Literal[8, 16] = option(16, "bits a number")
    stop: tuple[str, ...] = option((), "a string that ends a text", repeat=True)
    model: Model = Model()
    draft: Model = Model(width=16)

    def __post_init__(self):
        check(self)
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: give at least 1.")


def parse(*arguments: str) -> Config:
    values = flags.FlagValues()
    config_lib.define_flags(Config, values)
    values(["script", *arguments])
    return config_lib.from_flags(Config, values)


configs = st.builds(
    Config,
    name=st.text("ab c", max_size=4),
    rounds=st.integers(1, 10**9),
    clip=st.none() | st.floats(allow_nan=False),
    resume=st.booleans(),
    sampler=st.sampled_from(["uniform", "weighted"]),
    bits=st.sampled_from([8, 16]),
    model=st.builds(
        Model,
        rates=st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
        window=st.none() | st.tuples(st.integers(), st.integers()),
    ),
)


@given(configs)
def test_json_round_trip(config):
    text = json.dumps(to_dict(config), allow_nan=False)
    assert from_dict(Config, json.loads(text)) == config


@given(configs)
def test_flags_and_override_say_what_json_says(config):
    def assignments(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict):
                yield from assignments(value, f"{prefix}{name}.")
            elif name != "stop":  # repeated; below
                text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                yield f"{prefix}{name}={text}"

    texts = list(assignments(to_dict(config)))
    assert override(Config(), *texts) == config
    assert parse(*(f"--{text}" for text in texts)) == config


@given(st.lists(st.text(), min_size=1, max_size=3))
def test_repeated_flags_are_strings_as_they_were_written(strings):
    assert parse(*(f"--stop={string}" for string in strings)).stop == tuple(strings)
    assert override(Config(), f"stop={strings[0]}").stop == (strings[0],)


def test_flags_left_out_keep_defaults_and_a_parents_defaults():
    assert parse() == Config()
    assert parse("--noresume", "--draft.window=1,2") == Config(
        resume=False, draft=Model(width=16, window=(1, 2))
    )
    assert override(Config(), "rounds=1e3", "clip=none").rounds == 1000
    assert from_dict(Config, {"draft": {"rates": [0.25]}}).draft == Model(width=16, rates=(0.25,))


def test_the_name_of_a_nested_config_stands_for_its_first_field():
    assert parse("--model=8", "--draft=9") == Config(model=Model(width=8), draft=Model(width=9))
    assert override(Config(), "model=8") == Config(model=Model(width=8))
    assert parse("--model.width=9", "--model=8").model.width == 9  # the full name wins
    assert "--draft=X is --draft.width=X." in config_lib.describe(Config)
    with pytest.raises(ValueError, match=r"model\.width='wide': write a value of type int"):
        override(Config(), "model=wide")


def test_a_saved_config_is_where_flags_start(tmp_path):
    saved = Config(rounds=3, clip=math.inf, model=Model(width=8))
    path = tmp_path / "config.json"
    config_lib.save(saved, path)
    assert config_lib.load(Config, path) == saved
    changed = parse(f"--config={path}", "--model.width=9")
    assert changed == dataclasses.replace(saved, model=Model(width=9))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        config_lib.load(Config, path)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("ronds=3", "Config has no 'ronds'. Did you mean rounds?"),
        ("model.widht=3", "Config has no 'model.widht'. Did you mean model.width?"),
        ("rates=1", "Did you mean model.rates or draft.rates?"),
        ("norm=1", "Config has no 'norm'. Did you mean clip?"),  # its help speaks of it
        ("zzz=1", "Config has no 'zzz'. Known: name, rounds, clip, "),
        ("rounds=3.5", "rounds='3.5': write a value of type int."),
        ("rounds=inf", "rounds='inf': write a value of type int."),
        ("clip=tight", "clip='tight': write a value of type float or none."),
        ("resume=maybe", "resume='maybe': write a value of type bool."),
        ("sampler=unifrm", "sampler='unifrm' is not a choice. Did you mean uniform?"),
        ("bits=4", "bits='4' is not a choice. Known: 8, 16."),
        ("model.window=1,2,3", "model.window: 3 values given, 2 wanted."),
        ("rounds", "'rounds': write name=value."),
        ("rounds=0", "rounds=0: give at least 1."),
    ],
)
def test_a_wrong_assignment_says_what_is_right(assignment, message):
    with pytest.raises(ValueError) as error:
        override(Config(), assignment)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ronds": 3}, "Config has no 'ronds'. Did you mean rounds?"),
        ({"model": {"wdth": 3}}, "Model has no 'model.wdth'. Did you mean model.width?"),
        ({"rounds": "3"}, "rounds='3' is of type str; wanted: int."),
        ({"rounds": True}, "rounds=True is of type bool; wanted: int."),
        ({"model": 3}, "model=3: wanted: an object."),
        ({"bits": 8.0}, "bits=8.0 is not a choice."),
        ({"model": {"rates": 1.0}}, "model.rates=1.0 is of type float; wanted: float,..."),
    ],
)
def test_wrong_json_says_what_is_right(values, message):
    with pytest.raises((TypeError, ValueError)) as error:
        from_dict(Config, values)
    assert message in str(error.value)


def test_values_given_in_code_are_checked_and_made_equal():
    assert Config(clip=1) == Config(clip=1.0) and isinstance(Config(clip=1).clip, float)
    assert Model(rates=[1, 2]) == Model(rates=(1.0, 2.0))
    with pytest.raises(TypeError, match="model=None is of type NoneType; wanted: Model"):
        Config(model=None)


def test_fields_without_a_textual_form_and_required_ones():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        table: dict

    with pytest.raises(TypeError, match="cannot be of type <class 'dict'>: use int"):
        config_lib.define_flags(Odd, flags.FlagValues())

    @dataclasses.dataclass(frozen=True)
    class Required:
        model: str = dataclasses.field(metadata={"help": "folder of a model"})

    with pytest.raises(TypeError, match="model must be given: folder of a model"):
        from_dict(Required, {})
    assert "--model=required  (str)" in config_lib.describe(Required)


def explained(act):
    with pytest.raises(Exception) as caught:
        act()
    return config_lib.explain(caught.value)


def test_an_error_is_told_in_one_sentence(tmp_path):
    """The library's own words stand as they are, those of others with their type."""
    text, status = explained(lambda: from_dict(Config, {"bits": 7}))
    assert text.startswith("bits=7 is not a choice.") and "traceback" not in text and status == 2
    missing = tmp_path / "none"
    assert explained(missing.read_text) == (f"No such file or directory: {missing}.", 2)
    text, status = explained(lambda: json.loads("{"))
    assert text.startswith("JSONDecodeError: Expecting") and status == 2
    assert text.endswith("\n--traceback shows where.")
    assert explained(lambda: {}["loss"]) == ("KeyError: 'loss'\n--traceback shows where.", 1)
    assert explained(lambda: [][0].x)[1] == 1


def sentence(text):
    raise RuntimeError(text)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "act, said, status",
    [
        (lambda: sentence("Nothing was learned."), "RuntimeError: Nothing", 1),
        (lambda: from_dict(Config, {"bits": 7}), "error: bits=7 is not a choice.", 2),
        (lambda: int("x"), "error: ValueError: invalid literal", 2),
        (interrupt, "Interrupted.", 130),
    ],
)
def test_an_error_ends_the_program_with_its_status(act, said, status, capsys):
    with pytest.raises(SystemExit) as ended, errors.reported():
        act()
    assert ended.value.code == status
    assert said in capsys.readouterr().err


def test_a_reader_that_has_read_enough_is_no_error():
    """As of `| head`."""
    code = "from jaxfm.errors import reported\nwith reported():\n while True: print('x' * 4096)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""


def test_errors_are_let_through_where_their_traceback_is_wanted():
    with pytest.raises(RuntimeError, match="as it is"), errors.reported(traceback=True):
        sentence("as it is")


def test_a_write_and_a_reading_name_the_file():
    with pytest.raises(OSError) as caught, errors.writing("a/b.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert errors.explain(caught.value) == ("No space left on device: a/b.json.", 2)
    with pytest.raises(ValueError, match=r"^a\.csv: It is bad\.$"), errors.naming("a.csv"):
        raise ValueError("It is bad.")
    with pytest.raises(ValueError, match=r"^a\.csv is bad\.$"), errors.naming("a.csv"):
        raise ValueError("a.csv is bad.")


SCRIPT = '''
"""Trains a model.

Ends near 3.0 bits per byte."""
from test_config import Config
from jaxfm.config import run
def main(config):
    if config.rounds == 404:
        open("none.txt")
    print(config.rounds, config.model.width)
run(main, Config)
'''


MISTAKES = {
    "--ronds=3": "Unknown flag --ronds. Did you mean --rounds?",
    "--rounds=0": "rounds=0: give at least 1.",
    "3": "'3' is not a flag: write --name=value.",
    "--config=none.json": "none.json",
    "--rounds=404": "error: No such file or directory: none.txt.",
}


def test_a_script_runs_helps_and_refuses(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    start = lambda *arguments: subprocess.Popen(
        [sys.executable, str(path), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={"PYTHONPATH": __file__.rpartition("/")[0]},
    )  # fmt: skip
    # All at once: most of their time goes to imports.
    running, helping = start("--rounds=3", "--model.width", "5"), start("--help")
    refusing = {argument: start(argument) for argument in MISTAKES}

    printed, _ = running.communicate()
    assert (running.returncode, printed) == (0, "3 5\n")
    printed, _ = helping.communicate()
    assert helping.returncode == 0
    for part in ("Ends near 3.0", "--rounds=10  (int)\n      rounds of training", "--config"):
        assert part in printed
    for section in ("model: The network.", "draft: The network.", "--draft.width=16"):
        assert section in printed
    for argument, process in refusing.items():
        printed, error = process.communicate()
        assert (process.returncode, printed) == (2, "")
        assert MISTAKES[argument] in error and "Traceback" not in error
