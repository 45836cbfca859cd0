"""The simulator agrees with the closed forms, and threads by the clock with the simulator."""

import time

import numpy as np
import pytest

from jaxfm.launch import simulate as script
from jaxfm.parallel.pipe.speed import (
    Pipe,
    best_length,
    choose,
    continuous_rate,
    linear_cost,
    plain_rate,
    speculative_rate,
)
from jaxfm.parallel.simulation import sleeping_cluster
from jaxfm.parallel.simulation.heads import Head, RoundHead
from jaxfm.parallel.simulation.simulator import best_speculative, draw_ranks, simulate

TOKENS = 500


def share(ranks, width=1):
    return float(np.mean(np.array(ranks) < width))


@pytest.mark.parametrize("right", [0.1, 0.66, 0.9])
@pytest.mark.parametrize("draft_s", [0.5, 1.5])
def test_a_chain_is_as_fast_as_the_closed_form(right, draft_s):
    pipe, ranks = Pipe(8, 1.0, draft_s, 0.05), draw_ranks(TOKENS, [right], seed=1)
    played = simulate(Head(ranks), pipe)
    assert len(played.times) == TOKENS and (np.diff(played.times) >= 0).all()
    assert played.rate == pytest.approx(continuous_rate(pipe, share(ranks)), rel=0.03)
    # Nothing is drafted for the last token.
    assert played.accepted == sum(rank == 0 for rank in ranks[:-1])
    assert 0 <= played.wasted <= played.busy <= 8 * played.times[-1]


def test_plain_and_rounds_are_as_fast_as_their_closed_forms():
    pipe, ranks = Pipe(6, 1.0, 0.4, 0.1, linear_cost(0.2)), draw_ranks(2000, [0.7], seed=2)
    assert simulate(Head(ranks[:50], width=0), pipe).rate == pytest.approx(plain_rate(pipe))
    for length in (0, 3, 6):
        played = simulate(RoundHead(ranks, length), pipe)
        assert played.rate == pytest.approx(speculative_rate(pipe, share(ranks), length), rel=0.03)
    # Found by trying, and by the formula.
    assert abs(best_speculative(ranks, pipe)[0] - best_length(pipe, share(ranks))) <= 1


def test_a_tree_uses_later_candidates_and_costs_its_width():
    ranks = draw_ranks(TOKENS, [0.6, 0.75, 0.85], seed=3)
    pipe = Pipe(8, 1.0, 0.9, 0.05)
    tree = simulate(Head(ranks, width=3), pipe)
    assert tree.accepted > simulate(Head(ranks), pipe).accepted
    assert tree.rate == pytest.approx(continuous_rate(pipe, share(ranks, 3), width=3), rel=0.03)
    dear = pipe._replace(cost=linear_cost(1.0))
    assert simulate(Head(ranks, width=3), dear).rate < simulate(Head(ranks), dear).rate


def test_restraints_and_bad_luck_never_help():
    pipe, ranks = Pipe(6, 1.0, 1.0, 0.05), draw_ranks(TOKENS, [0.7], seed=4)
    free = simulate(Head(ranks), pipe).rate
    for head, more in (
        (Head(ranks, window=3), {}),
        (Head(ranks, duplicates=True), {}),
        (Head(ranks), {"factors": [1, 1, 2, 1, 1, 1]}),
    ):
        assert simulate(head, pipe, **more).rate <= free * 1.0001
    first, second = (simulate(Head(ranks), pipe, jitter=0.3, seed=s).rate for s in (0, 0))
    assert first == second != free


def test_settings_are_chosen_by_what_they_are_worth():
    fast = Pipe(8, 1.0, 0.5, 0.05)
    best = choose(fast, [0.6, 0.8, 0.88])
    assert best.width == 3 and best.rate == continuous_rate(fast, 0.88, width=3)
    dear = fast._replace(cost=linear_cost(1.0))
    assert choose(dear, [0.6, 0.62, 0.63]).width == 1
    # A draft as slow as the whole trip is worth nothing, and neither is one that is never right.
    assert choose(fast._replace(draft_s=9.0), [0.6]).width == 0
    assert choose(fast, [0.0]).width == 0
    with pytest.raises(ValueError, match=r"1\.5"):
        choose(fast, [1.5])


def test_threads_by_the_clock_do_what_was_simulated():
    pipe, ranks = Pipe(4, 0.01, 0.005, 0.001), draw_ranks(40, [0.7], seed=5)
    for make in (lambda: Head(ranks), lambda: Head(ranks, width=0), lambda: RoundHead(ranks, 3)):
        played, expected = sleeping_cluster.run_cluster(make(), pipe), simulate(make(), pipe)
        assert played.accepted == expected.accepted and len(played.times) == 40
        assert played.times[-1] >= expected.times[-1] * 0.99  # no node is faster than told


def test_a_node_that_dies_ends_the_cluster_at_once():
    def work(stage, run):
        if stage == 2:
            raise OSError("no power")

    start = time.monotonic()
    with pytest.raises(sleeping_cluster.NodeFailure, match=r"stage 2 stopped.*no power"):
        sleeping_cluster.run_cluster(Head([0] * 50), Pipe(4, 0.005, 0.005), work=work)
    assert time.monotonic() - start < 10
    with pytest.raises(sleeping_cluster.NodeFailure, match="0 tokens"):
        sleeping_cluster.run_cluster(Head([0] * 50), Pipe(4, 10.0, 10.0), timeout_s=0.5)


def test_the_script_writes_its_report(tmp_path, capsys):
    path = tmp_path / "report.html"
    config = script.SimulateConfig(
        stages=3, right=(0.6, 0.8), width=2, tokens=60, report=str(path), slow=(1.0, 1.5, 1.0)
    )
    script.main(config)
    assert "continuous, tree of 2" in capsys.readouterr().out
    assert "<svg" in path.read_text()
    for wrong, message in (
        ({"right": (0.9, 0.5)}, "rising"),
        ({"width": 2}, "has 1 probabilities only"),
        ({"slow": (1.0,)}, "each of 8 stages"),
        ({"link_s": -1.0}, "link_s=-1.0: give a time"),
    ):
        with pytest.raises(ValueError, match=message):
            script.SimulateConfig(**wrong)
