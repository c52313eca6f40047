"""Quantized layers, products and tiny networks for the tests of the engines."""


import torch
from torch import nn

from ddim.family import PIXEL
from ldm.config import load_config
from ldm.family import LATENT
from ldm.unet import UNetModel
from qdiff import quantizers as Q
from qdiff.calibration.dataset import Rows
from qdiff.config import QuantConfig
from qdiff.integer import engine
from qdiff.model import Product
from tests.support import golden, tiny, tiny_latent

LINEAR = QuantConfig(weight_bit=4, quant_act=True, a_sym=True, split=True, quant_mode="linear")
SATURATES = engine.unavailable()  # why 8-bit products are wrong on this processor; None where they are right


def quantized_layer(layer: nn.Module, kind: type, bits: int, symmetric: bool, method: str, x: torch.Tensor, split: int = 0):
    quantized = kind(layer, bits, 8, symmetric, split).requires_grad_(False)
    quantized.init_weight_scales(method)
    for quantizer, part in zip(quantized.act_quantizers, quantized._parts(x), strict=True):
        quantizer.set_scale(*Q.find_scale(part, 8, symmetric=symmetric, method=method))
        quantizer.enabled = True
    return quantized


def attention_product(symmetric: bool, sm_abit: int):
    config = QuantConfig(quant_act=True, a_sym=symmetric, sm_abit=sm_abit)
    return Product(("w", "v"), softmax="w", always_zero=True, follows_a_sym=False).build(config, None)


def check(layer, x, tolerance=1e-6):
    """The integer layer against the simulation in float64."""
    found = engine._INTEGER[type(layer)](layer)(x)
    expected = copy.deepcopy(layer).double()(x.double())
    assert golden.relative_error(found.double() + 0, expected) < tolerance


def network_of(kind, folder):
    """A tiny network of each family: (network, family, rows)."""
    if kind == "pixel":
        network = tiny.unet()
        return network, PIXEL, tiny.rows(network)
    torch.manual_seed(0)
    config = load_config(tiny_latent.model_folder(folder / kind, kind) / "config.yaml")
    unet = UNetModel(config.unet).eval().requires_grad_(False)
    inputs = [torch.randn(32, 4, 8, 8), torch.linspace(0, 999, 32)]
    if kind == "text":
        inputs.append(torch.randn(32, 8, 16))
    return unet, LATENT, Rows(tuple(inputs))
