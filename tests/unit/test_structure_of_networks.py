"""What `qdiff.quantize` keeps, splits and leaves in full precision, on a foreign network."""

import logging

import pytest
import torch
from torch import nn

import qdiff
from qdiff.errors import ConfigError, NonFiniteError
from qdiff.layers import QuantLayer, QuantMatMul
from qdiff.structure import describe
from tests.support.foreign import QUICK, Denoiser


class Attention(nn.Module):
    """A foreign attention block, whose matmuls are plain function calls."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).chunk(3, dim=1)
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) / q.shape[1] ** 0.5, dim=-1)
        return x + self.out(torch.einsum("bts,bcs->bct", weights, v).view_as(x))


class Network(nn.Module):
    """Its head is a container, and its last layer sees a concatenation."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 8, 4, 4))
        self.stem, self.attention = nn.Conv2d(3, 8, 3, padding=1), Attention(8)
        self.join = nn.Conv2d(16, 8, 1)
        self.head = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1)), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, x, t):
        h = self.stem(x) + self.position
        return self.head(self.join(torch.cat([self.attention(h), h], dim=1)))


INPUTS = (torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8.0))


def quantize(**options):
    torch.manual_seed(0)
    options = {"keep": ["position"]} | options
    return qdiff.quantize(Network(), INPUTS, **QUICK, **options)


def matmuls_of(network):
    return {path: module for path, module in network.named_modules() if isinstance(module, QuantMatMul)}


def quantized_layers(network):
    return {path for path, module in network.named_modules() if isinstance(module, QuantLayer)}


ALL = {"stem", "attention.qkv", "attention.out", "join", "head.0.0", "head.2"}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (["head"], {"head.0.0", "head.2"}),
        (["head.0"], {"head.0.0"}),
        (["head.*"], {"head.0.0", "head.2"}),
        (["*.out", "st?m"], {"attention.out", "stem"}),
        ([Attention], {"attention.qkv", "attention.out"}),
        ([nn.Sequential], {"head.0.0", "head.2"}),
        (["join", "head.2"], {"join", "head.2"}),
    ],
)
def test_a_name_in_keep_keeps_everything_inside(keep, kept, caplog):
    with caplog.at_level(logging.WARNING):
        network = quantize(keep=["position", *keep])
    assert quantized_layers(network) == ALL - kept
    assert f"{len(kept)} layers stay in full precision (keep): " in caplog.text and all(
        path in caplog.text for path in kept
    )


def test_what_is_found_is_quantized_and_what_is_given_wins(caplog):
    caplog.set_level(logging.INFO)
    found = describe(quantize())
    assert found.matmuls == ("attention.matmul_0", "attention.matmul_1") and found.splits == {"join": 8}
    assert "quantized: 6 layers, 2 attention matmuls, 1 split shortcuts" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    none = describe(quantize(splits={}, attention_matmuls={}))
    assert none.matmuls == () and none.splits == {} and none.unsplit == {"join": 8}
    assert none.kept_matmuls == {"attention": (2, "kept")}
    assert "2 attention matmuls stay in full precision: attention (2): kept" in caplog.text
    assert "1 layers see a concatenation through one quantizer (not among splits): join: 8" in caplog.text
    caplog.clear()
    weights_only = quantize(act_bit=None)
    assert "attention matmuls" not in caplog.text and not matmuls_of(weights_only)


def test_attention_matmuls_can_be_kept_and_take_other_widths():
    one = quantize(keep=["position", "attention.matmul_1"], policy={"*.matmul_0": "A4"})
    (matmul,) = matmuls_of(one).values()
    assert describe(one).kept_matmuls == {"attention": (1, "kept")}
    assert [quantizer.n_bits for quantizer in matmul.act_quantizers] == [4, 4]
    whole = describe(quantize(keep=["position", "attention"]))
    assert whole.matmuls == () and whole.kept_matmuls == {"attention": (2, "kept")}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": ["haed"]}, "keep: no haed in the network"),
        ({"keep": ["head.7*"]}, "keep: no head"),
        ({"keep": [nn.Bilinear]}, "keep: no Bilinear"),
        ({"keep": ["Conv?d"]}, "keep: no Conv"),
        ({"keep": "head"}, r"keep 'head': expected a list, \['head'\]"),
        ({"attention_matmuls": {nn.Bilinear: None}}, "attention_matmuls: no Bilinear"),
        ({"splits": {"jion": 8}}, "splits: no layer jion"),
        ({"splits": {"join": 16}}, "splits: join has 16 input channels"),
        ({"blocks": [nn.LSTM]}, "blocks: no LSTM"),
        ({"separate": ["emb"]}, "separate: no layer"),
    ],
)
def test_names_of_what_is_not_there_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        quantize(**options)


def test_a_block_that_is_the_network_itself_counts_once():
    network = qdiff.quantize(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)), INPUTS[:1], blocks=[nn.Sequential], **QUICK
    )
    assert quantized_layers(network) == {"0", "2"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value):
    network = Denoiser()
    with torch.no_grad():
        network.blocks[1].second.weight[0, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.second\.weight"):
        qdiff.quantize(network, (torch.randn(4, 3, 8, 8), torch.arange(4.0)), **QUICK)
    huge = Denoiser()
    with torch.no_grad():
        huge.blocks[0].first.weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match=r"blocks\.0"):
        qdiff.quantize(huge, (torch.randn(4, 3, 8, 8), torch.arange(4.0)), **QUICK)
