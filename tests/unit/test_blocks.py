"""Blocks of networks that know nothing of this package: which modules are reconstructed as a whole."""

import pytest
import torch
from torch import nn

import qdiff
from qdiff.blocks import MAX_LAYERS, find_blocks, find_output_layers
from qdiff.layers import LAYER_TYPES
from qdiff.structure import describe, find_structure
from tests.support.attentions import FusedAttention, GuidedUNet
from tests.support.foreign import INPUTS, QUICK, Denoiser, Residual
from tests.support.golden import relative_error

X = torch.randn(32, 8, 8, generator=torch.Generator().manual_seed(0))


def found(model, *inputs):
    """The blocks of a network with the layers whose bias is added to their outputs."""
    model.eval()

    def run():
        return model(*(part[:2] for part in inputs))

    structure = find_structure(model, run)
    layers = [path for path, module in model.named_modules() if type(module) in LAYER_TYPES]
    blocks = find_blocks(model, structure, layers)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = find_output_layers(model, run, blocks, structure.order)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return outputs


class Mlp(nn.Module):
    def __init__(self, width=8, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(torch.relu(x))
        return x


class Transformer(nn.Module):
    """A block with two attentions of one type, as in latent diffusion; its last linear layer adds to the output."""

    def __init__(self, width=8):
        super().__init__()
        self.attn1, self.attn2 = FusedAttention(width), FusedAttention(width)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attn1(x)
        return x + self.attn2(x) + self.ff(x)


class Stage(nn.Module):
    """A list of blocks and a layer of its own."""

    def __init__(self, count, skip=False):
        super().__init__()
        self.skip, self.blocks, self.last = skip, nn.ModuleList(Mlp() for _ in range(count)), nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return (self.last(x), x) if self.skip else self.last(x)


class Body(nn.Module):
    """Modules one after the other, between two layers."""

    def __init__(self, *modules):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), nn.ModuleList(modules), nn.Linear(8, 8)

    def forward(self, x):
        h = self.first(x)
        for module in self.inner:
            h = module(h)
            h = h[0] if isinstance(h, tuple) else h
        return self.last(h)


class Two(nn.Module):
    """A module that returns two tensors, or takes them in a list."""

    def __init__(self, returns):
        super().__init__()
        self.mlp, self.layer, self.returns = Mlp(), nn.Linear(8, 8), returns

    def forward(self, x):
        if isinstance(x, list):
            return self.mlp(x[0]) + self.layer(x[1])
        return [self.mlp(x), self.layer(x)] if self.returns else self.mlp(x) + self.layer(x)


class Table(nn.Module):
    """A module that takes no tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, count):
        return self.last(self.first(torch.eye(8)[:count]))


class Constant(nn.Module):
    """A module with a table."""

    def __init__(self):
        super().__init__()
        self.lists = nn.ModuleList([Table(), Mlp(), Mlp()])

    def forward(self, x):
        table, *others = self.lists
        for module in others:
            x = module(x)
        return x + table(8)


class Recurrent(nn.Module):
    """A module that runs a part of it twice."""

    def __init__(self, part):
        super().__init__()
        self.part, self.layer = part, nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(self.part(self.part(x)))


class Shared(nn.Module):
    """A layer of the first block also runs after the last one, and the network returns a tuple."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x):
        for module in self.inner:
            x = module(x)
        return (self.inner[0].layers[0](x),)


def test_blocks_of_a_guided_diffusion_network_are_its_residual_and_attention_blocks():
    torch.manual_seed(0)
    blocks = found(GuidedUNet(), torch.randn(4, 3, 8, 8), torch.arange(4.0))
    shortcuts = {"input_blocks.3.0": "skip_connection"} | {
        f"output_blocks.{number}.0": "skip_connection" for number in range(4)
    }
    residuals = dict.fromkeys(["input_blocks.1.0", "middle_block.0", "middle_block.2"], "out_layers.3")
    owners = ["input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"]
    assert blocks == shortcuts | residuals | dict.fromkeys(owners, "proj_out")


CASES = [
    (lambda: Body(Transformer(), Transformer()), {"inner.0": "ff.2", "inner.1": "ff.2"}),
    (
        lambda: Body(Stage(1), Stage(2)),
        {"inner.0": "last", "inner.1.blocks.0": "layers.1", "inner.1.blocks.1": "layers.1"},
    ),
    (lambda: Body(Stage(1, skip=True)), {"inner.0.blocks.0": "layers.1"}),
    (lambda: Body(Mlp(layers=MAX_LAYERS), Mlp(layers=MAX_LAYERS + 1)), {"inner.0": f"layers.{MAX_LAYERS - 1}"}),
    (lambda: nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 8)), {}),
    (lambda: Mlp(layers=3), {}),  # the network itself is no block
    (lambda: nn.Sequential(Mlp(layers=3)), {}),  # nor is what is all of it
    (lambda: Body(Two(True), Two(False)), {"inner.0": None, "inner.1": "layer"}),
    (lambda: Body(Recurrent(Mlp())), {"inner.0": "layer"}),
    (lambda: Recurrent(Mlp()), {"part": "layers.1"}),
    (Shared, {f"inner.{number}": "layers.1" for number in range(3)}),
    (lambda: Body(Constant(), Mlp()), dict.fromkeys(["inner.0.lists.1", "inner.0.lists.2", "inner.1"], "layers.1")),
]


@pytest.mark.parametrize(("network", "expected"), CASES)
def test_blocks_are_the_largest_units_that_are_no_stages(network, expected):
    torch.manual_seed(0)
    assert found(network(), X) == expected


def test_biases_that_are_not_added_to_the_output_are_told_apart():
    class Scaled(Mlp):
        def forward(self, x):
            return super().forward(x) * 0.5

    class Transposed(Mlp):
        def forward(self, x):
            return super().forward(x).transpose(1, 2)

    class Unbiased(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.last(self.first(x))

    torch.manual_seed(0)
    assert found(Body(Scaled(), Transposed(), Unbiased(), Mlp()), X) == {
        "inner.0": None,
        "inner.1": None,
        "inner.2": None,
        "inner.3": "layers.1",
    }


def test_blocks_are_found_unless_they_are_given():
    torch.manual_seed(0)
    model = Denoiser()
    assert describe(qdiff.quantize(model, INPUTS, **QUICK)).blocks == ("blocks.0", "blocks.1")
    assert describe(qdiff.quantize(model, INPUTS, blocks=[], **QUICK)).blocks == ()
    assert describe(qdiff.quantize(model, INPUTS, blocks=[Residual], **QUICK)).blocks == ("blocks.0", "blocks.1")


def test_layers_that_are_kept_make_no_block():
    torch.manual_seed(0)
    network = qdiff.quantize(Denoiser(), INPUTS, keep=["blocks.0.first", "blocks.0.time"], **QUICK)
    assert describe(network).blocks == ("blocks.1",)


NETWORKS = [lambda: Body(Two(True), Two(False)), lambda: Recurrent(Mlp()), Shared, lambda: Body(Constant(), Mlp())]


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_with_odd_blocks_are_quantized(network):
    torch.manual_seed(0)
    model = network()
    quantized = qdiff.quantize(model, (X,), **QUICK)
    assert len(describe(quantized).layers) == sum(type(module) in LAYER_TYPES for module in model.modules())
    with torch.no_grad():
        found, expected = (output[0] if isinstance(output, tuple) else output for output in (quantized(X), model(X)))
    assert relative_error(found, expected) < 0.05
