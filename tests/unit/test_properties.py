"""Properties that hold for all inputs: packing, fake quantization, AdaRound, and what is read back from files."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim.config import ModelConfig
from ddim.family import PIXEL, describe
from ddim.unet import UNet
from qdiff import quantizers as Q
from qdiff.checkpoint import PackedInfo, load_packed, load_published, pack_integers, save_packed, save_published, unpack_integers
from qdiff.config import QuantConfig
from qdiff.files import atomic_write
from qdiff.model import act_quantizers, enable_activations, init_weights, quantize_model

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("repeatable")

WIDTHS = st.integers(2, 16)
NUMBERS = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=40).map(lambda values: torch.tensor(values, dtype=torch.float64))
TINY = ModelConfig(image_size=4, in_channels=1, out_ch=1, ch=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(4,), norm_groups=2)


def scale_of(x: torch.Tensor, n_bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(part.double() for part in Q.find_scale(x, n_bits, symmetric=symmetric))


@given(WIDTHS, st.data())
def test_integers_of_any_width_are_packed_and_unpacked(n_bits, data):
    values = data.draw(st.lists(st.integers(0, 2**n_bits - 1), max_size=50))
    packed = pack_integers(torch.tensor(values, dtype=torch.int32), n_bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(values) * n_bits // 8)
    assert unpack_integers(packed, n_bits, (len(values),)).tolist() == values


@given(NUMBERS, WIDTHS, st.booleans())
def test_fake_quantization_lies_on_the_grid_and_is_idempotent(x, n_bits, symmetric):
    delta, zero = scale_of(x, n_bits, symmetric)
    y = Q.fake_quantize(x, delta, zero, n_bits, symmetric)
    low, high = Q.integer_range(n_bits, symmetric)
    integers = y / delta + zero
    assert torch.allclose(integers, integers.round(), rtol=0, atol=1e-6)
    assert low <= integers.round().min() and integers.round().max() <= high
    assert torch.allclose(Q.fake_quantize(y, delta, zero, n_bits, symmetric), y, rtol=1e-12, atol=0)


@given(NUMBERS, WIDTHS, st.booleans())
def test_fake_quantization_errs_by_half_a_step_and_keeps_the_order(x, n_bits, symmetric):
    delta, zero = scale_of(x, n_bits, symmetric)
    y = Q.fake_quantize(x, delta, zero, n_bits, symmetric)
    low, high = Q.integer_range(n_bits, symmetric)
    inside = (x >= (low - zero) * delta) & (x <= (high - zero) * delta)
    assert ((y - x).abs()[inside] <= delta / 2 * (1 + 1e-9)).all()
    assert (y[x.argsort()].diff() >= 0).all()


@given(NUMBERS, WIDTHS)
def test_symmetric_fake_quantization_is_odd(x, n_bits):
    delta, zero = scale_of(x, n_bits, True)
    assert torch.equal(Q.fake_quantize(-x, delta, zero, n_bits, True), -Q.fake_quantize(x, delta, zero, n_bits, True))


@given(NUMBERS, st.integers(2, 8), st.randoms(use_true_random=False))
def test_alpha_and_integers_say_the_same(x, n_bits, random):
    w = x.float()
    delta, zero = Q.find_scale(w, n_bits)
    up = torch.tensor([random.random() < 0.5 for _ in w])
    integers = torch.clamp(torch.floor(w / delta) + up + zero, 0, 2**n_bits - 1)
    assert torch.equal(Q.hard_integers(w, Q.alpha_from_integers(w, integers, delta, zero), delta, zero, n_bits), integers)


CONFIGS = st.builds(
    QuantConfig,
    weight_bit=WIDTHS,
    act_bit=WIDTHS,
    quant_act=st.booleans(),
    sm_abit=WIDTHS,
    a_sym=st.booleans(),
    split=st.booleans(),
    weight_scale_method=st.sampled_from(["max", "max_scale", "mse"]),
    act_scale_method=st.sampled_from(["max", "max_scale", "mse"]),
    quant_mode=st.sampled_from(["qdiff", "linear"]),
    time_bounds=st.lists(st.floats(0, 1000), unique=True, max_size=4).map(lambda values: tuple(sorted(values))),
)


@given(CONFIGS)
def test_settings_are_read_back(config):
    assert QuantConfig.from_dict(config.to_dict()) == config


@settings(max_examples=12)
@given(CONFIGS, st.integers(0, 2**31))
def test_files_give_back_the_same_network(config, seed):
    torch.manual_seed(seed)
    config = replace(config, weight_bit=min(config.weight_bit, 8), act_bit=8, sm_abit=8, quant_act=True, time_bounds=())
    unet = UNet(TINY).eval().requires_grad_(False)
    model = quantize_model(unet, PIXEL, config)
    init_weights(model, config.weight_scale_method)
    for quantizer in act_quantizers(model).values():
        zero = 0.0 if config.a_sym else float(torch.randint(100, 150, ()))
        quantizer.set_scale(torch.rand(()) * 0.02 + 0.01, torch.tensor(zero))
    enable_activations(model, True)
    x, t = torch.randn(1, 1, 4, 4), torch.tensor([500.0])
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        packed, published = Path(name, "q.safetensors"), Path(name, "q.pth")
        save_packed(packed, model, PackedInfo(PIXEL.name, describe(TINY), config, {}, ""))
        loaded, info = load_packed(packed)
        assert info.config == config and torch.equal(loaded(x, t), model(x, t))
        if config.weight_bit > 3:  # with fewer bits a file looks like one of another width
            save_published(published, model, PIXEL, unet.state_dict(), activations=True)
            assert torch.equal(load_published(published, describe(TINY), PIXEL, config)(x, t), model(x, t))


@given(st.binary(max_size=200), st.binary(max_size=200), st.booleans())
def test_a_file_is_the_old_one_or_the_new_one(old, new, fails):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "file")
        path.write_bytes(old)
        if fails:
            with pytest.raises(RuntimeError), atomic_write(path) as temporary:
                temporary.write_bytes(new)
                raise RuntimeError
        else:
            with atomic_write(path) as temporary:
                temporary.write_bytes(new)
        assert path.read_bytes() == (old if fails else new) and list(Path(name).iterdir()) == [path]
