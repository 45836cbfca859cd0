"""Layers that the model families share: linear maps, norms, rotary positions, attention, MLPs.

Each is an NNX module that holds parameters only. Widths are read from the shapes of the
parameters at call time, so the same module runs any subnet. Kernels keep heads as axes of their
own ([D, G, R, K]: embed, key/value heads, queries per key/value head, head dim), so that a head is
cut, masked or sharded by naming an axis, and grouped-query ratios hold by construction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxfm.kernels import times
from jaxfm.model import Array, Live, Past
from jaxfm.rotary import rotate
from jaxfm.virtual_tokens import with_prefix

Axis = tuple[str | None, int]  # a logical name, None for an axis without one, and a size


def check_fields(config: Any, positive: tuple[str, ...], choices: Mapping[str, tuple]) -> None:
    """Raises ValueError if a field is below 1 or not one of its choices."""
    for name in positive:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {getattr(config, name)!r}.")


def check_length(length: int, max_len: int, virtual: int = 0) -> None:
    """Raises ValueError if tokens, after virtual ones, are more than there are positions."""
    if length + virtual > max_len:
        after = f" after {virtual} virtual ones" if virtual else ""
        raise ValueError(
            f"The inputs have {length} tokens{after}, but the model has {max_len} positions; cut "
            "the inputs, or build the model with a larger max_len."
        )


def param(value: Array, names: tuple[str | None, ...], **more: Any) -> nnx.Param:
    """Returns a trained leaf with logical axis names, and what else is to be known of it."""
    return nnx.Param(value, out_sharding=names, eager_sharding=False, **more)


class Linear(nnx.Module):
    """y = x @ kernel + bias over any number of input and output axes.

    The kernel has shape `(*inputs, *outputs)` and is drawn from N(0, scale² / fan_in). It may be
    given in factored form (`jaxfm.kernels`).
    """

    def __init__(
        self,
        inputs: tuple[Axis, ...],
        outputs: tuple[Axis, ...],
        *,
        bias: bool = False,
        scale: float = 1.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        names, shape = zip(*inputs, *outputs, strict=True)
        fan_in = math.prod(size for _, size in inputs)
        stddev = scale / math.sqrt(fan_in)
        kernel = (jax.random.normal(rngs.params(), shape) * stddev).astype(dtype)
        self.kernel = param(kernel, names, num_inputs=len(inputs))
        if bias:
            names, shape = zip(*outputs, strict=True)
            self.bias = param(jnp.zeros(shape, dtype), names)
        self.num_inputs = len(inputs)
        self.has_bias = bias

    def __call__(self, x: Array) -> Array:
        kernel, n = self.kernel[...], self.num_inputs
        flat = x.reshape(*x.shape[: x.ndim - n], -1) if n > 1 else x
        y = times(kernel, flat, n).reshape(*flat.shape[:-1], *kernel.shape[n:])
        if self.has_bias:
            bias = self.bias[...]
            y = y + lax.broadcast_in_dim(bias, y.shape, tuple(range(y.ndim - bias.ndim, y.ndim)))
        return y


class Norm(nnx.Module):
    """RMS norm or layer norm over the last axis, in float32.

    Masked channels (`live` is 0) count neither in the mean nor in the divisor: a masked model
    computes what the extracted one does.
    """

    def __init__(self, axis: Axis, *, kind: str = "rms", eps: float = 1e-6, dtype=jnp.float32):
        name, size = axis
        self.scale = param(jnp.ones((size,), dtype), (name,))
        self.live = Live(jnp.ones((size,)), out_sharding=(name,), eager_sharding=False)
        if kind == "layer":
            self.bias = param(jnp.zeros((size,), dtype), (name,))
        self.centred = kind == "layer"
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        along = lambda leaf: lax.expand_dims(leaf.astype(jnp.float32), tuple(range(x.ndim - 1)))
        live = self.live[...]
        count = jnp.maximum(live.sum(), 1)
        y = x.astype(jnp.float32)
        if self.centred:
            y = (y - y.sum(-1, keepdims=True) / count) * along(live)
        y = y * lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) / count + self.eps)
        y = y * along(self.scale[...])
        if self.centred:
            y = y + along(self.bias[...])
        return y.astype(x.dtype)


class GroupNorm(nnx.Module):
    """Group norm over space and `num_groups` groups of consecutive channels, in float32.

    Inputs are [B, ..., C]. Masked channels count neither in means nor in divisors, and a group
    without a live channel gives zeros. Source: Wu and He 2018, equations 1-3.
    """

    def __init__(self, axis: Axis, *, num_groups: int, eps: float = 1e-5, dtype=jnp.float32):
        name, size = axis
        if size % num_groups:
            raise ValueError(f"{size} channels do not divide into num_groups={num_groups}.")
        self.scale = param(jnp.ones((size,), dtype), (name,))
        self.bias = param(jnp.zeros((size,), dtype), (name,))
        self.live = Live(jnp.ones((size,)), out_sharding=(name,), eager_sharding=False)
        self.num_groups, self.eps = num_groups, eps

    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(f"{channels} channels do not divide into {self.num_groups} groups.")
        grouped = lambda leaf: leaf.astype(jnp.float32).reshape(1, 1, self.num_groups, -1)
        live = grouped(self.live[...])
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, *live.shape[2:])
        count = jnp.maximum(live.sum(-1, keepdims=True) * y.shape[1], 1)
        y = (y - y.sum((1, 3), keepdims=True) / count) * live
        y = y * lax.rsqrt(jnp.square(y).sum((1, 3), keepdims=True) / count + self.eps)
        y = y * grouped(self.scale[...]) + grouped(self.bias[...])
        return y.reshape(x.shape).astype(x.dtype)


class BatchNorm(nnx.Module):
    """Batch norm over all axes but the last, in float32.

    y = (x - mean) / sqrt(var + eps) * scale + bias. In training (`use_running_average` False) the
    moments are those of the batch, and the running ones move by `momentum` towards them. As in
    PyTorch, the variance divides by n to normalise and by n - 1 in the running average. A masked
    channel has scale and bias 0, so it gives zeros for any moments and needs no `live`.
    Source: Ioffe and Szegedy 2015, algorithm 1.
    """

    def __init__(self, axis: Axis, *, momentum: float = 0.1, eps: float = 1e-5, dtype=jnp.float32):
        name, size = axis
        self.scale = param(jnp.ones((size,), dtype), (name,))
        self.bias = param(jnp.zeros((size,), dtype), (name,))
        stat = lambda value: nnx.BatchStat(value, out_sharding=(name,), eager_sharding=False)
        self.mean, self.var = stat(jnp.zeros((size,))), stat(jnp.ones((size,)))
        self.momentum, self.eps = momentum, eps
        self.use_running_average = True

    def __call__(self, x: Array) -> Array:
        along = lambda leaf: lax.expand_dims(leaf.astype(jnp.float32), tuple(range(x.ndim - 1)))
        y = x.astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            axes, count = tuple(range(x.ndim - 1)), math.prod(x.shape[:-1])
            old_mean, old_var = mean, var
            mean = y.mean(axes)
            var = jnp.square(y - along(mean)).mean(axes)
            moved = lambda old, new: old + self.momentum * (lax.stop_gradient(new) - old)
            self.mean[...] = moved(old_mean, mean)
            self.var[...] = moved(old_var, var * (count / max(count - 1, 1)))
        factor = lax.rsqrt(var + self.eps) * self.scale[...].astype(jnp.float32)
        y = (y - along(mean)) * along(factor) + along(self.bias[...])
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors, looked up by index."""

    def __init__(self, rows: Axis, axis: Axis, *, stddev=0.02, dtype=jnp.float32, rngs: nnx.Rngs):
        shape = rows[1], axis[1]
        table = (jax.random.normal(rngs.params(), shape) * stddev).astype(dtype)
        self.table = param(table, (rows[0], axis[0]))

    def __call__(self, ids: Array) -> Array:
        return jnp.take(self.table[...], ids, axis=0)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


class Mlp(nnx.Module):
    """Two linear maps with an activation between; gated (SwiGLU and its kin) with three.

    Plain: down(act(up(x))). Gated: down(act(gate(x)) * up(x)); Shazeer 2020, equation 6.
    """

    def __init__(
        self, embed: Axis, hidden: Axis, *, activation: str, gated: bool, bias: bool = False,
        out_scale: float = 1.0, dtype=jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        kw = {"bias": bias, "dtype": dtype, "rngs": rngs}
        if gated:
            self.gate = Linear((embed,), (hidden,), **kw)
        self.up = Linear((embed,), (hidden,), **kw)
        self.down = Linear((hidden,), (embed,), scale=out_scale, **kw)
        self.gated, self.activation = gated, activation

    def __call__(self, x: Array) -> Array:
        act = ACTIVATIONS[self.activation]
        return self.down(act(self.gate(x)) * self.up(x) if self.gated else act(self.up(x)))


def causal_mask(queries: Array, keys: Array, window: int | None = None) -> Array:
    """Returns bool[B, T, S]: which keys at i32[B, S] each query at i32[B, T] may see.

    `window` is the number of latest positions seen, the query's own included.
    """
    distance = queries[:, :, None] - keys[:, None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def contained(k: Array, v: Array, also: Array | None = None) -> tuple[Array, Array]:
    """Returns keys and values with which a number that is not finite harms only who may see it.

    Where one is not, or `also` is false, the key becomes NaN and the value 0: a mask hides the
    score of a key, but not a value, since 0 * NaN is NaN. Where keys and values differ in size, a
    whole token is marked.

    Args:
      k, v: [..., K] and [..., V].
      also: bool, broadcastable to both.
    """
    good = [jnp.isfinite(x) for x in (k, v)]
    if k.shape != v.shape:
        good = [x.all(-1, keepdims=True) for x in good]
    finite = good[0] & good[1]
    if also is not None:
        finite &= also
    nan, zero = jnp.asarray(jnp.nan, k.dtype), jnp.zeros((), v.dtype)
    return jnp.where(finite, k, nan), jnp.where(finite, v, zero)


def attend(
    q: Array, k: Array, v: Array, mask: Array, *, scale: float, past: Past | None = None
) -> Array:
    """Computes softmax attention with grouped queries; the softmax is in float32.

    Args:
      q: [B, T, G, R, K]; k, v: [B, S, G, K]: of the T tokens, and of a prefix before them.
      mask: bool[B, T, S] over the keys given (leading axis may be 1).
      past: cached rows attended to as well, under one softmax.
    Returns:
      [B, T, G, R, K]. Where a query may see nothing, the mean of the values.
    """
    with jax.named_scope("attention"):
        if past is not None and q.shape[1] > 1:
            k, v = contained(k, v)
        scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32)
        seen = mask
        if past is not None:
            scores = jnp.concatenate([_cached_scores(q, past.k), scores], axis=-1)
            batch = max(mask.shape[0], past.mask.shape[0])
            spread = lambda m: jnp.broadcast_to(m, (batch, *m.shape[1:]))
            seen = jnp.concatenate([spread(past.mask), spread(mask)], axis=-1)
        lowest = jnp.asarray(jnp.finfo(jnp.float32).min)
        scores = jnp.where(seen[:, None, None], scores * scale, lowest)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        mix = lambda w, values: jnp.einsum("bgrts,bsgk->btgrk", w, values)
        if past is None:
            return mix(weights, v)
        cells = past.k.shape[2]
        return _cached_values(weights[..., :cells], past.v) + mix(weights[..., cells:], v)


def _cached_scores(q: Array, k: Array) -> Array:
    """Returns f32[B, G, R, T, S] of queries [B, T, G, R, K] and cached keys [B, G, S, K]."""
    batch, length, groups, per_group, size = q.shape
    rows = q.transpose(0, 2, 3, 1, 4).reshape(batch, groups, per_group * length, size)
    scores = jnp.einsum("bgmk,bgsk->bgms", rows, k, preferred_element_type=jnp.float32)
    return scores.reshape(batch, groups, per_group, length, -1)


def _cached_values(weights: Array, v: Array) -> Array:
    """Returns [B, T, G, R, K], cached values [B, G, S, K] mixed by weights [B, G, R, T, S]."""
    batch, groups, per_group, length, cells = weights.shape
    rows = weights.reshape(batch, groups, per_group * length, cells)
    mixed = jnp.einsum("bgms,bgsk->bgmk", rows, v)
    return mixed.reshape(batch, groups, per_group, length, -1).transpose(0, 3, 1, 2, 4)


class Attention(nnx.Module):
    """Multi-head attention with grouped queries: projections around `attend`."""

    def __init__(
        self, embed: Axis, *, num_heads: int, num_kv_heads: int, head_dim: int,
        qkv_bias: bool = False, out_bias: bool = False, out_scale: float = 1.0,
        scale: float | None = None,
        rotary: tuple[np.ndarray, float] | None = None, dtype=jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        groups, per_group = ("kv_heads", num_kv_heads), ("q_per_kv", num_heads // num_kv_heads)
        qk = ("qk_dim" if rotary is None else "rotary_dim", head_dim)
        value = ("v_dim", head_dim)
        kw = {"bias": qkv_bias, "dtype": dtype, "rngs": rngs}
        self.q = Linear((embed,), (groups, per_group, qk), **kw)
        self.k = Linear((embed,), (groups, qk), **kw)
        self.v = Linear((embed,), (groups, value), **kw)
        self.o = Linear(
            (groups, per_group, value), (embed,),
            bias=out_bias, scale=out_scale, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        # Of the whole model: a subnet with shorter heads keeps it.
        self.scale = head_dim**-0.5 if scale is None else scale
        self.frequencies = None if rotary is None else tuple(rotary[0].tolist())
        self.factor = 1.0 if rotary is None else rotary[1]

    def __call__(
        self, x: Array, mask: Array, positions: Array | None = None, past: Past | None = None,
        prefix: Mapping[str, Array] | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:  # fmt: skip
        """Returns the mixed tokens [B, T, D] and the new rows of keys and values [B, T, G, K].

        The mask is one of the tokens, or of the rows of a prefix and the tokens.
        """
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.frequencies is not None:
            assert positions is not None
            frequencies = np.asarray(self.frequencies)
            q, k = (rotate(y, positions, frequencies, self.factor) for y in (q, k))
        mixed = attend(q, *with_prefix(prefix, k, v), mask, scale=self.scale, past=past)
        return self.o(mixed), (k, v)
