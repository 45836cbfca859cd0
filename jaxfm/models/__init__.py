"""Model families: causal decoders, encoders, vision transformers and convolutional networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxfm.model import Model
from jaxfm.models.families.clip import ClipConfig, Tower, clip, zero_shot
from jaxfm.models.families.cnn import CnnConfig, MlpConfig, cnn, mlp
from jaxfm.models.families.code_encoder import CodeEncoderConfig, code_encoder
from jaxfm.models.families.decoder import DecoderConfig, decoder, gpt2_config
from jaxfm.models.families.encoder import EncoderConfig, encoder
from jaxfm.models.families.mobilenet import MobileNetConfig, mobilenet, mobilenet_config
from jaxfm.models.families.resnet import ResNetConfig, resnet, resnet_config
from jaxfm.models.families.shufflenet import ShuffleNetConfig, shufflenet, shufflenet_config
from jaxfm.models.families.vgg import VggConfig, vgg, vgg_config
from jaxfm.models.families.vit import VitConfig, vit

__all__ = [
    "ClipConfig",
    "CnnConfig",
    "CodeEncoderConfig",
    "DecoderConfig",
    "EncoderConfig",
    "MlpConfig",
    "MobileNetConfig",
    "ResNetConfig",
    "ShuffleNetConfig",
    "Tower",
    "VggConfig",
    "VitConfig",
    "build",
    "clip",
    "cnn",
    "code_encoder",
    "decoder",
    "encoder",
    "gpt2_config",
    "mlp",
    "mobilenet",
    "mobilenet_config",
    "resnet",
    "resnet_config",
    "shufflenet",
    "shufflenet_config",
    "vgg",
    "vgg_config",
    "vit",
    "zero_shot",
]

VisionConfig = ResNetConfig | VggConfig | MobileNetConfig | ShuffleNetConfig
TextConfig = DecoderConfig | EncoderConfig | CodeEncoderConfig
Config = TextConfig | VitConfig | ClipConfig | CnnConfig | MlpConfig | VisionConfig


def build(config: Config) -> Model:
    """Returns the model of a config of any family.

    Raises:
      TypeError: not a config of one of our families.
    """
    for kind, factory in _FAMILIES.items():
        if isinstance(config, kind):
            return factory(config)
    names = ", ".join(kind.__name__ for kind in _FAMILIES)
    raise TypeError(f"Expected one of {names}; got {type(config).__name__}.")


_FAMILIES: dict[type, Callable[[Any], Model]] = {
    DecoderConfig: decoder,
    EncoderConfig: encoder,
    CodeEncoderConfig: code_encoder,
    VitConfig: vit,
    ClipConfig: clip,
    CnnConfig: cnn,
    MlpConfig: lambda config: mlp(config.sizes),
    ResNetConfig: resnet,
    VggConfig: vgg,
    MobileNetConfig: mobilenet,
    ShuffleNetConfig: shufflenet,
}
