"""Properties of packing, fake quantization, AdaRound, files, settings, and atomic writing for any numbers.

The examples are derived from the tests themselves (`derandomize`), so that every run tries the same ones.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ddim.config import ModelConfig
from ddim.family import PIXEL, unet_config_dict
from ddim.unet import UNet
from qdiff import quantizers as Q
from qdiff.checkpoint import (
    PackedInfo,
    load_packed,
    load_published,
    pack_integers,
    save_packed,
    save_published,
    state_hash,
    unpack_integers,
)
from qdiff.config import QuantConfig
from qdiff.errors import CheckpointError, ConfigError
from qdiff.layers import ActQuantizer
from qdiff.model import act_quantizers, enable_activations, init_weights, quantize_model
from qdiff.scale_rules import choose_qparams
from qdiff.utils.files import atomic_write

REPEATABLE = {"derandomize": True, "deadline": None, "database": None}
many = settings(max_examples=100, **REPEATABLE)
few = settings(max_examples=12, **REPEATABLE)

RULES = ("max", "max_scale", "mse")
MODES = ("qdiff", "linear")
widths = st.integers(2, 16)
scales = st.floats(1e-6, 1e3)
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- packing -----------------------------------------------------------------------------------------


@many
@given(st.data(), st.integers(1, 16), st.lists(st.integers(0, 5), max_size=3))
def test_packed_integers_are_a_little_endian_stream_of_bits(data, n_bits, shape):
    count = math.prod(shape)
    numbers = data.draw(st.lists(st.integers(0, 2**n_bits - 1), min_size=count, max_size=count))
    values = torch.tensor(numbers, dtype=torch.int32).reshape(shape)
    packed = pack_integers(values, n_bits)
    stream = sum(number << (n_bits * place) for place, number in enumerate(numbers))
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == stream.to_bytes(-(-count * n_bits // 8), "little")
    unpacked = unpack_integers(packed, n_bits, shape)
    assert unpacked.dtype == (torch.uint8 if n_bits <= 8 else torch.int32)
    assert torch.equal(unpacked.int(), values)


# --- fake quantization -------------------------------------------------------------------------------


@st.composite
def quantizers(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, bool]:
    """(scale, zero_point, n_bits, symmetric) in float64; zero points may lie outside the grid."""
    n_bits, symmetric = draw(widths), draw(st.booleans())
    zero = 0 if symmetric else draw(st.integers(-(2**n_bits), 2 ** (n_bits + 1)))
    return torch.tensor(draw(scales)).double(), torch.tensor(zero).double(), n_bits, symmetric


@st.composite
def data_around(draw: st.DrawFn, scale: Tensor, n_bits: int) -> Tensor:
    """Sorted numbers within and beyond the range, a few of them halfway between two values of the grid."""
    reach = 2.0 ** draw(st.integers(-2, n_bits + 2))
    ratios = draw(st.lists(st.floats(-reach, reach), min_size=1, max_size=30))
    halves = draw(st.lists(st.integers(-(2**n_bits), 2**n_bits), max_size=5))
    return torch.tensor(sorted([*ratios, *(half + 0.5 for half in halves)])).double() * scale


@many
@given(st.data(), quantizers())
def test_fake_quantization(data, quantizer):
    scale, zero, n_bits, symmetric = quantizer
    x = data.draw(data_around(scale, n_bits))
    y = Q.fake_quantize(x, scale, zero, n_bits, symmetric)
    low, high = Q.integer_range(n_bits, symmetric)

    integers = (y / scale).round() + zero
    assert torch.equal((integers - zero) * scale, y), "the values lie on the grid"
    assert bool(((integers >= low) & (integers <= high)).all())
    assert torch.equal(integers, Q.quantize_nearest(x, scale, zero, n_bits, symmetric))
    assert torch.equal(Q.fake_quantize(y, scale, zero, n_bits, symmetric), y), "idempotent"
    assert bool((y.diff() >= 0).all()), "monotone"
    if symmetric:  # all but the lowest integer have their opposite
        opposite = Q.fake_quantize(-x, scale, zero, n_bits, symmetric)
        assert bool(((opposite == -y) | (integers == low) | (integers == high)).all()), "odd"
    inside = (x >= (low - zero) * scale) & (x <= (high - zero) * scale)
    assert bool(((x - y).abs()[inside] <= scale / 2 * (1 + 1e-9)).all()), "at most half a step away"
    at_an_end = (y == (low - zero) * scale) | (y == (high - zero) * scale)
    assert bool(at_an_end[~inside].all()), "clamped"


@many
@given(st.data(), quantizers())
def test_activation_quantizers_give_the_same_bits_whether_they_learn_or_not(data, quantizer):
    scale, zero, n_bits, symmetric = quantizer
    module = ActQuantizer(n_bits, symmetric).double()
    module.set_qparams(scale, zero)
    x = data.draw(data_around(scale, n_bits))
    assert torch.equal(module(x), x)
    module.enabled = True
    plain = module(x)
    module.learning = True
    assert torch.equal(plain, module(x))


@many
@given(seeds, widths, st.booleans(), st.sampled_from(RULES), st.booleans(), st.floats(-3, 3))
def test_scales_are_positive_and_zero_points_whole(seed, n_bits, symmetric, rule, channel_wise, shift):
    x = torch.randn(3, 20, generator=generator(seed)) * torch.tensor([[1e-3], [1.0], [50.0]]) + shift
    scale, zero = choose_qparams(x, n_bits, symmetric=symmetric, channel_wise=channel_wise, method=rule)
    assert bool((scale >= Q.MIN_SCALE).all() and scale.isfinite().all())
    assert torch.equal(zero, zero.round()) and (not symmetric or not zero.any())
    if rule == "max" and x.min() <= 0 <= x.max() and not channel_wise:
        y = Q.fake_quantize(x.double(), scale.double(), zero.double(), n_bits, symmetric)
        # The zero point is rounded, so that one end of the range may be clamped by half a step more.
        assert float((x - y).abs().max()) <= float(scale) * (0.5 if symmetric else 1.0) * (1 + 1e-3)


# --- AdaRound ----------------------------------------------------------------------------------------


@many
@given(seeds, widths, scales, st.data())
def test_integers_become_alphas_and_integers_again(seed, n_bits, value, data):
    """For any rounding of any weight, also a clamped one, in float32 as published files hold it."""
    zero = torch.tensor(float(data.draw(st.integers(-(2**n_bits), 2 ** (n_bits + 1)))))
    scale = torch.tensor(value)
    weight = (torch.rand(5, 7, generator=generator(seed)) * 3 - 1.5) * 2**n_bits * scale
    up = torch.rand(5, 7, generator=generator(seed + 1)) < 0.5
    integers = torch.clamp((weight / scale).floor() + up + zero, 0, 2**n_bits - 1)
    alpha = Q.alpha_from_integers(weight, integers, scale, zero)
    assert alpha.dtype == torch.float32
    assert torch.equal(Q.hard_integers(weight, alpha, scale, zero, n_bits), integers)
    # h(alpha) is 0 or 1 but for the rounding of the saturated alpha itself
    soft = Q.soft_round(weight, alpha, scale, zero, n_bits)
    assert float((soft / scale - (integers - zero)).abs().max()) < 1e-6 * 2 ** (n_bits + 2)


@many
@given(seeds, widths, scales)
def test_the_initial_alpha_keeps_the_weight_and_rounds_to_nearest(seed, n_bits, value):
    scale = torch.tensor(value).double()
    zero = torch.tensor(2.0 ** (n_bits - 1)).double()
    weight = (torch.rand(50, generator=generator(seed)).double() * (2**n_bits - 1) - zero) * scale
    alpha = Q.init_alpha(weight, scale)
    soft = Q.soft_round(weight, alpha, scale, zero, n_bits)
    assert float((soft - weight).abs().max() / scale) < 1e-9 * 2**n_bits
    fraction = weight / scale - (weight / scale).floor()
    clear = (fraction - 0.5).abs() > 1e-9
    nearest = Q.quantize_nearest(weight, scale, zero, n_bits)
    assert torch.equal(Q.hard_integers(weight, alpha, scale, zero, n_bits)[clear], nearest[clear])


# --- files -------------------------------------------------------------------------------------------

MODEL = ModelConfig(
    image_size=4,
    in_channels=2,
    out_ch=2,
    ch=4,
    ch_mult=(1,),
    num_res_blocks=1,
    attn_resolutions=(),
    norm_groups=2,
)
rules = st.sampled_from(RULES)
configurations = st.builds(
    QuantConfig,
    weight_bit=widths,
    act_bit=widths,
    quant_act=st.booleans(),
    sm_abit=widths,
    a_sym=st.booleans(),
    split=st.booleans(),
    weight_scale_method=rules,
    act_scale_method=rules,
    quant_mode=st.sampled_from(MODES),
    time_bounds=st.lists(st.floats(0, 1000), max_size=3, unique=True).map(sorted).map(tuple),
)


def quantized(quant: QuantConfig, seed: int) -> tuple[UNet, nn.Module]:
    """(network, quantized network) with random roundings and the activation scales of plausible ranges."""
    torch.manual_seed(seed)
    unet = UNet(MODEL).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter.normal_(0, 0.3)
    model = quantize_model(unet, PIXEL, quant)
    init_weights(model, quant.weight_scale_method)
    for quantizer in act_quantizers(model).values():
        shape, (_, high) = quantizer.scale.shape, Q.integer_range(quantizer.n_bits, quantizer.symmetric)
        top = 1.0 if quantizer.is_softmax else 8.0
        # near enough to the middle of the grid to show the width in a published file
        zero = torch.zeros(shape) if quant.a_sym else (high * (torch.rand(shape) * 0.3 + 0.37)).round()
        quantizer.set_qparams(top / high * (torch.rand(shape) / 2 + 0.5), zero)
    enable_activations(model, quant.quant_act)
    return unet, model


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    """The same stored state, bit for bit, and the same output."""
    state, reference = found.state_dict(), expected.state_dict()
    assert set(state) == set(reference)
    acts = any(quantizer.enabled for quantizer in act_quantizers(expected).values())
    for name, tensor in state.items():
        if acts or ".act_quantizer" not in f".{name}":
            assert tensor.dtype == reference[name].dtype and torch.equal(tensor, reference[name]), name
    x, t = torch.randn(2, 2, 4, 4, generator=generator(0)), torch.tensor([5.0, 700.0])
    assert torch.equal(found(x, t), expected(x, t))


# The zero points of 16-bit weights need not fit int16, and those of the rule `max_scale` exceed even 2^16.
@example(QuantConfig(weight_bit=16), 0)
@example(QuantConfig(weight_bit=16, weight_scale_method="max_scale", quant_act=True, split=True), 0)
@few
@given(configurations, seeds)
def test_packed_files_give_back_what_was_saved(tmp_path_factory, quant, seed):
    path = tmp_path_factory.mktemp("packed") / "q.safetensors"
    unet, model = quantized(quant, seed)
    info = PackedInfo("pixel", unet_config_dict(MODEL), quant, {"iters": 1}, state_hash(unet.state_dict()))
    save_packed(path, model, info)
    found, found_info = load_packed(path)
    assert_same(found, model)
    assert found_info.config == quant and found_info.source_sha256 == info.source_sha256
    again = path.with_name("again.safetensors")
    save_packed(again, found, found_info)
    assert load_packed(again)[1] == found_info and path.stat().st_size == again.stat().st_size


@few
@given(configurations, seeds)
def test_published_files_give_back_what_was_saved(tmp_path_factory, quant, seed):
    path = tmp_path_factory.mktemp("published") / "q.pth"
    unet, model = quantized(quant, seed)
    if quant.time_bounds:
        with pytest.raises(CheckpointError, match="timestep groups"):
            save_published(path, model, PIXEL, unet.state_dict(), quant.quant_act)
        quant = replace(quant, time_bounds=())
        unet, model = quantized(quant, seed)
    save_published(path, model, PIXEL, unet.state_dict(), quant.quant_act)
    assert_same(load_published(path, unet_config_dict(MODEL), PIXEL, quant), model)


# --- settings and atomic writing ---------------------------------------------------------------------


@many
@given(configurations)
def test_settings_survive_json(quant):
    values = json.loads(json.dumps(quant.to_dict()))
    assert QuantConfig.from_dict(values) == quant
    assert QuantConfig.from_dict(quant.to_dict()) == quant


@many
@given(configurations, st.floats(), st.text(max_size=8).filter(lambda word: word not in RULES + MODES))
def test_settings_that_cannot_work_are_refused(quant, number, word):
    bits = ("weight_bit", "act_bit", "sm_abit")
    wrong = [(name, value) for name in bits for value in (-4, 0, 1, 17, number)]
    wrong += [(name, word) for name in ("weight_scale_method", "act_scale_method", "quant_mode")]
    wrong += [("time_bounds", (5.0, 1.0)), ("time_bounds", (3.0, 3.0))]
    for name, value in wrong:
        with pytest.raises(ConfigError, match=name):
            QuantConfig.from_dict(quant.to_dict() | {name: value}).validate()


@many
@given(configurations, st.text(max_size=8))
def test_settings_of_a_file_may_name_a_rule_that_is_not_registered(quant, word):
    values = quant.to_dict() | {"weight_scale_method": word, "act_scale_method": word}
    assert QuantConfig.from_dict(values).to_dict() == values


@many
@given(configurations, st.data())
def test_settings_that_are_missing_or_unknown_are_refused(quant, data):
    missing = data.draw(st.sampled_from(sorted(set(quant.to_dict()) - {"time_bounds"})))
    without = {key: value for key, value in quant.to_dict().items() if key != missing}
    for broken in (quant.to_dict() | {"another": 1}, without):
        with pytest.raises(ConfigError, match="expected"):
            QuantConfig.from_dict(broken)


class Interrupted(Exception):
    """Stands for anything that ends a writer early."""


def write(path: Path, content: bytes, fails_after: int | None) -> None:
    """Write `content`; where `fails_after` is given, raise when so many bytes are written."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content[:fails_after])
        if fails_after is not None:
            raise Interrupted


writes = st.lists(st.tuples(st.binary(max_size=50), st.none() | st.integers(0, 50)), min_size=1, max_size=6)


@settings(max_examples=40, **REPEATABLE)
@given(writes, st.sampled_from(["a.pth", "ünï code.bin", ".hidden"]), st.booleans())
def test_atomic_writing_leaves_the_last_whole_content_and_nothing_else(tmp_path_factory, writes, name, deep):
    folder = tmp_path_factory.mktemp("atomic")
    path = folder / "made" / "here" / name if deep else folder / name
    expected = None
    for content, fails_after in writes:
        if fails_after is None:
            write(path, content, None)
            expected = content
        else:
            with pytest.raises(Interrupted):
                write(path, content, fails_after)
        assert (path.read_bytes() if path.exists() else None) == expected
        assert [file for file in path.parent.iterdir() if file != path] == []
