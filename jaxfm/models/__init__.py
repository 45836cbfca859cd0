"""Model families: causal decoders, encoders, vision transformers and convolutional networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxfm.model import Model
from jaxfm.models.cnn import CnnConfig
from jaxfm.models.cnn import cnn as _cnn
from jaxfm.models.decoder import DecoderConfig
from jaxfm.models.decoder import decoder as _decoder
from jaxfm.models.encoder import EncoderConfig
from jaxfm.models.encoder import encoder as _encoder
from jaxfm.models.mobilenet import MobileNetConfig, mobilenet_config
from jaxfm.models.mobilenet import mobilenet as _mobilenet
from jaxfm.models.resnet import ResNetConfig, resnet_config
from jaxfm.models.resnet import resnet as _resnet
from jaxfm.models.shufflenet import ShuffleNetConfig, shufflenet_config
from jaxfm.models.shufflenet import shufflenet as _shufflenet
from jaxfm.models.vgg import VggConfig, vgg_config
from jaxfm.models.vgg import vgg as _vgg
from jaxfm.models.vit import VitConfig
from jaxfm.models.vit import vit as _vit

__all__ = [
    "CnnConfig",
    "DecoderConfig",
    "EncoderConfig",
    "MobileNetConfig",
    "ResNetConfig",
    "ShuffleNetConfig",
    "VggConfig",
    "VitConfig",
    "build",
    "mobilenet_config",
    "resnet_config",
    "shufflenet_config",
    "vgg_config",
]

VisionConfig = ResNetConfig | VggConfig | MobileNetConfig | ShuffleNetConfig
Config = DecoderConfig | EncoderConfig | VitConfig | CnnConfig | VisionConfig


def build(config: Config) -> Model:
    """The model of a config, of whichever family.

    Raises:
      TypeError: not a config of one of our families.
    """
    for kind, factory in _FAMILIES.items():
        if isinstance(config, kind):
            return factory(config)
    names = ", ".join(kind.__name__ for kind in _FAMILIES)
    raise TypeError(f"Expected one of {names}; got {type(config).__name__}.")


_FAMILIES: dict[type, Callable[[Any], Model]] = {
    DecoderConfig: _decoder,
    EncoderConfig: _encoder,
    VitConfig: _vit,
    CnnConfig: _cnn,
    ResNetConfig: _resnet,
    VggConfig: _vgg,
    MobileNetConfig: _mobilenet,
    ShuffleNetConfig: _shufflenet,
}
