"""Graphs of neighbours: symmetric, few, and as many as their promises need."""

import math

import numpy as np
import pytest

from jaxfm.federated.secure.graph import complete_graph, degree, ring, sparse_graph


@pytest.mark.parametrize("num_clients", [2, 7, 60, 300])
def test_a_graph_is_symmetric_and_connected(num_clients):
    rng = np.random.default_rng(num_clients)
    clients = rng.choice(1000, num_clients, replace=False).tolist()
    for graph in (complete_graph(clients), sparse_graph(clients, rng)):
        sizes = {len(others) for others in graph.neighbours.values()}
        assert len(sizes) == 1 and sorted(graph.neighbours) == sorted(clients)
        pairs = {(i, j) for i, others in graph.neighbours.items() for j in others}
        assert pairs == {(j, i) for i, j in pairs} and all(i != j for i, j in pairs)
        reached, border = {clients[0]}, [clients[0]]
        while border:
            border = list({j for i in border for j in graph.neighbours[i]} - reached)
            reached.update(border)
        assert reached == set(clients)
        assert 2 <= graph.threshold <= max(sizes) + 1
        assert graph.least > num_clients / 2


def test_neighbours_grow_as_the_logarithm():
    sizes = [degree(10**power)[0] for power in range(2, 7)]
    assert sizes == sorted(sizes) and sizes[-1] < 2 * sizes[0]
    growth = np.diff(sizes)
    assert growth.max() <= 10  # a constant for each factor of ten
    assert degree(10) is None  # all pairs


def test_the_degree_keeps_its_promises():
    """Measured with weaker promises, which thousands of random graphs can contradict."""
    corrupt, dropped, bits, num_clients = 0.2, 0.2, 6, 200
    size, threshold = degree(
        num_clients, corrupt=corrupt, dropped=dropped, security_bits=bits, failure_bits=bits
    )
    rng = np.random.default_rng(0)
    trials, opened, lost = 400, 0, 0
    steps = [step for step in range(-size // 2, size // 2 + 1) if step]
    for _ in range(trials):
        kind = rng.permutation(np.repeat([0, 1, 2], [120, 40, 40]))  # honest, corrupt, dropped
        near = np.stack([np.roll(kind, step) for step in steps])
        opened += ((near == 1).sum(0) >= threshold).any()
        lost += ((near != 2).sum(0) < threshold).any()
    slack = 3 * math.sqrt(trials * 2.0**-bits)
    assert opened <= trials * 2.0**-bits + slack
    assert lost <= trials * 2.0**-bits + slack


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: complete_graph([1]), "at least 2 distinct clients; got 1"),
        (lambda: complete_graph([1, 1]), "at least 2 distinct clients"),
        (lambda: complete_graph([0, 65520]), "numbers from 0 to 65519"),
        (lambda: complete_graph(range(4), 5), "threshold=5 must be at least 2 and at most 4"),
        (lambda: complete_graph(range(4), 1), "threshold=1 must be at least 2"),
        (lambda: ring(range(9), 3, 2, 5), "size=3 must be an even number"),
        (lambda: ring(range(9), 10, 2, 5), "size=10 must be an even number"),
        (lambda: ring(range(9), 4, 6, 5), "threshold=6 must be from 2 to 5"),
        (lambda: ring(range(9), 4, 3, 10), "least=10 from 2 to 9"),
        (lambda: degree(9, corrupt=0.5, dropped=0.5), "corrupt=0.5 and dropped=0.5 must be shares"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
