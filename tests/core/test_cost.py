"""Costs counted in a jaxpr are what a person and what the compiler count."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxfm.cost import count_flops, loop_bytes, num_bytes, scan_counts

X, W = jnp.ones((8, 16)), jnp.ones((16, 32))
IMAGES, KERNEL = jnp.ones((2, 10, 10, 3)), jnp.ones((3, 3, 3, 5))


def convolve(images, kernel, **options):
    return lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def small_net(kernel, w):
    hidden = convolve(IMAGES, kernel).reshape(2, -1)[:, :16]
    return hidden @ w


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        (lambda x, w: x @ w, (X, W), 2 * 8 * 16 * 32),
        (lambda x, w: jnp.einsum("bi,bi->b", x, x), (X, W), 2 * 8 * 16),
        (convolve, (IMAGES, KERNEL), 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)),
        (lambda x: convolve(x, jnp.ones((3, 3, 1, 6)), feature_group_count=3), (IMAGES,),
         2 * (2 * 8 * 8 * 6) * (3 * 3 * 1)),
        (lambda x: x * x + 1, (X,), 0),
    ],
    ids=["matmul", "batched dot", "convolution", "grouped convolution", "elementwise"],
)  # fmt: skip
def test_by_hand(function, args, expected):
    assert count_flops(function, *args) == expected


def product(x, w):
    return jnp.sum(jnp.tanh(x @ w))


def test_a_gradient_costs_what_its_products_cost():
    """Forward, and one product for each argument that is asked for."""
    once = 2 * 8 * 16 * 32
    assert count_flops(jax.grad(product), X, W) == 2 * once
    assert count_flops(jax.grad(product, (0, 1)), X, W) == 3 * once
    assert count_flops(jax.grad(jax.checkpoint(product), (0, 1)), X, W) == 4 * once


def test_loops_and_branches():
    square = jnp.ones((4, 4))
    once = 2 * 4**3
    step = lambda x, _: (x @ square, None)
    assert count_flops(lambda x: lax.scan(step, x, length=7)[0], square) == 7 * once
    nested = lambda x, _: (lax.scan(step, x, length=3)[0], None)
    assert count_flops(lambda x: lax.scan(nested, x, length=5)[0], square) == 15 * once
    grad = jax.grad(lambda x: lax.scan(step, x, length=7)[0].sum())
    assert count_flops(grad, square) == 2 * 7 * once  # there and back
    body = lambda i, x: x @ square
    assert count_flops(lambda x, n: lax.fori_loop(0, n, body, x), square, 9) == once
    branch = lambda x, p: lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x)
    assert count_flops(branch, square, True) == 2 * once
    assert count_flops(jax.jit(jax.vmap(lambda x: x @ square)), jnp.ones((6, 4, 4))) == 6 * once


@pytest.mark.parametrize("function", [small_net, jax.grad(lambda *a: small_net(*a).sum(), (0, 1))])
def test_the_compiler_counts_the_same(function):
    """Its figure has elementwise work, too, and skips multiplications with padding."""
    cost = jax.jit(function).lower(KERNEL, W).compile().cost_analysis()
    assert count_flops(function, KERNEL, W) == pytest.approx(cost["flops"], rel=0.1)


def test_loop_bytes_are_those_of_the_largest_loop():
    small, large = jnp.ones(10), jnp.ones((5, 6), jnp.bfloat16)

    def run(n):
        a = lax.fori_loop(0, n, lambda i, x: x + 1, small)
        b, _ = lax.scan(
            lambda carry, _: (jax.tree.map(jnp.negative, carry), None), (large, small), length=3
        )
        return a, b

    assert loop_bytes(run, 4) == 5 * 6 * 2 + 10 * 4
    counted = lax.fori_loop  # carries its index and its bound as well
    assert loop_bytes(lambda n: counted(0, n, lambda i, x: x + 1, small), 4) == 10 * 4 + 2 * 4
    assert loop_bytes(lambda x: x + 1, small) == 0


def test_num_bytes():
    tree = {"a": jnp.ones((3, 4)), "b": [jax.ShapeDtypeStruct((5,), jnp.int8), jnp.ones(2, bool)]}
    assert num_bytes(tree) == 48 + 5 + 2


@pytest.mark.smoke
def test_a_scans_constants_and_carried_values_are_counted():
    def function(x, w):
        def body(carry, y):
            a, b = carry
            return (a + y @ w, b + 1), a.sum()

        return jax.lax.scan(body, (x, jnp.zeros(())), jnp.ones((3, 2)))

    (scan,) = [
        eqn
        for eqn in jax.make_jaxpr(function)(jnp.ones(2), jnp.ones((2, 2))).jaxpr.eqns
        if eqn.primitive.name == "scan"
    ]
    assert scan_counts(scan.params) == (1, 2)  # w; a and b
