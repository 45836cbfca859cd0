"""LoRA and DoRA in PEFT's folders, written: the way back of `jaxfm.hub.peft`.

Columns of A and rows of B that are zero at the end are left out, module by module, and modules
that have nothing else: a folder that is loaded and saved has the ranks that it had.

Where q, k and v are one module of the file (GPT-2) and their A differ, A is the three of them
stacked and B has blocks, so that the rank is their sum; a part without an adapter has zeros. PEFT
trains modules as a whole, so that parameters beside trained ones are written, too.
"""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxfm.adapters import LowRankConfig, adapter_of
from jaxfm.adapters.adapter import fetch
from jaxfm.hub import config as hub_config
from jaxfm.hub import folders
from jaxfm.hub.peft import (
    PREFIX,
    Factors,
    Modules,
    Part,
    family_of,
    is_tied,
    leaves_of,
    modules_of,
    require_tied,
    require_whole,
)
from jaxfm.hub.peft_config import divisor, patterns, spelled
from jaxfm.kernels import whole
from jaxfm.model import Model, Variables
from jaxfm.trees import split_tree


def fields_and_tensors(
    model: Model, variables: Variables, base: str | os.PathLike
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns adapter_config.json and the tensors of a folder; see `jaxfm.hub.save_adapter`."""
    adapter = adapter_of(model)
    config, root = adapter.config, adapter.root
    leaves = leaves_of(adapter.base, adapter.detach(variables))
    require_whole(root, leaves)
    modules = modules_of(root, leaves)
    factors = _by_module(modules, variables, leaves, config)
    names = {name.rpartition(".")[0] for name in modules.tensors}
    own = split_tree(variables.params, lambda path: config.kind in path)[0]
    trained = set(flatten_dict(own, sep="."))
    saved, biases = _trained_modules(modules, trained, factors)
    is_tie = is_tied(root) and "embed.tokens.table" in trained
    if is_tie:
        require_tied(root, ensured=True)
    tensors = _factor_tensors(factors) | _model_tensors(modules, leaves, factors, saved, biases)
    if is_tie:  # PEFT asks for both
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    ranks = {name: f.a.shape[1] for name, f in factors.items()}
    alphas = {
        name: _plain(f.scale * divisor(ranks[name], config.rank_stabilized))
        for name, f in factors.items()
    }
    rank, alpha = _commonest(ranks), _commonest(alphas)
    fields = _base_fields(root, base) | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": patterns(ranks, rank),
        "alpha_pattern": patterns(alphas, alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilized,
        "use_dora": config.kind == "dora",
        "target_modules": spelled(factors, names),
        "modules_to_save": sorted(saved) or None,
        "bias": biases,
    }
    if is_tie:
        fields["ensure_weight_tying"] = True
    return fields, {f"{PREFIX}{name}": x for name, x in tensors.items()}


def _factor_tensors(factors: Mapping[str, Factors]) -> dict[str, np.ndarray]:
    """The tensors of the adapters."""
    tensors = {}
    for name, f in factors.items():
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(f.a.T)
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(f.b.T)
        if f.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = f.magnitude
    return tensors


def _model_tensors(
    modules: Modules,
    leaves: Mapping[str, Any],
    factors: Mapping[str, Factors],
    saved: set[str],
    biases: str,
) -> dict[str, np.ndarray]:
    """The tensors of the model itself: those of saved modules, and biases."""
    tensors = {}
    for name, some in modules.tensors.items():
        module, _, end = name.rpartition(".")
        is_bias = end == "bias" and (
            biases == "all" or (biases == "lora_only" and module in factors)
        )
        if module in saved or is_bias:
            value = folders.in_file(some, {p.path: np.asarray(leaves[p.path]) for p in some})
            key = f"{module}.base_layer.{end}" if module in factors else name
            tensors[key] = np.ascontiguousarray(value)
    return tensors


def _base_fields(root: Model, base: str | os.PathLike) -> dict[str, Any]:
    """What the file says of the base."""
    family, head = family_of(root), getattr(root.config, "head", "contrastive")
    architecture = hub_config.architecture_of(family, "pooler" if head == "none" else head)
    return {
        "base_model_name_or_path": os.fspath(base) or None,
        "auto_mapping": {
            "base_model_class": architecture,
            "parent_library": f"transformers.models.{family}.modeling_{family}",
        },
        "task_type": "CAUSAL_LM" if head == "causal" else None,
        "fan_in_fan_out": family == "gpt2",
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _by_module(
    modules: Modules, variables: Variables, leaves: Mapping[str, Any], config: LowRankConfig
) -> dict[str, Factors]:
    """The adapter of each linear module that has one, as matrices."""
    trees = {
        site: jax.tree.map(np.asarray, fetch(variables.params, (*site.split("."), config.kind)))
        for site in config.targets
    }
    known = {part.site for parts in modules.linear.values() for part in parts}
    for site in trees.keys() - known:
        raise ValueError(f"PEFT has no adapter of {site}, which is no linear map there.")

    def norms(part: Part) -> np.ndarray:
        kernel = np.asarray(whole(leaves[f"{part.site}.kernel"])).astype(np.float32)
        kernel = kernel if part.layer is None else kernel[part.layer]
        return np.linalg.norm(kernel.reshape(math.prod(part.inputs), -1), axis=0)

    found = {
        name: _joined(parts, trees, config, norms)
        for name, parts in modules.linear.items()
        if any(part.site in trees for part in parts)
    }
    used = {name: f for name, f in found.items() if f.a.shape[1]}
    return used or {name: _padded(f) for name, f in found.items()}


def _joined(
    parts: tuple[Part, ...],
    trees: Mapping[str, Mapping[str, np.ndarray]],
    config: LowRankConfig,
    norms: Callable[[Part], np.ndarray],
) -> Factors:
    """The adapter of a module, of those of its parts."""
    given = [_matrices(trees[p.site], p, config) if p.site in trees else None for p in parts]
    used = [f for f in given if f is not None and f.a.shape[1]]
    first = used[0] if used else next(f for f in given if f is not None)
    shared = all(np.array_equal(f.a, first.a) for f in used)
    a = first.a if shared else np.concatenate([f.a for f in used], axis=1)
    columns, row = [], 0
    for part, f in zip(parts, given, strict=True):
        b = np.zeros((a.shape[1], math.prod(part.outputs)), a.dtype)
        if f is not None and f.a.shape[1]:
            own = f.b if f.scale == first.scale else f.b * np.float32(f.scale / first.scale)
            b[row : row + own.shape[0]] = own
            row += 0 if shared else own.shape[0]
        columns.append(b)
    joined = Factors(a, np.concatenate(columns, axis=1), None, first.scale)
    if config.kind != "dora":
        return joined
    magnitudes = [
        norms(part) if f is None or f.magnitude is None else f.magnitude
        for part, f in zip(parts, given, strict=True)
    ]
    return _padded(joined._replace(magnitude=np.concatenate(magnitudes).astype(a.dtype)))


def _matrices(tree: Mapping[str, np.ndarray], part: Part, config: LowRankConfig) -> Factors:
    """A [in, r], B [r, out] and norms [out] of one layer, without zeros at the end of the rank."""
    own = {name: x if part.layer is None else x[part.layer] for name, x in tree.items()}
    rank = own["a"].shape[-1]
    a, b = own["a"].reshape(-1, rank), own["b"].reshape(rank, -1)
    used = np.flatnonzero((a != 0).any(0) | (b != 0).any(1))
    kept = used[-1] + 1 if used.size else 0
    norms = own["magnitude"].reshape(-1) if "magnitude" in own else None
    return Factors(a[:, :kept], b[:kept], norms, config.scale(rank))


def _padded(f: Factors) -> Factors:
    """An adapter of rank 1 at least, which PEFT asks for."""
    missing = max(0, 1 - f.a.shape[1])
    a, b = np.pad(f.a, ((0, 0), (0, missing))), np.pad(f.b, ((0, missing), (0, 0)))
    return f._replace(a=a, b=b)


def _trained_modules(
    modules: Modules, trained: set[str], factors: Mapping[str, Factors]
) -> tuple[set[str], str]:
    """Which modules are trained as a whole, and which biases: none, lora_only or all."""
    module_of = lambda name: name.rpartition(".")[0]
    names = [name for name, some in modules.tensors.items() if any(p.path in trained for p in some)]
    saved = {module_of(name) for name in names if not name.endswith(".bias")}
    for name in sorted(saved & factors.keys()):
        raise ValueError(
            f"The kernel of {name} is trained beside its adapter, for which PEFT has no form; "
            "merge the adapter, and save the model."
        )
    for name in sorted(saved):
        if any(module_of(other).startswith(f"{name}.") for other in modules.tensors):
            raise ValueError(
                f"A parameter of {name} is trained, but not the modules in it; PEFT trains modules "
                "as a whole. Merge the adapter, and save the model."
            )
    loose = {name for name in names if name.endswith(".bias") and module_of(name) not in saved}
    if not loose:
        return saved, "none"
    return saved, "lora_only" if {module_of(name) for name in loose} <= factors.keys() else "all"


def _commonest(values: Mapping[str, Any]) -> Any:
    return collections.Counter(values.values()).most_common(1)[0][0]


def _plain(number: float) -> float:
    """Without the last digits, which are those of a product; whole numbers as such."""
    number = float(f"{number:.12g}")
    return int(number) if number.is_integer() else number
