"""Two-dimensional convolution and pooling that train fast on every backend.

XLA's CPU backend rewrites a convolution to the one form that its fast kernel takes (input NHWC,
kernel HWIO, output NHWC) only in the entry computation of a program, never inside a loop. A
forward convolution is in that form already, but JAX writes its two gradients with other dimension
numbers. So a convolutional network trained under ``lax.scan``, as a federated round is, falls
back to scalar code. Writing the gradients in the fast form removes the cliff; `conv2d` does so.

Processor milliseconds a client's step of the 5x5x32 / 5x5x64 / dense 512 network, 28x28 images,
batch 20, one x86 core, jax 0.10 (`benchmarks/conv_step.py`, docs/results/conv.md):

    ========================  ============  =============  ====================
    method                    own jit       inside a scan  vmap of 4 in a scan
    ========================  ============  =============  ====================
    ``direct``                          19            261                   582
    ``canonical``                       19             18                    22
    patches times a matrix              26             29                    33
    ========================  ============  =============  ====================

Hence the rule of ``method=None``: canonical on a CPU, direct on everything else.

In addition, XLA exchanges images and kernel where the kernel has the larger area, and that form is
scalar code as well: 3x3 on 2x2 images of 512 channels, the last layers of a VGG, takes 32 times
as long. Canonical convolutions therefore pad such images beforehand.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

METHODS = ("direct", "canonical")
_Pads = tuple[tuple[int, int], ...]
_NHWC = ("NHWC", "HWIO", "NHWC")


class _Window(NamedTuple):
    """How the kernel moves over the input; every field has one entry a spatial dimension."""

    strides: tuple[int, ...]
    padding: _Pads
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]


def conv2d(
    x: Array,
    kernel: Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    method: str | None = None,
) -> Array:
    """Convolves images: ``y[b,h,w,o] = sum_ijc x[b,h*s+i,w*s+j,c] kernel[i,j,c,o]``.

    Args:
      x: images [B, H, W, C].
      kernel: weights [height, width, C, O], of the dtype of `x`.
      strides: step of the window, one number or (vertical, horizontal).
      padding: ``"SAME"``, ``"VALID"`` or ((top, bottom), (left, right)).
      method: ``"direct"`` is ``lax.conv_general_dilated`` as JAX differentiates it.
        ``"canonical"`` gives the same values and gradients, with each gradient written as
        another NHWC convolution, and a vmap over kernels run one after the other; it has no
        forward-mode derivative (``jax.jvp``). None means canonical on
        a CPU and direct elsewhere.
    Returns:
      images [B, H', W', O].
    Raises:
      ValueError: shapes, strides, padding or method that do not fit.
      TypeError: dtypes that differ.
    """
    method = method or ("canonical" if jax.default_backend() == "cpu" else "direct")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; choose one of {METHODS}, or None for the default.")
    if x.ndim != 4 or kernel.ndim != 4:
        raise ValueError(
            f"conv2d takes images [B, H, W, C] and a kernel [height, width, C, O], "
            f"not shapes {x.shape} and {kernel.shape}; vmap over further axes."
        )
    if x.shape[3] != kernel.shape[2]:
        raise ValueError(
            f"Images {x.shape} have {x.shape[3]} channels, but kernel {kernel.shape} reads "
            f"{kernel.shape[2]}; grouped convolution is not supported here, "
            "use jax.lax.conv_general_dilated with feature_group_count."
        )
    if x.dtype != kernel.dtype:
        raise TypeError(f"Images are {x.dtype}, the kernel is {kernel.dtype}; cast one of them.")
    steps = (strides, strides) if isinstance(strides, int) else tuple(strides)
    if len(steps) != 2 or min(steps) < 1:
        raise ValueError(f"strides are {strides!r}; give a positive number or two of them.")
    window = _Window(steps, _pads(padding, x.shape, kernel.shape, steps), (1, 1), (1, 1))
    if method == "direct":
        return _apply(x, kernel, window)
    return _canonical(*_varying_alike(x, kernel), window)


def max_pool(x: Array, size: int) -> Array:
    """Returns the largest value of each size x size block of images; a ragged edge is dropped.

    Written as a reshape and a maximum: with ``lax.reduce_window``, whose gradient scatters, the
    whole step above takes a quarter longer on a CPU. Equal maxima share the gradient.

    Returns:
      images [B, H // size, W // size, C].
    Raises:
      ValueError: `x` is not [B, H, W, C], or is smaller than one block.
    """
    if x.ndim != 4 or not 0 < size <= min(x.shape[1:3]):
        raise ValueError(f"max_pool takes images [B, H, W, C] of at least {size=}, not {x.shape}.")
    batch, height, width, channels = x.shape
    high, wide = height // size, width // size
    blocks = x[:, : high * size, : wide * size].reshape(batch, high, size, wide, size, channels)
    return blocks.max((2, 4))


def _pads(
    padding: str | Sequence[tuple[int, int]],
    x_shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> _Pads:
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"padding is {padding!r}; give 'SAME', 'VALID' or pairs of numbers.")
        return tuple(lax.padtype_to_pads(x_shape[1:3], kernel_shape[:2], strides, padding))
    pads = tuple((int(low), int(high)) for low, high in padding)
    if len(pads) != 2:
        raise ValueError(f"padding is {padding!r}; give ((top, bottom), (left, right)).")
    return pads


def _varying_alike(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Makes arguments vary over the same mesh axes, as derivatives in `shard_map` require."""
    has = [jax.typeof(a).manual_axis_type.varying for a in (x, kernel)]
    return tuple(
        lax.pcast(a, tuple((has[0] | has[1]) - own), to="varying")
        for a, own in zip((x, kernel), has, strict=True)
    )


def _apply(x: Array, kernel: Array, window: _Window) -> Array:
    return lax.conv_general_dilated(x, kernel, *window, dimension_numbers=_NHWC)


def _roomy(x: Array, window: _Window) -> tuple[Array, _Window]:
    """Returns the same convolution with the padding moved into the images."""
    pads = [
        (*pad, dilation - 1)
        for pad, dilation in zip(window.padding, window.input_dilation, strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *pads, (0, 0, 0)))
    # Else XLA takes the padding back into the convolution.
    x = lax.optimization_barrier(x)
    return x, window._replace(padding=((0, 0), (0, 0)), input_dilation=(1, 1))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _canonical(x: Array, kernel: Array, window: _Window) -> Array:
    return _one_kernel_at_a_time(x, kernel, window)


def _forward(x, kernel, window):
    return _canonical(x, kernel, window), (x, kernel)  # itself, so that this too has a gradient


def _backward(window, residuals, dy):
    """Returns both gradients as `_canonical` convolutions, so gradients of any order exist.

    Along one dimension, with stride s, dilations l of the input and r of the kernel, padding p:
    ``y[o] = sum x[i] kernel[k]`` over ``o*s + k*r - p == i*l``. Solved for i (and the kernel
    turned round) and for k, that equation is again one of a convolution.
    """
    x, kernel = residuals
    size, taps, out = x.shape[1:3], kernel.shape[:2], dy.shape[1:3]
    before = [low for low, _ in window.padding]
    turned = [
        (k - 1) * r - low for k, r, low in zip(taps, window.kernel_dilation, before, strict=True)
    ]
    input_dilation, kernel_dilation = window.input_dilation, window.kernel_dilation
    to_x = _fit(out, taps, size, input_dilation, turned, window.strides, kernel_dilation)
    to_kernel = _fit(size, out, taps, kernel_dilation, before, input_dilation, window.strides)
    dx = _canonical(dy, lax.rev(kernel, (0, 1)).swapaxes(2, 3), to_x)
    dkernel = _canonical(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), to_kernel)
    return dx, dkernel.transpose(1, 2, 0, 3)


_canonical.defvjp(_forward, _backward)


def _fit(
    size: Sequence[int],
    taps: Sequence[int],
    out: Sequence[int],
    strides: tuple[int, ...],
    before: Sequence[int],
    input_dilation: tuple[int, ...],
    kernel_dilation: tuple[int, ...],
) -> _Window:
    """Returns the window with padding `before` whose result is exactly `out` long."""
    given = ((n - 1) * dilation + 1 for n, dilation in zip(size, input_dilation, strict=True))
    reach = ((k - 1) * dilation + 1 for k, dilation in zip(taps, kernel_dilation, strict=True))
    padding = tuple(
        (low, (o - 1) * s + r - g - low)
        for low, o, s, r, g in zip(before, out, strides, reach, given, strict=True)
    )
    return _Window(strides, padding, input_dilation, kernel_dilation)


def _one_kernel_at_a_time(x: Array, kernel: Array, window: _Window) -> Array:
    """Runs `_apply`, as a loop under vmap: on a CPU a grouped convolution is 3 times slower."""

    if math.prod(kernel.shape[:2]) > math.prod(x.shape[1:3]):
        x, window = _roomy(x, window)

    @custom_vmap
    def conv(x, kernel):
        return _apply(x, kernel, window)

    @conv.def_vmap
    def batched(size, is_batched, x, kernel):
        if is_batched[1]:
            if is_batched[0]:
                return lax.map(lambda pair: conv(*pair), (x, kernel)), True
            return lax.map(lambda one: conv(x, one), kernel), True
        batch = x.shape[1]
        y = conv(x.reshape(size * batch, *x.shape[2:]), kernel)
        return y.reshape(size, batch, *y.shape[1:]), True

    return conv(x, kernel)
