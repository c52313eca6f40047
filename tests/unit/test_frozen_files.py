"""Files of an earlier version, which every later version must read bit for bit. They are never regenerated.

The folder `frozen` holds one network of the pixel family in both formats, with what the version that wrote it
said about it:

    tiny_w4a8.safetensors   the packed format
    tiny_w4a8.pth           the published format
    expected.safetensors    the stored state and the outputs

The version of commit 7e19632 wrote them once. The network was `tests.support.tiny.unet(0)` with 4 channels,
one resolution of 8x8, one residual block, norms of 2 groups, and attention in the middle only (2,947
parameters). Its weights have 4 bits by the rule `mse`, its activations have 8 bits, are symmetric by the rule
`max`, and the shortcuts are split. The calibration set had 4 time steps with 16 samples each; rounding was
learned for 40 iterations at a learning rate of 0.03, activation scales for 10 at 0.001. So biases are
corrected, and 442 of the integers are not those of nearest rounding.

`expected.safetensors` was filled from the network in memory, before either file was read again. It holds for
each layer the integers (uint8), scales, and zero points, by the names of the modules; each parameter that
is not quantized; the inputs `x` [2, 3, 8, 8] and `t` [2]; and the outputs `y` (weights and activations
quantized) and `y_weights_only`, with everything cast to float64.

When a test in this file fails, users' files are read wrongly: the code has to change, not the files.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ddim.family import PIXEL
from qdiff.checkpoint import PackedFile, load_packed, load_published
from qdiff.config import QuantConfig
from qdiff.model import act_quantizers, enable_activations, quant_layers
from tests.support import golden

FROZEN = Path(__file__).parent / "frozen"
QUANT = QuantConfig(
    weight_bit=4,
    act_bit=8,
    quant_act=True,
    a_sym=True,
    split=True,
    weight_scale_method="mse",
)
INPUTS_AND_OUTPUTS = {"x", "t", "y", "y_weights_only"}


@pytest.fixture(params=["packed", "published"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """The network, read from the file of each format."""
    if request.param == "packed":
        return load_packed(FROZEN / "tiny_w4a8.safetensors")[0]
    unet_config = PackedFile.open(FROZEN / "tiny_w4a8.safetensors").info.unet_config
    return load_published(FROZEN / "tiny_w4a8.pth", unet_config, PIXEL, QUANT)


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    return load_file(FROZEN / "expected.safetensors")


def stored_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a file must give back, by the names of `expected.safetensors`."""
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for path, layer in quant_layers(model).items():
        for suffix, quantizer in zip(("", "_0"), layer.weight_quantizers, strict=False):
            for name in ("integers", "delta", "zero_point"):
                state[f"{path}.weight_quantizer{suffix}.{name}"] = getattr(quantizer, name)
    for path, quantizer in act_quantizers(model).items():
        state[f"{path}.delta"], state[f"{path}.zero_point"] = quantizer.scale, quantizer.zero_point
    return state


def test_the_stored_state_is_read_bit_for_bit(model, expected):
    state = stored_state(model)
    assert set(state) == set(expected) - INPUTS_AND_OUTPUTS
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@torch.no_grad()
def test_the_outputs_are_those_of_the_version_that_wrote_the_files(model, expected):
    model = model.double()
    x, t = expected["x"].double(), expected["t"]
    assert golden.relative_error(model(x, t), expected["y"]) < 1e-9
    enable_activations(model, False)
    # The time embedding is formed in float32, where another processor's sine may differ in the last bit. With
    # activations quantized the first quantizer absorbs the difference.
    assert golden.relative_error(model(x, t), expected["y_weights_only"]) < 1e-6


def test_the_header_of_the_packed_file_is_understood():
    info = PackedFile.open(FROZEN / "tiny_w4a8.safetensors").info
    assert info.family == "pixel" and info.config == QUANT and info.model_parts is None
    assert info.calibration["iters"] == 40 and info.unet_config["ch"] == 4
    assert info.source_sha256 == "158b2e419b3e68e2c6f52b3eb56a9b30b321a74a8edf57f3fc0fa4bb04181554"
