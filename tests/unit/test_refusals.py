"""What stays in full precision without being named, and what is refused: all at once, with a way out that works."""

import logging
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import qdiff
from qdiff.architecture import Architecture
from qdiff.config import QuantConfig
from qdiff.layers import QuantConv2d, QuantLinear
from qdiff.model import quant_layers, quantize_model
from tests.support.foreign import QUICK

pytestmark = pytest.mark.unit
INPUTS = (torch.randn(8, 4, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 8))


class RMSNorm(nn.Module):
    """A norm as people write it."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.gain


class LayerScale(nn.Module):
    """Gains in a shape that broadcasts."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((1, 1, width), 0.1))

    def forward(self, x):
        return x * self.gamma


class Product(nn.Module):
    """A linear layer as people write it; `normalized` as in EDM2, where the weight is scaled before it is used."""

    def __init__(self, width, normalized=False):
        super().__init__()
        self.weight, self.normalized = nn.Parameter(torch.randn(width, width)), normalized
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        weight = self.weight
        if self.normalized:
            weight = weight / weight.norm(dim=1, keepdim=True).add(1e-4)
            return self.inner(x @ weight.t())
        return self.inner(F.linear(x, weight))


class Mixed(nn.Module):
    """Parameters in lists: one is added, one is a factor after it was filled in, and one is mixed with activations."""

    def __init__(self, width):
        super().__init__()
        self.table = nn.ParameterList(nn.Parameter(torch.randn(4, width)) for _ in range(3))
        self.square = nn.Parameter(torch.randn(width, width))

    def forward(self, x):
        mixed = self.table[1].expand(len(x), -1, -1).clone()
        mixed += x[:, :4]  # no parameter any more
        mixed[:, :2] = x[:, :2]
        weights = torch.softmax(x @ mixed.transpose(1, 2), dim=-1)
        return x + self.table[0].sum() + (weights @ mixed) @ self.square.type_as(x).t() + self.table[2].mean()


class Network(nn.Module):
    """A transformer with position embeddings and tokens as bare parameters, own norms, and room for other modules."""

    def __init__(self, width=8, **others):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(4, width))
        self.tokens = nn.Parameter(torch.randn(2, width))
        self.first, self.norm, self.scale = nn.Linear(width, width), RMSNorm(width), LayerScale(width)
        self.last, self.unused = nn.Linear(width, width), nn.Linear(width, 3)
        self.others = nn.ModuleDict(others)

    def forward(self, x, t):
        h = x + self.positions + t[:, None, None]
        h = torch.cat([h, self.tokens.expand(len(h), -1, -1)], dim=1)
        h = self.first(h) + self.scale(self.norm(h))
        for module in self.others.values():
            found = module(h, h, h) if isinstance(module, nn.MultiheadAttention) else module(h)
            h = h + (found[0] if isinstance(found, tuple) else found)
        return self.last(h)[:, :4]


def quantize(model, **options):
    return qdiff.quantize(model, INPUTS, **QUICK | {"iters": 0, "iters_a": 0, "iters_tune": 0}, **options)


def error_of(model, **options):
    with pytest.raises(TypeError) as error:
        quantize(model, **options)
    return str(error.value)


def pasted(line):
    """The names in the first `keep=[...]` of a message, read as Python."""
    return eval(re.search(r"keep=(\[.*?\])(?=[; ]|$)", line)[1])


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


def test_norms_gains_and_parameters_that_no_product_uses_need_no_mention(caplog, tmp_path):
    torch.manual_seed(0)
    model = Network()
    with caplog.at_level(logging.INFO):
        quantized = quantize(model)
    assert set(quant_layers(quantized)) == {"first", "last"} and type(quantized.unused) is nn.Linear
    assert "modules whose own parameters stay in full precision: " in caplog.text
    assert all(words in caplog.text for words in ("1 Network (positions, tokens)", "1 RMSNorm (gain)", "1 LayerScale"))
    assert "1 layers never run and stay in full precision: unused" in caplog.text
    qdiff.save(tmp_path / "q.safetensors", quantized)
    torch.manual_seed(1)
    assert torch.equal(qdiff.load(tmp_path / "q.safetensors", Network(), device="cpu")(*INPUTS), quantized(*INPUTS))


def test_all_refusals_come_at_once_and_every_way_out_works():
    def model():
        torch.manual_seed(0)
        return Network(
            attention=nn.MultiheadAttention(8, 2, batch_first=True),
            more=nn.MultiheadAttention(8, 2, batch_first=True),
            lstm=nn.LSTM(8, 8, batch_first=True),
            product=Product(8),
            normalized=Product(8, normalized=True),
            hooked=hooked(nn.Linear(8, 8)),
            parametrized=parametrizations.weight_norm(nn.Linear(8, 8)),
        )

    head, *lines = error_of(model(), keep=["first"]).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [
        f"others.{name}" for name in ("attention", "more", "lstm", "product", "normalized", "hooked", "parametrized")
    ]
    kinds = ("MultiheadAttention", "MultiheadAttention", "LSTM", "Product", "Product", "Linear", "Linear")
    assert all(kind in line for kind, line in zip(kinds, lines, strict=True))
    assert "weight [8, 8]" in lines[3]
    kept = pasted(head)
    assert kept[:3] == [
        "first",
        "MultiheadAttention",
        "LSTM",
    ]  # what was kept before stays; one word keeps all of a type
    found = set(quant_layers(quantize(model(), keep=kept)))
    assert found == {"last", "others.product.inner", "others.normalized.inner"}
    # each line's own way out leaves the other refusals
    for number, line in enumerate(lines):
        rest = error_of(model(), keep=["first", *pasted(line)]).splitlines()[1:]
        assert rest == lines[:number] + lines[number + 1 :]
    assert (
        set(quant_layers(quantize(model(), keep=["first", *(name for line in lines for name in pasted(line))])))
        == found
    )


@pytest.mark.parametrize("keep", ["MultiheadAttention", nn.MultiheadAttention, "others.attention", "others.*"])
def test_attention_of_torch_is_kept_whole(keep):
    torch.manual_seed(0)
    model = Network(attention=nn.MultiheadAttention(8, 2, batch_first=True))
    quantized = quantize(model, keep=[keep])
    assert set(quant_layers(quantized)) == {"first", "last"}
    assert torch.equal(quantized.others.attention.in_proj_weight, model.others.attention.in_proj_weight)


def test_encoder_layers_of_torch_do_not_bypass_the_quantizers():
    """PyTorch's fused encoder layer takes the weights of its linear layers and does not call them."""
    torch.manual_seed(0)
    model = Network(encoder=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert pasted(error_of(model)) == ["MultiheadAttention"]
    quantized = quantize(model, keep=["MultiheadAttention"])
    calls = []
    for path in ("others.encoder.linear1", "others.encoder.linear2"):
        quantized.get_submodule(path).register_forward_hook(lambda module, *_: calls.append(module))
    with torch.inference_mode():
        quantized(*INPUTS)
    assert len(calls) == 2 and all(isinstance(layer, QuantLinear) and layer.act_quantizer.enabled for layer in calls)


def test_names_with_signs_of_patterns_are_pasted_as_they_are():
    torch.manual_seed(0)
    model = Network(**{"a[0]*": Product(8), "a0": nn.Linear(8, 8)})
    kept = pasted(error_of(model))
    assert set(quant_layers(quantize(model, keep=kept))) == {"first", "last", "others.a0", "others.a[0]*.inner"}


def test_types_that_hold_only_vectors_need_no_mention_in_a_family():
    """A family has no samples to run; its matrices must be named."""
    model = nn.Sequential(RMSNorm(8), LayerScale(8), nn.Linear(8, 8), Network())
    with pytest.raises(
        TypeError, match=r"3: Network has no quantized form for its positions \[4, 8\], tokens \[2, 8\]"
    ):
        quantize_model(model, Architecture("own", lambda _: model, {}), QuantConfig())
    architecture = Architecture("own", lambda _: model, {}, keep=("3.positions", "3.tokens"))
    assert set(quant_layers(quantize_model(model, architecture, QuantConfig()))) == {
        "2",
        "3.first",
        "3.last",
        "3.unused",
    }


def test_factors_are_told_from_parameters_that_become_activations():
    torch.manual_seed(0)
    model = Network(mixed=Mixed(8))
    assert pasted(error_of(model)) == ["others.mixed.square"]
    assert set(quant_layers(quantize(model, keep=["others.mixed.square"]))) == {"first", "last"}


def test_padding_modes_are_quantized():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(8, 3, 1))
    x = torch.randn(16, 3, 8, 8)
    quantized = qdiff.quantize(model, (x,), iters=0, iters_a=0, iters_tune=0)
    assert isinstance(quantized[0], QuantConv2d)
    with torch.no_grad():
        assert (quantized(x) - model(x)).norm() < 0.02 * model(x).norm()
