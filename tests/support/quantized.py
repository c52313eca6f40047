"""The tiny pixel UNet quantized without a calibration, and a pickle that must not be run."""

import os

import torch
from torch import nn

from ddim.family import PIXEL, unet_config_dict
from ddim.unet import UNet
from qdiff.config import QuantConfig
from qdiff.model import act_quantizers, enable_activations, init_weights, quantize_model
from tests.support import tiny

UNET_CONFIG = unet_config_dict(tiny.MODEL)
X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([10.0, 800.0])


def quantized(**settings: object) -> tuple[UNet, nn.Module, QuantConfig]:
    """(network, quantized network, settings): nearest rounding, random activation scales."""
    quant = QuantConfig(**{"weight_bit": 4, "quant_act": True, "a_sym": True, "split": True} | settings)
    unet = tiny.unet()
    model = quantize_model(unet, PIXEL, quant)
    init_weights(model, quant.weight_scale_method)
    torch.manual_seed(3)
    for quantizer in act_quantizers(model).values():
        zero = torch.tensor(0.0 if quant.a_sym else float(torch.randint(1, 200, ())))
        quantizer.set_qparams(torch.rand(()) * 0.02 + 0.01, zero)
    enable_activations(model, True)
    return unet, model, quant


class Payload:
    """An object whose pickle runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return (os.system, (self.command,))
