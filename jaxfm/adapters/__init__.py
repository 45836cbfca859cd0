"""Adapters: models around a model, of which only a few parameters are trained."""

from jaxfm.adapters.adapter import Adapter, adapter_of, attach, detach, merge
from jaxfm.adapters.backbone import QuantizedConfig, quantized
from jaxfm.adapters.houlsby import BottleneckConfig, bottleneck
from jaxfm.adapters.low_rank import LowRankConfig, dora, lora, pairs
from jaxfm.adapters.parts import PartsConfig, bitfit, head_only, only
from jaxfm.adapters.pool import PoolConfig, prompt_pool
from jaxfm.adapters.prompts import (
    PrefixConfig,
    PromptConfig,
    num_virtual,
    prefix_tuning,
    read_prompts,
    settled,
    soft_prompt,
)
from jaxfm.adapters.serving import (
    for_requests,
    prompts_for_requests,
    prompts_together,
    together,
)
from jaxfm.adapters.targets import PRESETS, choose

__all__ = [
    "PRESETS",
    "Adapter",
    "BottleneckConfig",
    "LowRankConfig",
    "PartsConfig",
    "PoolConfig",
    "PrefixConfig",
    "PromptConfig",
    "QuantizedConfig",
    "adapter_of",
    "attach",
    "bitfit",
    "bottleneck",
    "choose",
    "detach",
    "dora",
    "for_requests",
    "head_only",
    "lora",
    "merge",
    "num_virtual",
    "only",
    "pairs",
    "prefix_tuning",
    "prompt_pool",
    "prompts_for_requests",
    "prompts_together",
    "quantized",
    "read_prompts",
    "settled",
    "soft_prompt",
    "together",
]
