"""Laws of federations and partitions."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfm.data.federation import (
    Federation,
    all_rows,
    federate,
    merge,
    of_one_shape,
    select_clients,
    summary,
)
from jaxfm.data.partition import (
    dirichlet,
    holdout,
    iid,
    match_labels,
    natural,
    quantity,
    shards,
)

PARTITIONERS = {
    "dirichlet": lambda labels, clients, seed: dirichlet(labels, clients, beta=0.5, seed=seed),
    "dirichlet_extreme": lambda labels, clients, seed: dirichlet(
        labels, clients, beta=0.001, seed=seed, num_draws=3
    ),
    "dirichlet_unbalanced": lambda labels, clients, seed: dirichlet(
        labels, clients, beta=0.1, seed=seed, balanced=False, num_draws=3
    ),
    "shards": lambda labels, clients, seed: shards(labels, clients, shards_per_client=1, seed=seed),
    "quantity": lambda labels, clients, seed: quantity(len(labels), clients, beta=0.3, seed=seed),
    "iid": lambda labels, clients, seed: iid(len(labels), clients, seed=seed),
}


@st.composite
def labelled_clients(draw):
    num_clients = draw(st.integers(1, 12))
    num_examples = draw(st.integers(num_clients, 150))
    num_classes = draw(st.integers(1, 7))
    seed = draw(st.integers(0, 2**32 - 1))
    labels = np.random.default_rng(seed).integers(0, num_classes, num_examples)
    return labels, num_clients, seed


@pytest.mark.parametrize("name", PARTITIONERS)
@given(labelled_clients())
def test_every_row_has_one_owner_and_every_client_a_row(name, case):
    labels, num_clients, seed = case
    clients = PARTITIONERS[name](labels, num_clients, seed)
    assert len(clients) == num_clients
    assert min(map(len, clients)) >= 1
    np.testing.assert_array_equal(np.sort(np.concatenate(clients)), np.arange(len(labels)))


@pytest.mark.parametrize("name", PARTITIONERS)
def test_the_seed_decides(name):
    labels = np.arange(200) % 5
    first, again, other = (PARTITIONERS[name](labels, 10, seed) for seed in (1, 1, 2))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


@given(st.lists(st.integers(-2, 5), min_size=1, max_size=40))
def test_natural_groups_equal_keys(keys):
    clients = natural(np.array(keys), num_clients=7)
    assert [sorted(rows) for rows in clients] == [
        [row for row, key in enumerate(keys) if key == number] for number in range(7)
    ]


def test_natural_takes_names():
    assert [list(rows) for rows in natural(["b", "a", "b"])] == [[1], [0, 2]]


@given(st.integers(2, 8), st.integers(0, 1000))
def test_min_examples_holds_where_redrawing_never_would(num_clients, seed):
    labels = np.arange(num_clients * 10) % 3
    clients = dirichlet(
        labels, num_clients, beta=0.01, seed=seed, min_examples=10, balanced=False, num_draws=2
    )
    # Exactly as many as needed, so everybody must end with exactly ten.
    assert [len(rows) for rows in clients] == [10] * num_clients


def test_smaller_beta_is_more_skewed():
    labels = np.arange(5000) % 10

    def mean_classes(beta):
        return np.mean([len(set(labels[r])) for r in dirichlet(labels, 20, beta=beta, seed=0)])

    assert mean_classes(0.05) < mean_classes(0.5) < mean_classes(100)


def test_balancing_bounds_a_client_by_the_mean_and_one_class():
    labels = np.arange(1000) % 10

    def largest(seed, balanced):
        clients = dirichlet(labels, 10, beta=0.05, seed=seed, balanced=balanced)
        return max(map(len, clients))

    # A client just below the mean of 100 may still get a whole class of 100.
    assert max(largest(seed, True) for seed in range(10)) < 200
    assert max(largest(seed, False) for seed in range(10)) > 200


def test_shards_bound_the_classes_of_a_client():
    labels = np.repeat(np.arange(10), 60)
    clients = shards(labels, 30, shards_per_client=2, seed=0)
    assert {len(rows) for rows in clients} == {20}
    assert max(len(set(labels[rows])) for rows in clients) <= 2


def test_quantity_skews_sizes_and_nothing_else():
    sizes = [len(rows) for rows in quantity(10_000, 20, beta=0.3, seed=0, min_examples=5)]
    assert min(sizes) >= 5
    assert max(sizes) > 4 * np.median(sizes)


@given(labelled_clients(), st.floats(0.05, 0.95))
def test_holdout_divides_each_client(case, fraction):
    labels, num_clients, seed = case
    clients = iid(len(labels), num_clients, seed=seed)
    for rows, rest, held in zip(clients, *holdout(clients, fraction, seed=seed), strict=True):
        assert sorted(rows) == sorted([*rest, *held])
        assert len(rows) < 2 or (len(rest) and len(held))


def test_match_labels_follows_each_clients_mix():
    labels, test_labels = np.repeat([0, 1], 50), np.repeat([0, 1, 2], 20)
    owners = [np.arange(50), np.arange(50, 75), np.arange(75, 100)]
    matched = match_labels(owners, labels, test_labels, seed=0)
    counts = [np.bincount(test_labels[rows], minlength=3)[:2].tolist() for rows in matched]
    assert counts == [[20, 0], [0, 10], [0, 10]]
    np.testing.assert_array_equal(np.sort(np.concatenate(matched)), np.arange(60))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iid(3, 4, seed=0), "3 examples cannot give each of 4 clients 1; use at most 3"),
        (lambda: iid(3, 0, seed=0), "num_clients must be at least 1; got 0"),
        (lambda: shards(np.zeros(9), 5, seed=0), "9 examples cannot give each of 5 clients 2"),
        (
            lambda: dirichlet(np.zeros(30), 4, beta=1, seed=0, min_examples=10),
            "use at most 3 clients",
        ),
        (lambda: dirichlet(np.zeros(30), 4, beta=0, seed=0), "beta must be above 0; got 0"),
        (lambda: dirichlet(np.zeros((3, 2)), 2, beta=1, seed=0), r"labels must be \[N\]"),
        (lambda: natural(np.array([0, 5]), 5), "keys must be below num_clients=5; got 5"),
        (lambda: holdout([], 1.0, seed=0), "fraction must be between 0 and 1; got 1.0"),
        (lambda: federate({}, []), "no leaf among the examples"),
        (lambda: federate({"a": np.zeros(2)}, []), "The partition has no client"),
        (
            lambda: federate({"a": np.zeros(2), "b": np.zeros((3, 1))}, [np.array([0])]),
            r"same leading size; got shapes \{'a': \(2,\), 'b': \(3, 1\)\}",
        ),
        (
            lambda: federate({"a": np.zeros(2)}, [np.array([0]), np.array([1, 2])]),
            r"Client 1: rows must be in 0\.\.1; got 1\.\.2",
        ),
    ],
)
def test_impossible_requests_say_what_is_possible(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rows_must_be_integers():
    with pytest.raises(TypeError, match="Client 0: rows must be integers; got dtype float64"):
        federate({"a": np.zeros(2)}, [np.array([0.0])])


def small_federation() -> Federation:
    examples = {"label": np.array([3, 1, 2, 9]), "image": np.arange(8.0).reshape(4, 2)}
    return federate(examples, [np.array([2, 0]), np.array([], np.int64), np.array([3, 1, 0])])


@pytest.mark.smoke
def test_a_federation_keeps_each_clients_rows_in_order():
    federation = small_federation()
    assert federation.index.values.dtype == federation.count.dtype == np.int32
    assert federation.count.tolist() == [2, 0, 3]
    padded = [federation.index.padded(client).tolist() for client in range(3)]
    assert padded == [[2, 0, 0], [0, 0, 0], [3, 1, 0]]
    assert [rows.tolist() for rows in all_rows(federation)] == [[2, 0], [], [3, 1, 0]]
    assert merge(federation)["label"].tolist() == [2, 3, 9, 1, 3]
    assert len(jax.tree.leaves(federation)) == 6


def test_an_index_costs_what_the_examples_cost_and_not_the_largest_client():
    size = np.ones(5000, np.int64)
    size[7] = 3000
    parts = np.split(np.random.default_rng(0).permutation(size.sum()), np.cumsum(size)[:-1])
    federation = federate({"label": np.arange(size.sum())}, parts)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(federation.index))
    assert numbers == size.sum() + size.max() + 2 * len(size)  # 72 kB, not 60 MB
    padded = jax.jit(lambda index, client: index.padded(client))
    for client in (0, 7, 4999):
        expected = np.pad(parts[client], (0, 3000 - len(parts[client])))
        np.testing.assert_array_equal(padded(federation.index, client), expected)


def test_federations_of_one_shape_keep_their_rows():
    other = federate(small_federation().examples, [np.array([1])] * 3)
    alike = of_one_shape([small_federation(), other])
    shapes = [[np.shape(leaf) for leaf in jax.tree.leaves(each)] for each in alike]
    assert shapes[0] == shapes[1] and jax.tree.structure(alike[0]) == jax.tree.structure(alike[1])
    assert [rows.tolist() for rows in all_rows(alike[0])] == [[2, 0], [], [3, 1, 0]]
    assert [alike[1].index.padded(client).tolist() for client in range(3)] == [[1, 0, 0]] * 3


def test_selected_clients_come_in_the_order_asked_for():
    chosen = select_clients(small_federation(), [0, 1])
    assert [chosen.index.padded(client).tolist() for client in range(2)] == [[2, 0], [0, 0]]
    assert merge(select_clients(small_federation(), [2, 0]))["label"].tolist() == [9, 1, 3, 2, 3]
    with pytest.raises(ValueError, match=r"non-empty list of 0\.\.2; got \[3\]"):
        select_clients(small_federation(), [3])


def test_summary_shows_sizes_skew_and_names():
    federation = small_federation()
    table = summary(federation, federation.examples["label"], ["ann", "bob", "cy"], num_largest=1)
    lines = [line.split() for line in table.splitlines()]
    assert ["clients", "3"] in lines
    assert ["examples", "5"] in lines
    assert ["min/median/max", "0", "/", "2", "/", "3"] in lines
    assert ["clients", "with", "none", "1"] in lines
    # Client 0 has one example in each of two classes, client 2 in each of three.
    entropy = ["1.00", "/", "1.29", "/", "1.58"]
    assert ["label", "entropy", "(bit)", *entropy] in lines
    assert lines[-1] == ["cy", "3"]
    with pytest.raises(ValueError, match="1 names for 3 clients"):
        summary(federation, names=["ann"])
