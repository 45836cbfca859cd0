"""Part 0: what is there, and the two ceilings, bytes and operations a second."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from accelerator_parts.frame import Case, Figures, Part, Setting, digits


def chained_seconds(step, x: Any, calls: int) -> float:
    """Seconds of `x = step(x)`, the mean of `calls` calls that the host does not wait between."""
    x = jax.block_until_ready(step(step(x)))
    began = time.perf_counter()
    for _ in range(calls):
        x = step(x)
    jax.block_until_ready(x)
    return (time.perf_counter() - began) / calls


def copy_bytes_per_s(num_bytes: int, calls: int = 20) -> float:
    """Bytes read plus bytes written a second by a pass over an array of random numbers."""
    x = jax.random.normal(jax.random.key(0), (num_bytes // 4,), jnp.float32)
    return 2 * x.nbytes / chained_seconds(jax.jit(jnp.negative, donate_argnums=0), x, calls)


def read_bytes_per_s(num_bytes: int, calls: int = 20) -> float:
    """Bytes read a second by summing an array of random numbers."""
    x = jax.random.normal(jax.random.key(0), (num_bytes // 4,), jnp.float32)
    total = jax.jit(lambda x, last: x.sum() + 0 * last)
    return x.nbytes / chained_seconds(lambda last: total(x, last), jnp.float32(0), calls)


def matmul_flops(size: int, dtype: str, precision: str | None = None, calls: int = 20) -> float:
    """Operations a second of products of square matrices of random numbers."""
    x, w = (jax.random.normal(key, (size, size)) for key in jax.random.split(jax.random.key(0)))
    x, w = x.astype(dtype), (w / size**0.5).astype(dtype)
    step = jax.jit(lambda x, w: jnp.matmul(x, w, precision=precision))
    return 2 * size**3 / chained_seconds(lambda x: step(x, w), x, calls)


def memory_bandwidth(num_bytes: int) -> float:
    """Bytes a second that decoding is held against: the better of copying and summing."""
    return max(copy_bytes_per_s(num_bytes), read_bytes_per_s(num_bytes))


def cases(setting: Setting) -> dict[str, Case]:
    size = 256 if setting.dry else 8192
    num_bytes = 2**24 if setting.dry else 2**31

    def machine(done, note) -> Figures:
        first = jax.devices()[0]
        memory = first.memory_stats() or {}
        return {
            "devices": [device.device_kind for device in jax.devices()],
            "platform": first.platform,
            "platform_version": getattr(first.client, "platform_version", "").splitlines()[:1],
            "memory_gb": digits(memory.get("bytes_limit", 0) / 1e9),
        }

    def copies(done, note) -> Figures:
        return {
            "copy_gb_per_s": digits(copy_bytes_per_s(num_bytes) / 1e9),
            "read_gb_per_s": digits(read_bytes_per_s(num_bytes) / 1e9),
        }

    def products(done, note) -> Figures:
        rate = lambda *kind: digits(matmul_flops(size, *kind) / 1e12)
        return {
            "bfloat16_tflops": rate("bfloat16"),
            "float32_tflops": rate("float32"),
            "float32_highest_tflops": rate("float32", "highest"),
        }

    return {"machine": Case(machine), "copies": Case(copies), "products": Case(products)}


def ratio(figures: dict[str, Figures]) -> float | None:
    """Floating-point operations of a bfloat16 product in the time that copying a byte takes."""
    both = figures.get("products", {}), figures.get("copies", {})
    if not all(both):
        return None
    return 1e3 * both[0]["bfloat16_tflops"] / both[1]["copy_gb_per_s"]


PART = Part("part0_ceilings", cases, ratio, "bf16 operations per byte copied")
