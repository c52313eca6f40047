"""Wrapping, calibration sets, ranges and reconstruction on a tiny network of our own."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddim.family import PIXEL, unet_config_dict
from ldm.attention import CrossAttention
from ldm.family import LATENT
from qdiff.architecture import Architecture, AttentionMatMulSpec
from qdiff.calibration.data import CalibrationData, CalibrationSet, Recorder, load_set, save_set
from qdiff.calibration.ranges import init_activation_ranges, timestep_group_bounds
from qdiff.calibration.reconstruct import UnitData, reconstruct_activations, reconstruct_weights
from qdiff.calibration.run import Calibration
from qdiff.calibration.trace import trace_execution
from qdiff.checkpoint import PackedInfo, load_packed, save_packed, save_published
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.errors import CheckpointError, ConfigError
from qdiff.layers import QuantConv2d, QuantLinear, TimestepGroups
from qdiff.model import act_quantizers, copy_weights, quant_layers, quantize_model, units
from tests.support import golden, tiny

CPU = torch.device("cpu")
W4A8 = QuantConfig(weight_bit=4, quant_act=True, a_sym=True, split=True)
SHORT = CalibrationConfig(num_timesteps=4, samples=16, batch_size=8, iters=60, lr=1e-2, iters_a=40)


def error(model, network, rows):
    with torch.no_grad():
        return golden.relative_error(model(*rows.inputs), network(*rows.inputs))


def test_wrapping_changes_nothing_until_something_is_quantized(network, rows):
    model = quantize_model(network, PIXEL, W4A8)
    assert torch.equal(model(*rows.inputs), network(*rows.inputs))
    shared = {p.data_ptr() for p in network.parameters()}
    assert all(layer.weight.data_ptr() in shared for layer in quant_layers(model).values())
    assert not any(isinstance(m, QuantConv2d) for m in network.modules())


def test_split_layers_are_the_concatenated_shortcuts(network):
    model = quantize_model(network, PIXEL, W4A8)
    splits = {name: layer.split for name, layer in quant_layers(model).items() if layer.split}
    assert splits and all(".nin_shortcut" in name and name.startswith("up.") for name in splits)
    for name, split in splits.items():
        layer = quant_layers(model)[name]
        assert layer.weight_quantizer.integers.shape[1] == split
        assert layer.weight_quantizer_0.integers.shape[1] == layer.weight.shape[1] - split


def test_a_split_layer_quantizes_its_halves_apart():
    torch.manual_seed(0)
    layer = QuantConv2d(nn.Conv2d(6, 4, 1), 4, 8, True, split=2)
    x = torch.cat([torch.randn(3, 2, 5, 5) * 10, torch.randn(3, 4, 5, 5) * 0.1], dim=1)
    halves = []
    for part, (low, high) in zip(layer._parts(layer.weight), ((0, 2), (2, 6)), strict=True):
        lone = QuantConv2d(nn.Conv2d(high - low, 4, 1, bias=False), 4, 8, True)
        lone.weight = part.clone()
        lone.init_weight_scales("mse")
        lone.act_quantizer.set_qparams(x[:, low:high].abs().max() / 127, torch.tensor(0.0))
        lone.act_quantizer.enabled = True
        halves.append((lone, x[:, low:high]))
    layer.init_weight_scales("mse")
    for quantizer, (lone, _) in zip(layer.act_quantizers, halves, strict=True):
        quantizer.set_qparams(lone.act_quantizer.scale, torch.tensor(0.0))
        quantizer.enabled = True
    expected = sum(lone(part) for lone, part in halves) + layer.bias[None, :, None, None]
    assert golden.relative_error(layer(x), expected) < 1e-6


def test_double_precision_forms_the_weight_anew():
    layer = QuantLinear(nn.Linear(5, 7), 4, 8, True)
    layer.init_weight_scales("max")
    q = layer.weight_quantizer
    layer.double()
    assert torch.equal(layer.weight, (q.integers.double() - q.zero_point) * q.scale)
    assert q.integers.dtype == torch.uint8 and layer.weight.dtype == torch.float64


def test_an_unknown_layer_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.deconv = nn.ConvTranspose3d(3, 3, 2)

    architecture = Architecture("odd", make_unet=lambda _: Odd(), blocks={})
    with pytest.raises(TypeError, match=r"deconv: ConvTranspose3d has no quantized form"):
        quantize_model(Odd(), architecture, W4A8)


def test_time_projections_are_units_of_their_own(network, rows):
    model = quantize_model(network, PIXEL, W4A8)
    order = trace_execution(model, units(model, PIXEL), rows, CPU).units
    assert order[0] == "temb.dense.0" and order[-1] == "conv_out"
    assert order.index("mid.block_1.temb_proj") < order.index("mid.block_1") < order.index("mid.attn_1")
    covered = [
        name for name in quant_layers(model) if name in order or any(name.startswith(unit + ".") for unit in order)
    ]
    assert set(covered) == set(quant_layers(model))


def test_ranges_come_from_all_time_steps(network, rows):
    """One huge row of the last time step must widen the first quantizer's range, with running statistics or not."""
    x, t = (tensor.clone() for tensor in rows.inputs)
    x[-1] *= 50
    for running in (False, True):
        model = quantize_model(network, PIXEL, W4A8)
        init_activation_ranges(
            model, CalibrationData((x, t)), W4A8.act_scale_method, CalibrationConfig(running_stat=running), CPU
        )
        plain = quantize_model(network, PIXEL, W4A8)
        init_activation_ranges(plain, rows, W4A8.act_scale_method, CalibrationConfig(running_stat=running), CPU)
        grown, before = (m.conv_in.act_quantizer.scale.item() for m in (model, plain))
        assert grown > (10 if not running else 1.5) * before


class Attending(nn.Module):
    """One attention of the latent family, called as networks are."""

    def __init__(self):
        super().__init__()
        self.attention = CrossAttention(32, 4)

    def forward(self, x, t):
        return self.attention(x)


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("change", [{}, {"running_stat": True}, {"timestep_groups": 2}])
def test_ranges_do_not_depend_on_the_slices_of_an_attention(monkeypatch, method, change):
    torch.manual_seed(0)
    heads = torch.linspace(0.2, 3, 4).repeat_interleave(8)
    network = Attending().requires_grad_(False)
    network.attention.to_q.weight *= heads[:, None]  # heads of very different ranges: no slice stands for all
    rows = CalibrationData((torch.randn(12, 16, 32) * torch.linspace(0.5, 2, 12)[:, None, None], torch.arange(12.0)))
    bounds = timestep_group_bounds(rows, change["timestep_groups"]) if "timestep_groups" in change else ()
    quant = QuantConfig(quant_act=True, act_scale_method=method, time_bounds=bounds)
    architecture = Architecture("attending", lambda _: None, {}, attention_matmuls=LATENT.attention_matmuls)
    monkeypatch.setattr(
        "qdiff.calibration.ranges.RULE_ELEMENTS", 2**13
    )  # fewer than there are, so that samples stand for all
    found = []
    for size in (2**28, 1):
        monkeypatch.setattr("ldm.attention.SLICE_BYTES", size)
        model = quantize_model(network, architecture, quant)
        init_activation_ranges(
            model, rows, quant.act_scale_method, CalibrationConfig(running_stat="running_stat" in change), CPU
        )
        with torch.no_grad():
            output = golden.relative_error(model(*rows.inputs), network(*rows.inputs))
        found.append(
            (
                output,
                {
                    name.rpartition("_")[2]: q.scale
                    for name, q in act_quantizers(model.attention).items()
                    if name[:2] in ("qk", "av")
                },
            )
        )
    (whole, scales), (sliced, others) = found
    assert set(scales) == {"q", "k", "v", "w"} and sliced < 1.1 * whole
    for name, scale in scales.items():
        exact = bounds or (method == "max" and name != "w")
        assert torch.allclose(others[name], scale, rtol=1e-6 if exact else 0.05), name


def test_ranges_take_fewer_samples_where_memory_does_not_suffice(network, rows, caplog):
    model = quantize_model(network, PIXEL, W4A8)
    sizes = []

    def small(_, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 20:
            raise RuntimeError("MPS backend out of memory")

    with model.register_forward_pre_hook(small):
        init_activation_ranges(model, rows, W4A8.act_scale_method, CalibrationConfig(running_stat=True), CPU)
    assert (
        sizes[:3] == [64, 32, 16]
        and max(sizes[2:]) == 16
        and sum(sizes[3:]) == len(rows)
        and "taking 16" in caplog.text
    )


def test_weights_of_one_network_serve_other_activations(network, rows, tmp_path):
    """`--resume_w`: the activations are those asked for, whatever the file with the weights was made with."""
    first = Calibration(network, PIXEL, replace(W4A8, quant_act=False), replace(SHORT, iters=2), rows).run()
    quant = replace(W4A8, act_bit=4, a_sym=False)
    target = quantize_model(network, PIXEL, quant)
    copy_weights(first, target)
    model = Calibration(network, PIXEL, quant, replace(SHORT, iters_a=2), rows, target).run()
    assert all(q.n_bits == 4 and not q.symmetric for q in model.conv_in.act_quantizers)
    integers = {name: layer.weight_quantizer.integers for name, layer in quant_layers(first).items()}
    assert all(
        torch.equal(layer.weight_quantizer.integers, integers[name]) for name, layer in quant_layers(model).items()
    )
    save_packed(
        tmp_path / "packed.safetensors", model, PackedInfo(PIXEL.name, unet_config_dict(tiny.MODEL), quant, {}, "")
    )
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "packed.safetensors")[0](*rows.inputs), model(*rows.inputs))


def test_a_layer_at_two_paths_is_quantized_at_both():
    net = nn.Module()
    net.first = net.alias = nn.Linear(4, 4)
    net.forward = net.alias.forward
    model = quantize_model(net, Architecture("tied", lambda _: None, {}), QuantConfig())
    assert isinstance(model.alias, QuantLinear) and model.alias is model.first


def test_a_missing_attention_matmul_is_named():
    architecture = Architecture(
        "odd", lambda _: None, {}, attention_matmuls={nn.Sequential: {"qk": AttentionMatMulSpec(("q", "k"))}}
    )
    with pytest.raises(TypeError, match="Sequential has no attention matmul qk"):
        quantize_model(nn.Sequential(nn.Linear(4, 4)), architecture, QuantConfig())


def test_a_split_linear_layer_splits_channels_not_tokens():
    layer = QuantLinear(nn.Linear(12, 4), 8, 8, True, split=8)
    layer.init_weight_scales("max")
    assert [q.integers.shape for q in layer.weight_quantizers] == [(4, 8), (4, 4)]
    seen = []
    for q in layer.act_quantizers:
        q.observer = lambda x: seen.append(tuple(x.shape))
    layer(torch.randn(2, 5, 12))
    assert seen == [(2, 5, 8), (2, 5, 4)]


def test_running_statistics_of_softmax_only(network, rows):
    scales = {}
    for only in (False, True):
        model = quantize_model(network, PIXEL, W4A8)
        init_activation_ranges(
            model, rows, W4A8.act_scale_method, CalibrationConfig(running_stat=True, rs_sm_only=only), CPU
        )
        scales[only] = {name: q.scale.item() for name, q in act_quantizers(model).items()}
    plain = quantize_model(network, PIXEL, W4A8)
    init_activation_ranges(plain, rows, W4A8.act_scale_method, CalibrationConfig(), CPU)
    assert scales[True]["conv_in.act_quantizer"] == plain.conv_in.act_quantizer.scale.item()
    assert len(rows) <= 64 or scales[False]["conv_in.act_quantizer"] != scales[True]["conv_in.act_quantizer"]


def test_calibration_beats_nearest_rounding_and_leaves_the_model_alone(caplog):
    """Every unit ends nearer to full precision than nearest rounding leaves it, and so does the whole network.

    A random network gains little as a whole (its errors are not those of a trained one): the units are what is judged.
    """
    caplog.set_level(logging.INFO, "qdiff.calibration")
    network = tiny.unet(config=replace(tiny.MODEL, ch_mult=(1,), attn_resolutions=(8,)))
    rows = tiny.rows(network)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    recipe = CalibrationConfig(num_timesteps=4, samples=16, batch_size=16, iters=60, lr=3e-2, iters_a=0)
    weights = QuantConfig(weight_bit=4, split=True)
    nearest = Calibration(network, PIXEL, weights, recipe, rows).nearest()
    calibrated = Calibration(network, PIXEL, weights, recipe, rows).run()
    pairs = [tuple(map(float, found)) for found in re.findall(r"validation loss (\S+) -> (\S+), ", caplog.text)]
    assert len(pairs) == len(units(calibrated, PIXEL))
    ratios = [after / start for start, after in pairs]
    assert max(ratios) <= 1 and sum(ratios) / len(ratios) < 0.75
    assert error(calibrated, network, rows) < error(nearest, network, rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not calibrated.training and not network.training


def test_calibration_repeats_bit_for_bit(network, rows):
    config = CalibrationConfig(num_timesteps=4, samples=16, batch_size=8, iters=5, lr=1e-2, iters_a=5)
    first, second = (Calibration(network, PIXEL, W4A8, config, rows).run().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_is_off_while_calibrating(network, rows):
    training = tiny.unet()
    training.train()
    calibrated = Calibration(
        training, PIXEL, W4A8, CalibrationConfig(num_timesteps=4, samples=16, iters=3, iters_a=0), rows
    ).run()
    assert not any(module.training for module in calibrated.modules())
    reference = Calibration(
        network, PIXEL, W4A8, CalibrationConfig(num_timesteps=4, samples=16, iters=3, iters_a=0), rows
    ).run()
    assert torch.equal(calibrated(*rows.inputs), reference(*rows.inputs))


def _unit(n_bits=4):
    torch.manual_seed(0)
    layer = QuantLinear(nn.Linear(16, 8), n_bits, 8, True)
    x = torch.randn(128, 4) @ torch.randn(4, 16)  # few directions, as the activations of a trained network have
    target = nn.functional.linear(x, layer.weight, layer.bias)
    return layer, UnitData(lambda index: ((x[index],), target[index]), range(112), range(112, 128), 32)


def test_adaround_beats_nearest_on_one_layer():
    layer, data = _unit()
    result = reconstruct_weights(layer, [layer], data, "max", CalibrationConfig(iters=400, lr=1e-2), 0, lambda _: None)
    assert result.after < 0.8 * result.before
    assert result.after == pytest.approx(data.validation_loss(layer, 2.0))


def test_a_diverging_activation_phase_keeps_the_start():
    layer, data = _unit(8)
    layer.init_weight_scales("max")
    layer.act_quantizer.set_qparams(data.read(slice(None))[0][0].abs().max() / 127, torch.tensor(0.0))
    layer.act_quantizer.enabled = True
    start = layer.act_quantizer.scale.clone()
    wild = CalibrationConfig(iters_a=10, lr_a=1e3)
    result = reconstruct_activations(layer, layer.act_quantizers, data, wild, 0, lambda _: None)
    assert result.after == result.before and torch.equal(layer.act_quantizer.scale, start)


def test_activation_phase_mends_a_bad_scale():
    layer, data = _unit(8)
    layer.init_weight_scales("max")
    layer.act_quantizer.set_qparams(data.read(slice(None))[0][0].abs().max() / 127 * 4, torch.tensor(0.0))
    layer.act_quantizer.enabled = True
    config = CalibrationConfig(iters_a=200, lr_a=1e-2)
    result = reconstruct_activations(layer, layer.act_quantizers, data, config, 0, lambda _: None)
    assert result.after < 0.5 * result.before
    assert result.after == pytest.approx(data.validation_loss(layer, config.p))


def test_sixteen_bit_softmax_stays_fixed(network, rows):
    quant = QuantConfig(weight_bit=4, quant_act=True, sm_abit=16, split=True)
    model = Calibration(
        network, PIXEL, quant, CalibrationConfig(num_timesteps=4, samples=16, iters=2, iters_a=0), rows
    ).run()
    kept = {name: q.scale.clone() for name, q in act_quantizers(model).items() if q.is_softmax}
    block = model.mid.attn_1
    x = torch.randn(64, 32, 4, 4)
    data = UnitData(lambda index: ((x[index],), network.mid.attn_1(x[index])), range(48), range(48, 64), 16)
    quantizers = list(act_quantizers(block).values())
    reconstruct_activations(block, quantizers, data, CalibrationConfig(iters_a=10, lr_a=1e-2), 0, lambda _: None)
    assert kept and all(torch.equal(act_quantizers(model)[name].scale, scale) for name, scale in kept.items())


# --- calibration sets ---------------------------------------------------------------------------


def test_recorder_keeps_steps_spread_over_the_whole_trajectory():
    recorder = Recorder(4, 50)
    for step in range(50):
        recorder(torch.full((2, 1), float(step)), torch.full((2,), float(step)), torch.zeros(2, 1))
    assert [t[0].item() for t in recorder.ts] == [0, 12, 25, 37]


def test_sets_round_trip_and_select(tmp_path):
    data = CalibrationSet([torch.randn(5, 3, 8, 8) for _ in range(6)], [torch.full((5,), float(i)) for i in range(6)])
    save_set(tmp_path / "set.pt", data)
    loaded = load_set(tmp_path / "set.pt", (3, 8, 8))
    chosen = loaded.select(3, 2)
    assert chosen.inputs[1].tolist() == [0, 0, 2, 2, 4, 4]
    assert torch.equal(chosen.inputs[0][2:4], data.xs[2][:2])
    assert loaded.select(4, 1).inputs[1].tolist() == [0, 1, 3, 4], "spread to the end where the number does not divide"


def test_conditional_and_unconditional_rows_are_both_used(tmp_path):
    cs, ucs = ([torch.full((4, 7, 2), value) for _ in range(2)] for value in (1.0, 2.0))
    data = CalibrationSet([torch.randn(4, 3, 8, 8) for _ in range(2)], [torch.zeros(4)] * 2, cs, ucs)
    save_set(tmp_path / "set.pt", data)
    x, t, context = load_set(tmp_path / "set.pt", (3, 8, 8), context_dim=2).select(2, 3).inputs
    assert len(x) == len(t) == len(context) == 12
    assert context[:6].eq(1).all() and context[6:].eq(2).all() and torch.equal(x[:6], x[6:])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": 1}, "xs and ts"),
        ({"xs": [torch.zeros(2, 3, 4, 4)], "ts": [torch.zeros(2)]}, "expected"),
        ({"xs": [torch.zeros(2, 3, 8, 8)], "ts": []}, "different lengths"),
        ({"xs": [torch.full((2, 3, 8, 8), float("nan"))], "ts": [torch.zeros(2)]}, "finite"),
        (
            {"xs": [torch.zeros(2, 3, 8, 8)], "ts": [torch.zeros(2)], "cs": [torch.zeros(2, 7, 4)]},
            "expected ts, xs for an unconditional",
        ),
    ],
)
def test_bad_sets_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "set.pt")
    with pytest.raises(CheckpointError, match=words):
        load_set(tmp_path / "set.pt", (3, 8, 8))


@pytest.mark.parametrize(
    ("rows", "words"),
    [({"cs": 2}, "expected cs, ts, ucs, xs"), ({"cs": 2, "ucs": 3}, "3 contexts in ucs for 2 samples")],
)
def test_bad_sets_of_guided_networks_are_refused(tmp_path, rows, words):
    contexts = {name: [torch.zeros(count, 7, 4)] for name, count in rows.items()}
    torch.save({"xs": [torch.zeros(2, 3, 8, 8)], "ts": [torch.zeros(2)]} | contexts, tmp_path / "set.pt")
    with pytest.raises(CheckpointError, match=words):
        load_set(tmp_path / "set.pt", (3, 8, 8), context_dim=4)


def test_too_few_steps_in_a_set():
    data = CalibrationSet([torch.zeros(2, 3, 8, 8)], [torch.zeros(2)])
    with pytest.raises(CheckpointError, match=r"^num_timesteps 2: the calibration set holds 1 time steps"):
        data.select(2, 1)


@pytest.mark.parametrize("settings", [{"weight_bit": 1}, {"weight_bit": 17}, {"act_bit": 0}, {"quant_mode": "x"}])
def test_bad_widths_are_refused(settings):
    with pytest.raises(ConfigError):
        QuantConfig(**settings).validate()


# --- timestep groups ----------------------------------------------------------------------------


@torch.no_grad()
def test_timestep_groups_round_trip_and_serve_samples_of_different_times(network, rows, tmp_path):
    """A batch of mixed times equals its samples one by one.

    The packed file keeps the groups, the published format refuses them.
    """
    quant = replace(W4A8, time_bounds=timestep_group_bounds(rows, 3))
    assert len(quant.time_bounds) == 2
    model = Calibration(network, PIXEL, quant, replace(SHORT, iters=3, iters_a=3, iters_tune=3), rows).run()
    scales = [q.scale for q in act_quantizers(model).values()]
    assert all(scale.shape == (3,) for scale in scales) and any(scale.unique().numel() == 3 for scale in scales)
    x, t = (part[::7].double() for part in rows.inputs)
    model.double()
    together = model(x, t)
    apart = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(len(x))])
    assert golden.relative_error(together, apart) < 1e-9
    model.float()
    info = PackedInfo(PIXEL.name, unet_config_dict(tiny.MODEL), quant, {}, "")
    save_packed(tmp_path / "groups.safetensors", model, info)
    loaded, read = load_packed(tmp_path / "groups.safetensors")
    assert read.config == quant and torch.equal(loaded(*rows.inputs), model(*rows.inputs))
    with pytest.raises(CheckpointError, match="timestep groups"):
        save_published(tmp_path / "groups.pth", model, PIXEL, network.state_dict(), activations=True)


def test_groups_have_equally_many_time_steps():
    rows = CalibrationData((torch.zeros(6, 1), torch.tensor([0.0, 10.0, 20.0, 30.0, 40.0, 50.0])))
    assert timestep_group_bounds(rows, 3) == (15.0, 35.0)
    groups = TimestepGroups((15.0, 35.0))
    groups.set(rows.inputs[1])
    assert groups.current.tolist() == [0, 0, 1, 1, 2, 2]
    groups.set(torch.tensor([36.0, 49.0]))
    assert groups.current == 2
    with pytest.raises(ConfigError, match="timestep_groups 7"):
        timestep_group_bounds(rows, 7)


def test_a_group_without_samples_takes_its_neighbors_range(network, rows):
    quant = replace(W4A8, time_bounds=(*timestep_group_bounds(rows, 2), 2000.0))
    model = quantize_model(network, PIXEL, quant)
    init_activation_ranges(model, rows, quant.act_scale_method, SHORT, CPU)
    scale = model.conv_in.act_quantizer.scale
    assert scale.shape == (3,) and scale[1] == scale[2]
