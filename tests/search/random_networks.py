"""Networks of random structure, plain functions of a dict of arrays, for the laws of search."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax


class Case(NamedTuple):
    """`function(params, x)`, and an x."""

    function: Callable
    params: dict[str, Any]
    x: Any


class Draw:
    """Parameters as they are asked for; N(0, 1/fan-in), so that no layer drowns the others."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.params: dict[str, Any] = {}

    def __call__(self, *shape: int) -> str:
        name = f"w{len(self.params):02}"
        scale = np.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.3
        self.params[name] = (self.rng.normal(size=shape) * scale).astype(np.float32)
        return name


def keep_some(net, seed: int) -> tuple[np.ndarray, ...]:
    """A random mask for each group, at least one unit; layers keep equally many of their own."""
    rng = np.random.default_rng(seed)
    kept = []
    for group in net.groups:
        count = rng.integers(1, group.size + 1)
        rows = [rng.permutation(group.size) < count for _ in range(group.layers or 1)]
        kept.append(np.stack(rows) if group.layers else rows[0])
    return tuple(kept)


def conv(x, kernel, stride=1, groups=1):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip


def add_bias(x, bias):
    return x + jnp.broadcast_to(bias, x.shape)


def normalised(x, axes):
    centred = x - x.mean(axes, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + 1e-2)


def scaled(x):
    """RMS norm: one channel that is left is no constant, as it is in `normalised`."""
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-2)


# Blocks of a convolutional network: (draw, channels) -> (apply(params, x), channels).


def strided(draw, c):
    w, b = draw(3, 3, c, 6), draw(6)
    return lambda p, x: jax.nn.relu(add_bias(conv(x, p[w], 2), p[b])), 6


def grouped(draw, c):
    w = draw(3, 3, c // 2, 8)
    return lambda p, x: jax.nn.silu(conv(x, p[w], groups=2)), 8


def depthwise(draw, c):
    w, out = draw(3, 3, 1, 2 * c), draw(1, 1, 2 * c, 4)
    return lambda p, x: conv(jnp.tanh(conv(x, p[w], groups=c)), p[out]), 4


def identity_shortcut(draw, c):
    w, v = draw(3, 3, c, 6), draw(3, 3, 6, c)
    return lambda p, x: jax.nn.relu(x + conv(jax.nn.relu(conv(x, p[w])), p[v])), c


def padded_shortcut(draw, c):
    w, v = draw(3, 3, c, 4), draw(3, 3, 4, c + 2)

    def apply(p, x):
        short = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 1)))
        return jax.nn.relu(short + conv(jax.nn.relu(conv(x, p[w], 2)), p[v]))

    return apply, c + 2


def projected_shortcut(draw, c):
    w, v, s = draw(3, 3, c, 4), draw(3, 3, 4, 6), draw(1, 1, c, 6)
    return lambda p, x: conv(x, p[s], 2) + conv(jax.nn.relu(conv(x, p[w], 2)), p[v]), 6


def dense_connection(draw, c):
    w = draw(3, 3, c, 4)
    return lambda p, x: jnp.concatenate([x, jax.nn.relu(conv(x, p[w]))], -1), c + 4


def half_split(draw, c):
    w = draw(3, 3, c // 2, c // 2 + 2)

    def apply(p, x):
        left, right = jnp.split(x, 2, -1)
        return jnp.concatenate([left, jax.nn.relu(conv(right, p[w]))], -1)

    return apply, c + 2


def gated(draw, c):
    w = draw(1, 1, c, 12)

    def apply(p, x):
        y = conv(x, p[w])
        return y[..., :6] * jax.nn.sigmoid(y[..., 6:])

    return apply, 6


def channel_norm(draw, c):
    scale, b = draw(c), draw(c)
    return lambda p, x: add_bias(normalised(x, -1) * (1 + p[scale])[None, None, None], p[b]), c


def group_norm(draw, c):
    def apply(p, x):
        parts = x.reshape(*x.shape[:-1], 2, c // 2)
        return normalised(parts, (1, 2, 4)).reshape(x.shape)

    return apply, c


def shuffle(draw, c):
    def apply(p, x):
        return x.reshape(*x.shape[:-1], 2, c // 2).swapaxes(-1, -2).reshape(x.shape)

    return apply, c


def shuffled_groups(draw, c):
    w, v = draw(1, 1, c // 2, 12), draw(3, 3, 6, 8)
    mixed, _ = shuffle(draw, 12)
    return lambda p, x: conv(mixed(p, jnp.tanh(conv(x, p[w], groups=2))), p[v], groups=2), 8


def excited(draw, c):
    w, v = draw(c, 3), draw(3, c)

    def apply(p, x):
        gate = jax.nn.sigmoid(jax.nn.relu(x.mean((1, 2)) @ p[w]) @ p[v])
        return x * jnp.broadcast_to(gate[:, None, None], x.shape)

    return apply, c


BLOCKS = (
    strided, grouped, depthwise, identity_shortcut, padded_shortcut, projected_shortcut,
    dense_connection, half_split, gated, channel_norm, group_norm, shuffle, shuffled_groups,
    excited,
)  # fmt: skip


def convolutional(blocks: Sequence[Callable], flat: bool, seed: int) -> Case:
    """Blocks one after the other, then a flattened or averaged head."""
    draw = Draw(seed)
    stem, side, c, parts = draw(3, 3, 3, 4), 6, 4, []
    for block in blocks:
        apply, c = block(draw, c)
        parts.append(apply)
    shape = jax.eval_shape(
        lambda p, x: _chain(parts, p, conv(x, p[stem])), draw.params, jnp.zeros((2, side, side, 3))
    ).shape
    head = draw(int(np.prod(shape[1:])) if flat else c, 3)

    def function(p, x):
        y = _chain(parts, p, conv(x, p[stem]))
        return (y.reshape(len(x), -1) if flat else y.mean((1, 2))) @ p[head]

    x = draw.rng.normal(size=(2, side, side, 3)).astype(np.float32)
    return Case(function, draw.params, x)


def _chain(parts, p, x):
    for part in parts:
        x = part(p, x)
    return x


@jax.custom_jvp
def squared_relu(x):
    return jnp.square(jax.nn.relu(x))


squared_relu.defjvp(lambda x, dx: (squared_relu(*x), 2 * jax.nn.relu(x[0]) * dx[0]))


class Shape(NamedTuple):
    """Options of `decoder`."""

    kv_heads: int = 2
    q_per_kv: int = 2
    fused: bool = True
    gated: bool = True
    scanned: bool = True
    remat: bool = True
    tied: bool = False

    @property
    def layers(self) -> int:
        return 2 if self.scanned else 1


def decoder(shape: Shape, seed: int) -> Case:
    """Causal attention over grouped heads and an MLP, stacked layers or separate ones."""
    g, r, k, d, m = shape.kv_heads, shape.q_per_kv, 4, 6, 10
    draw = Draw(seed)
    depth = (shape.layers,) if shape.scanned else ()

    def layer_params():
        fused = {"qkv": draw(*depth, d, g * (r + 2) * k)}
        apart = {"q": draw(*depth, d, g * r * k), "k": draw(*depth, d, g * k),
                 "v": draw(*depth, d, g * k)}  # fmt: skip
        mlp = {"up": draw(*depth, d, m), "down": draw(*depth, m, d)}
        gate = {"gate": draw(*depth, d, m)} if shape.gated else {}
        return {"o": draw(*depth, g * r * k, d), "norm": draw(*depth, d)} | mlp | gate | (
            fused if shape.fused else apart
        )  # fmt: skip

    names = {"layers": layer_params()} if shape.scanned else {
        f"layer{i}": layer_params() for i in range(shape.layers)
    }  # fmt: skip
    names |= {"embed": draw(11, d)} | ({} if shape.tied else {"head": draw(d, 11)})
    params = jax.tree.map(lambda name: draw.params[name], names)

    def attention(p, x):
        b, t, _ = x.shape
        if shape.fused:
            q, key, v = jnp.split(x @ p["qkv"], [g * r * k, g * (r + 1) * k], -1)
        else:
            q, key, v = x @ p["q"], x @ p["k"], x @ p["v"]
        q, key, v = q.reshape(b, t, g, r, k), key.reshape(b, t, g, k), v.reshape(b, t, g, k)
        scores = jnp.einsum("btgrk,bsgk->bgrts", q, key) * k**-0.5
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), scores.shape)
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
        return jnp.einsum("bgrts,bsgk->btgrk", weights, v).reshape(b, t, -1) @ p["o"]

    @jax.jit
    def mlp(p, x):
        up = x @ p["up"]
        return (jax.nn.silu(x @ p["gate"]) * up if shape.gated else squared_relu(up)) @ p["down"]

    def layer(x, p):
        x = x + attention(p, scaled(x) * jnp.broadcast_to(1 + p["norm"], x.shape))
        return x + mlp(p, scaled(x)), None

    layer = jax.checkpoint(layer) if shape.remat else layer

    def function(params, tokens):
        x = params["embed"][tokens]
        if shape.scanned:
            x, _ = lax.scan(layer, x, params["layers"])
        else:
            for i in range(shape.layers):
                x, _ = layer(x, params[f"layer{i}"])
        return scaled(x) @ (params["embed"].T if shape.tied else params["head"])

    return Case(function, params, draw.rng.integers(0, 11, (2, 5)).astype(np.int32))


seeds = st.integers(0, 2**16)
chains = st.lists(st.sampled_from(BLOCKS), min_size=2, max_size=4)
shapes = st.builds(
    Shape,
    *(st.integers(1, 2), st.integers(1, 2)),
    *(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
EVERY_BLOCK = tuple(tuple(BLOCKS[i : i + 5]) for i in range(0, len(BLOCKS), 5))
