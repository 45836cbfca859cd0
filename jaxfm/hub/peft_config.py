"""adapter_config.json of PEFT, for its LoRA and DoRA: its fields, and how modules are named in it.

Every field that changes what is computed is read or refused by name. Which modules are meant, and
with which rank and alpha, follows PEFT's own rules (`peft.tuners.tuners_utils` of version 0.21).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

ALL_LINEAR = "all-linear"
_HEADS = ("score", "classifier")  # which "all-linear" leaves out of a SEQ_CLS model

_is_number = lambda x: type(x) in (int, float) and math.isfinite(x)
_is_texts = lambda x: isinstance(x, list) and all(type(text) is str for text in x)
_is_counts = lambda x: isinstance(x, list) and all(type(count) is int for count in x)
_is_table = lambda x, is_value: isinstance(x, dict) and all(map(is_value, x.values()))

# What the value of a field may be, in words and as a test.
KINDS: dict[str, Callable[[Any], bool]] = {
    "a whole number above 0": lambda x: type(x) is int and x > 0,
    "a finite number": _is_number,
    "true or false": lambda x: type(x) is bool,
    "a text": lambda x: type(x) is str,
    "a list of texts": _is_texts,
    "a text or a list of texts": lambda x: type(x) is str or _is_texts(x),
    "a whole number": lambda x: type(x) is int,
    "a whole number or a list of them": lambda x: type(x) is int or _is_counts(x),
    "a text or a list of whole numbers": lambda x: type(x) is str or _is_counts(x),
    "an object with whole numbers above 0": lambda x: _is_table(x, KINDS["a whole number above 0"]),
    "an object with finite numbers": lambda x: _is_table(x, _is_number),
}

# Fields that change nothing in what is computed.
_NEUTRAL = frozenset({
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config", "init_lora_weights", "eva_config", "fan_in_fan_out",
})  # fmt: skip
# Ways of drawing A and B that leave the base as it is.
_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def field(kind: str, default: Any) -> Any:
    """A field of a config that a file may hold, with the name of its kind in `KINDS`."""
    return dataclasses.field(default=default, metadata={"kind": kind})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraFields:
    """The fields of PEFT's LoraConfig that are read, under their own names."""

    r: int = field("a whole number above 0", 8)
    lora_alpha: float = field("a finite number", 8)
    lora_dropout: float = field("a finite number", 0.0)
    use_rslora: bool = field("true or false", False)
    use_dora: bool = field("true or false", False)
    bias: str = field("a text", "none")
    target_modules: Any = field("a text or a list of texts", None)
    exclude_modules: Any = field("a text or a list of texts", None)
    modules_to_save: Any = field("a list of texts", None)
    rank_pattern: Any = field("an object with whole numbers above 0", None)
    alpha_pattern: Any = field("an object with finite numbers", None)
    layers_to_transform: Any = field("a whole number or a list of them", None)
    layers_pattern: Any = field("a text or a list of texts", None)
    task_type: Any = field("a text", None)
    ensure_weight_tying: bool = field("true or false", False)

    def rank(self, module: str) -> int:
        """r of a module."""
        return _by_pattern(self.rank_pattern or {}, module, self.r)

    def alpha(self, module: str) -> float:
        """The numerator of a module's scale."""
        return _by_pattern(self.alpha_pattern or {}, module, self.lora_alpha)

    def scale(self, module: str) -> float:
        """The factor on B A of a module."""
        return self.alpha(module) / divisor(self.rank(module), self.use_rslora)

    def is_saved(self, module: str) -> bool:
        """Whether a module is one of those that are trained and saved whole, or a part of one."""
        saved = self.modules_to_save or ()
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved)

    def is_target(self, module: str) -> bool:
        """Whether a linear module has an adapter."""
        if _is_named(self.exclude_modules or (), module) or self.is_saved(module):
            return False
        targets = self.target_modules
        if isinstance(targets, str):
            if targets.lower() != ALL_LINEAR:
                return re.fullmatch(targets, module) is not None
            is_head = self.task_type == "SEQ_CLS" and module in _HEADS
            return module != "lm_head" and not is_head
        if module in targets:
            return True
        layers = self.layers_to_transform
        return _is_named(targets, module) and (layers in (None, []) or self._has_layer(module))

    def _has_layer(self, module: str) -> bool:
        patterns = _listed(self.layers_pattern) or [r"[^.]*"]
        start = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
        found = (re.match(rf"{start}{name}\.(\d+)\.", module) for name in patterns)
        number = next((int(match[1]) for match in found if match), None)
        return number in _listed(self.layers_to_transform)


def read_lora(raw: Mapping[str, Any], where: object) -> LoraFields:
    """Returns the fields of an adapter_config.json of type LORA.

    Args:
      raw: what the file holds.
      where: the file, for messages.
    Raises:
      ValueError: a field of a wrong type, or one that has another effect than those of
        `LoraFields`.
    """
    values = checked(LoraFields, raw, where)
    unknown = raw.keys() - values.keys() - _NEUTRAL
    for name in sorted(unknown):
        # Numbers and texts belong to something that is switched on elsewhere.
        if raw[name] is True or (isinstance(raw[name], list | dict) and raw[name]):
            raise ValueError(f"{where} sets {name}={raw[name]!r}, which is not supported here.")
    drawn = raw.get("init_lora_weights", True)
    if not any(drawn is known or drawn == known for known in _KEEPS_BASE):
        raise ValueError(
            f"{where} says init_lora_weights={drawn!r}: its base is not the published model but "
            "what was left of it; have PEFT convert the adapter when it saves it "
            "(path_initial_model_for_weight_conversion)."
        )
    fields = LoraFields(**{name: x for name, x in values.items() if x is not None})
    if not fields.target_modules:
        raise ValueError(f"{where} names no target_modules.")
    if fields.bias not in ("none", "all", "lora_only"):
        raise ValueError(f"{where} has bias={fields.bias!r}; it is none, all or lora_only.")
    _check_patterns(fields, where)
    return fields


def checked(cls: type, raw: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Returns the values in `raw` of the fields of a config, each of its kind or None.

    Raises:
      ValueError: a value of another kind.
    """
    values = {}
    for own in dataclasses.fields(cls):
        value = raw.get(own.name)
        kind = own.metadata["kind"]
        if value is not None and not KINDS[kind](value):
            raise ValueError(f"{where} has {own.name}={value!r}; it should be {kind}.")
        values[own.name] = value
    return values


def divisor(rank: int, rank_stabilized: bool) -> float:
    """What alpha is divided by."""
    return math.sqrt(rank) if rank_stabilized else rank


def spelled(chosen: Collection[str], among: Iterable[str]) -> list[str]:
    """Returns the shortest ends of names that mean these modules and no others.

    Args:
      chosen: names of modules.
      among: names of all modules.
    """
    among = list(among)
    kinds: dict[str, list[str]] = {}
    for name in among:
        kinds.setdefault(re.sub(r"(^|\.)\d+\.", r"\1{}.", name), []).append(name)
    out = []
    for kind, names in kinds.items():
        own = [name for name in names if name in chosen]
        words = kind.rpartition("{}.")[2].split(".") if len(own) == len(names) else []
        ends = [".".join(words[-count:]) for count in range(1, len(words) + 1)]
        means_own = lambda end: all(name in chosen for name in among if _is_named([end], name))
        end = next(filter(means_own, ends), None)
        out += own if end is None else [end]
    return sorted(set(out))


def patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Returns `rank_pattern` or `alpha_pattern`: modules by value, but for the `default`."""
    out: dict[str, Any] = {}
    for value in sorted(set(values.values()) - {default}):
        own = {name for name, x in values.items() if x == value}
        out |= dict.fromkeys(spelled(own, values), value)
    return out


def _by_pattern(by_pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in by_pattern.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_named(names: str | Iterable[str], module: str) -> bool:
    """Whether a module is one of these names or ends with one; or matches, if it is a pattern."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def _check_patterns(fields: LoraFields, where: object) -> None:
    """Raises ValueError where a text that PEFT reads as a regular expression is none."""
    texts = [x for x in (fields.target_modules, fields.exclude_modules) if isinstance(x, str)]
    texts += [*(fields.rank_pattern or ()), *(fields.alpha_pattern or ())]
    texts += [*(fields.modules_to_save or ()), *_listed(fields.layers_pattern)]
    for text in texts:
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"{where} has {text!r}, which is no pattern: {error}.") from None
