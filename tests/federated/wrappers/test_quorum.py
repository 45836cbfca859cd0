"""A round counts where enough clients have reported, and else leaves the server as it was."""

import chex
import jax
import numpy as np
import pytest
from laws import advance, assert_same, federation, make, population, run, start

from jaxfm.federated import client_costs, compile_rounds
from jaxfm.federated.wrappers.quorum import with_quorum

FOUR = with_quorum(make("fed_avg"), 4)


def test_a_round_counts_with_enough_reports_and_else_changes_nothing():
    many, few = (population("fed_avg", federation((6, 1, 4, n, 0, 0))) for n in (3, 0))
    engine = compile_rounds(FOUR, many, cohort_size=6)
    state, info = advance(engine, many, 1)
    assert_same(state, run("fed_avg", many)[0])
    assert info.server["quorum"].tolist() == [1.0]
    state, info = advance(engine, few, 1)
    chex.assert_trees_all_equal(state.server.variables, start())
    assert info.server["quorum"].tolist() == [0.0] and info.counted.sum() == 3
    assert client_costs(FOUR, many, start()) == client_costs(make("fed_avg"), many, start())


def test_failed_updates_do_not_count_where_uploads_are_combined_side_by_side():
    data, base = federation(), make("fed_avg")
    x = data.examples["x"].copy()
    x[data.rows_of(1)] = np.nan
    add = lambda server, received, counted: jax.tree.map(lambda x: x.sum(0), received)
    algorithm = base._replace(buckets=(base.buckets[0]._replace(combine=add),))
    people = population("fed_avg", data._replace(examples=data.examples | {"x": x}))
    engine = compile_rounds(with_quorum(algorithm, 5), people, cohort_size=6)
    state, info = advance(engine, people, 1)
    assert info.server["quorum"].tolist() == [1.0] and info.non_finite.sum() == 1
    assert_same(state, run("fed_avg", people)[0])
    four = population("fed_avg", people.federation._replace(count=np.array([0, 1, 4, 3, 5, 2])))
    state, info = advance(engine, four, 1)
    assert info.server["quorum"].tolist() == [0.0] and info.counted.sum() == 4
    chex.assert_trees_all_equal(state.server.variables, start())


def test_no_report_is_no_quorum():
    with pytest.raises(ValueError, match="quorum=0: a round needs at least 1 report"):
        with_quorum(make("fed_avg"), 0)
