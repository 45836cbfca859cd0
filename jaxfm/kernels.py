"""Kernels of linear maps in factored form: what stands where a layer expects one array.

    y = x W                            Array
    y = x W + s (x A) B                LowRank
    y = x W + s (x A_i) B_i            ManyLowRank, with i of each row of a batch
    y = x W + f(x U) V                 Bottleneck
    y = x deq(codes, steps)            Quantized

`Linear` calls `times(kernel, x, num_inputs)`, so none of these is multiplied out: the gradient with
respect to A needs no gradient with respect to W, and a kernel of 4 bits stays one in memory.
Leaves of stacked layers have one more axis in front, as the kernel has; a scan over layers takes it
away. Shapes below are of one layer, with `inputs` and `outputs` any number of axes.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.model import Array


class Kernel(abc.ABC):
    """A kernel [*inputs, *outputs] that is not one array."""

    shape: tuple[int, ...]
    dtype: Any

    def __getitem__(self, index: Any) -> Kernel:
        """The kernel itself: what `nnx.Param` reads by `[...]`."""
        return self

    @abc.abstractmethod
    def times(self, x: Array, num_inputs: int) -> Array:
        """Returns [..., fan_out] of x [..., fan_in], axes of inputs and outputs flattened."""

    @abc.abstractmethod
    def whole(self) -> Array:
        """Returns the kernel as one array, or one array for each of stacked layers.

        Raises:
          ValueError: no array does what this kernel does.
        """


def times(kernel: Array | Kernel, x: Array, num_inputs: int) -> Array:
    """Returns [..., fan_out] of x [..., fan_in] by a kernel [*inputs, *outputs] of either form."""
    if isinstance(kernel, Kernel):
        return kernel.times(x, num_inputs)
    return flat_product(x, kernel, num_inputs)


def whole(kernel: Array | Kernel) -> Array:
    """Returns the kernel as one array."""
    return kernel.whole() if isinstance(kernel, Kernel) else kernel


def at_least_float32(dtype: Any) -> Any:
    """float32 in the place of a narrower dtype."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def flat_product(x: Array, w: Array, num_inputs: int) -> Array:
    """x [..., fan_in] by w [*inputs, *outputs], both flattened: [..., fan_out].

    Contracting several axes at once would make XLA's CPU backend transpose the kernel.
    """
    if w.ndim != 2:
        w = w.reshape(math.prod(w.shape[:num_inputs]), -1)
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


class _Around(Kernel):
    """A kernel around another one, which has its shape and dtype."""

    kernel: Array | Kernel

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.kernel.shape

    @property
    def dtype(self) -> Any:  # type: ignore[override]
        return self.kernel.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LowRank(_Around):
    """W + scale A B (Hu et al. 2021, section 4.1).

    Attributes:
      kernel: W, in any form.
      a: [*inputs, rank].
      b: [rank, *outputs].
      key: of the dropout of x in front of A; None: nothing is dropped.
      scale: s.
      dropout: probability.
    """

    kernel: Array | Kernel
    a: Array
    b: Array
    key: Array | None = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def times(self, x: Array, num_inputs: int) -> Array:
        y = times(self.kernel, x, num_inputs)
        return y + self.moved(x, num_inputs).astype(y.dtype)

    def moved(self, x: Array, num_inputs: int) -> Array:
        """s (x A) B: what the adapter adds."""
        if self.key is not None and self.dropout:
            kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / jnp.asarray(1 - self.dropout, x.dtype), 0)
        x = flat_product(x.astype(self.a.dtype), self.a, num_inputs)
        return flat_product(x, self.b, 1) * self.scale

    def whole(self) -> Array:
        w = whole(self.kernel)
        moved = self.scale * product(self.a, self.b, w.ndim)
        wide = at_least_float32(w.dtype)
        return (w.astype(wide) + moved.astype(wide)).astype(w.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Dora(_Around):
    """m (W + s A B) / ‖W + s A B‖, with the norm over inputs (Liu et al. 2024, equations 5 and 11).

    The gradient takes the norm as a constant (section 4.3).

    Attributes:
      low: W + s A B.
      magnitude: m [*outputs].
    """

    low: LowRank
    magnitude: Array

    @property
    def kernel(self) -> Array | Kernel:  # type: ignore[override]
        return self.low

    def times(self, x: Array, num_inputs: int) -> Array:
        kept = dataclasses.replace(self.low, key=None).whole()
        norm = jnp.sqrt(jnp.square(kept.astype(jnp.float32)).sum(range(num_inputs)))
        share = self.magnitude / lax.stop_gradient(norm).astype(self.magnitude.dtype)
        y = self.low.times(x, num_inputs)
        return y * _last(share, y.ndim).astype(y.dtype)

    def whole(self) -> Array:
        w, m = self.low.whole(), self.magnitude
        stacked = _is_stacked(self.low.a, self.low.b, w.ndim)
        inputs = range(stacked, w.ndim - (m.ndim - stacked))
        wide = w.astype(jnp.float32)
        norm = jnp.sqrt(jnp.square(wide).sum(inputs, keepdims=True))
        return (wide / norm * jnp.expand_dims(m, inputs).astype(jnp.float32)).astype(w.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Bottleneck(_Around):
    """A small network beside a linear map: x W + f(x U + c) V (He et al. 2022, table 1: parallel).

    Attributes:
      kernel: W, in any form.
      down: U [*inputs, size].
      down_bias: c [size].
      up: V [size, *outputs].
    """

    kernel: Array | Kernel
    down: Array
    down_bias: Array
    up: Array

    def times(self, x: Array, num_inputs: int) -> Array:
        y = times(self.kernel, x, num_inputs)
        inner = flat_product(x.astype(self.down.dtype), self.down, num_inputs)
        inner = jax.nn.gelu(inner + _last(self.down_bias, inner.ndim))
        return y + flat_product(inner, self.up, 1).astype(y.dtype)

    def whole(self) -> Array:
        raise ValueError("A bottleneck adapter is not linear: it cannot be merged into a kernel.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ManyLowRank(_Around):
    """W + scale A_i B_i, where each row of a batch has an adapter of its own.

    Attributes:
      kernel: W, in any form.
      a: [n, *inputs, rank] of n adapters.
      b: [n, rank, *outputs].
      ids: i32[B], which of them each row of x [B, ..., fan_in] is multiplied by.
      scale: s.
    """

    kernel: Array | Kernel
    a: Array
    b: Array
    ids: Array
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    def times(self, x: Array, num_inputs: int) -> Array:
        y = times(self.kernel, x, num_inputs)
        count, rank = self.a.shape[0], self.a.shape[-1]
        a = self.a.reshape(count, -1, rank)[self.ids]
        b = self.b.reshape(count, rank, -1)[self.ids]
        rows = x.reshape(x.shape[0], -1, x.shape[-1]).astype(a.dtype)
        moved = jnp.einsum("btr,bro->bto", jnp.einsum("bti,bir->btr", rows, a), b) * self.scale
        return y + moved.reshape(y.shape).astype(y.dtype)

    def whole(self) -> Array:
        raise ValueError(
            "Adapters of many clients cannot be merged into one kernel; merge each by itself."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized(Kernel):
    """A kernel of 4 or 8 bits a number, in groups of inputs with a step each.

    Attributes:
      codes: u8[rows, fan_out], or u8[rows / 2, fan_out] of 4 bits, even rows in the low half; the
        fan_in is filled up to a whole number of groups.
      steps: f32[groups, fan_out].
      levels: f32[16] that codes of 4 bits stand for; None: codes of 8 bits are multiples of the
        step, 128 being zero.
      sizes: of the kernel.
      number: dtype of the kernel.
    """

    codes: Array
    steps: Array
    levels: Array | None
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    number: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (*self.codes.shape[:-2], *self.sizes)

    @property
    def dtype(self) -> Any:  # type: ignore[override]
        return self.number

    def times(self, x: Array, num_inputs: int) -> Array:
        return flat_product(x, self.whole(), num_inputs)

    def whole(self) -> Array:
        if self.codes.ndim == 3:  # of stacked layers
            return jax.vmap(Quantized.whole)(self)
        fan_out = self.codes.shape[-1]
        if self.levels is None:
            values = self.codes.astype(jnp.float32) - 128
        else:
            halves = jnp.stack([self.codes & 15, self.codes >> 4], axis=1)
            values = self.levels[halves.reshape(-1, fan_out)]
        groups = values.reshape(self.steps.shape[0], -1, fan_out) * self.steps[:, None]
        fan_in = math.prod(self.sizes) // fan_out
        return groups.reshape(-1, fan_out)[:fan_in].reshape(self.sizes).astype(self.number)


def _last(x: Array, ndim: int) -> Array:
    """x flattened along the last of `ndim` axes."""
    return x.reshape((1,) * (ndim - 1) + (-1,))


def product(a: Array, b: Array, ndim: int) -> Array:
    """A B [*inputs, *outputs], of a kernel with `ndim` axes; for each layer of stacked ones."""
    multiply = lambda a, b: jnp.tensordot(a, b, 1)
    return jax.vmap(multiply)(a, b) if _is_stacked(a, b, ndim) else multiply(a, b)


def _is_stacked(a: Array, b: Array, ndim: int) -> bool:
    """Whether a and b, and the kernel of `ndim` axes, have an axis of layers in front."""
    return a.ndim + b.ndim - ndim == 3
