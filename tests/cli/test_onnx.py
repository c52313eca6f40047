"""Export to ONNX. The integers are checked in the file; ONNX Runtime runs it (the extra `export`)."""

import copy
import statistics
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import qdiff
from ddim.family import PIXEL
from ddim.unet import AttnBlock
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.run import Calibration
from qdiff.checkpoint import PackedInfo, save_packed
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines.onnx import export_onnx, exportable
from qdiff.errors import ConfigError
from qdiff.model import enable_activations, quant_layers
from tests.support import commands, golden, tiny
from tests.support.commands import fails, succeeded
from tests.support.engines import network_of_policy

FLAT = replace(tiny.MODEL, ch_mult=(1,), attn_resolutions=())
DYNAMIC = ({0: "batch", 2: "height", 3: "width"}, {0: "batch"})


class Small(nn.Module):
    """One layer of each kind that the networks have, as exports take a second for ten layers."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.time, self.norm = nn.Linear(8, 8), nn.GroupNorm(4, 8)
        self.down, self.attention = nn.Conv2d(8, 8, 3, stride=2, padding=1), AttnBlock(8, 4)
        self.shortcut = nn.Conv2d(16, 8, 1)  # of a concatenated input

    def forward(self, x, t):
        skip = self.conv_in(x)
        h = self.norm(skip) + self.time(torch.cos(t[:, None] * torch.arange(1, 9) / 50))[:, :, None, None]
        h = nn.functional.interpolate(self.attention(self.down(nn.functional.silu(h))), scale_factor=2.0)
        return self.conv_out(self.shortcut(torch.cat([h, skip], dim=1)))


SMALL = replace(
    PIXEL, name="small", blocks={AttnBlock: "proj_out"}, separate=(), split_points=lambda _: {"shortcut": 8}
)


@pytest.fixture(
    scope="module",
    params=[
        (4, True, "max", True),
        (8, False, "mse", False),
        pytest.param((8, True, "mse", False), marks=pytest.mark.slow),
    ],
)
def case(request):
    bits, symmetric, method, split = request.param
    torch.manual_seed(0)
    network = Small().eval().requires_grad_(False)
    rows = CalibrationData((torch.randn(64, 3, 8, 8), torch.linspace(0, 999, 64)))
    quant = QuantConfig(
        bits,
        quant_act=True,
        a_sym=symmetric,
        split=split,
        quant_mode="linear",
        weight_scale_method=method,
        act_scale_method=method,
    )
    model = Calibration(network, SMALL, quant, CalibrationConfig(), rows).run()
    return model, tuple(part[::8][:8] for part in rows.inputs), bits


def inputs64(inputs):
    return tuple(part.double() for part in inputs)


@torch.no_grad()
def test_what_is_exported_computes_the_same(case):
    model, inputs, _ = case
    assert (
        golden.relative_error(
            exportable(model).double()(*inputs64(inputs)), copy.deepcopy(model).double()(*inputs64(inputs))
        )
        < 1e-6
    )


def test_runtime_and_file_agree_with_the_simulation(case, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, inputs, bits = case
    export_onnx(tmp_path / "model.onnx", model, inputs, DYNAMIC, output="v")
    graph = onnx.load(tmp_path / "model.onnx").graph
    integers = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if ".integers0" in t.name}
    assert len(integers) == len(quant_layers(model))
    if bits == 4:
        assert {t.data_type for t in graph.initializer if ".integers" in t.name} == {onnx.TensorProto.UINT4}
    for name, values in integers.items():
        quantizer = quant_layers(model)[name.split(".integers")[0]].weight_quantizer
        stored = (
            quantizer.integers if values.min() >= 0 else quantizer.integers.double() - quantizer.zero_point.double()
        )
        assert torch.equal(torch.from_numpy(values.astype("float64")), stored.double())
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL  # node by node, as the file says
    session = runtime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["x", "t"] and session.get_outputs()[0].name == "v"
    # in float32 a value on the edge between two integers may fall to either side, so that a row of them differs more
    errors = errors_of(session, model, inputs)
    assert statistics.median(errors) < 1e-5 and max(errors) < 0.05
    x, t = inputs
    assert max(errors_of(session, model, (torch.cat([x, x.flip(3)], 3)[:1], t[:1]))) < 0.05


@torch.no_grad()
def errors_of(session, model, inputs):
    """The relative error of each row of the runtime's outputs."""
    (found,) = session.run(None, dict(zip(("x", "t"), (part.numpy() for part in inputs), strict=True)))
    return [
        golden.relative_error(row, other)
        for row, other in zip(torch.from_numpy(found), exportable(model)(*inputs), strict=True)
    ]


@pytest.mark.parametrize("case", [(4, True, "max", True)], indirect=True)  # scales of activations do not matter
def test_weights_alone_agree_at_every_size(case, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    runtime = pytest.importorskip("onnxruntime")
    model = copy.deepcopy(case[0])
    enable_activations(model, False)
    x, t = case[1]
    export_onnx(tmp_path / "model.onnx", model, case[1], DYNAMIC)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for sized in ((x, t), (torch.cat([x, x.flip(3)], 3)[:3], t[:3]), (torch.cat([x, x.flip(2)], 2)[:1], t[:1])):
        assert max(errors_of(session, model, sized)) < 1e-5


class Upsampler(torch.nn.Module):
    """Transposed convolutions with groups and a given size, and padding that is not zero."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.up = torch.nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, groups=2)
        self.out = torch.nn.ConvTranspose2d(4, 3, 2, stride=2)

    def forward(self, x, t):
        h = torch.relu(self.first(x) + t[:, None, None, None])
        return self.out(self.up(h, output_size=(2 * x.shape[2], 2 * x.shape[3])))


def test_transposed_convolutions_and_padding_modes_are_exported(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    inputs = (torch.randn(8, 3, 6, 5), torch.linspace(0, 1, 8))
    model = qdiff.quantize(Upsampler(), inputs, weight_bit=4, iters=0, iters_a=0, iters_tune=0)
    assert set(quant_layers(model)) == {"first", "up", "out"}
    export_onnx(tmp_path / "model.onnx", model, inputs)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    errors = errors_of(session, model, inputs)
    assert statistics.median(errors) < 1e-5 and max(errors) < 0.05
    with pytest.raises(ConfigError, match="first: computes in bfloat16: expected a network in float32"):
        exportable(model.bfloat16())


POLICY = (
    ("conv_in", "W8A16"),
    ("conv_out", "keep"),
    ("down.0.block.0.conv1", "W6"),
    ("down.0.block.0.conv2", "W12A16"),
    ("mid.block_1.conv1", "A6"),
    ("mid.block_2.conv2", "A12"),
)


def test_the_command_fixes_the_sizes_and_exports_a_policy_but_not_to_the_published_format(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript")
    config = tiny.config_file(tmp_path)
    model, _, quant = network_of_policy(POLICY)
    file = tmp_path / "w4a8.safetensors"
    save_packed(file, model, PackedInfo("pixel", asdict(tiny.MODEL), quant, {}, ""))
    words = ["export.py", "--config", config, "--quant_act", "--split", "--weight_bit", 4, "--cali_ckpt", file]
    succeeded(commands.run(*words, "-o", tmp_path / "a.onnx", "--batch_size", 3, "--W", 32))
    graph = onnx.load(tmp_path / "a.onnx").graph
    shapes = [[axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in graph.input]
    assert shapes == [[3, 3, "height", 32], [3]]
    types = {tensor.data_type for tensor in graph.initializer}
    assert {onnx.TensorProto.UINT4, onnx.TensorProto.UINT16, onnx.TensorProto.INT16} <= types
    fails(commands.run(*words, "-o", tmp_path / "b.onnx", "--H", 33), "--H, --W: 33, expected a multiple of 2")
    fails(commands.run(*words, "-o", tmp_path / "b.pth", "--H", 32), "--H 32: acts only for an .onnx file")
    fails(
        commands.run(*words, "-o", tmp_path / "b.pth", "--cali_iters", 3), "--cali_iters 3: acts only in a calibration"
    )
    fails(commands.run(*words, "-o", tmp_path, "--resume_w"), "expected a name ending in")
    fails(
        commands.run(*words, "-o", tmp_path / "b.pth"),
        "the published format holds no smoothing, but temb.dense.0 has one",
    )
    assert not list(tmp_path.glob("b.*"))


@pytest.mark.parametrize("symmetric", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_policies_and_smoothing_run_in_the_runtime(symmetric, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, rows, _ = network_of_policy(POLICY, FLAT, a_sym=symmetric)
    inputs = tuple(part[::8][:8] for part in rows.inputs)
    with torch.no_grad():
        found = exportable(model).double()(*inputs64(inputs))
        assert golden.relative_error(found, copy.deepcopy(model).double()(*inputs64(inputs))) < 1e-6
    export_onnx(tmp_path / "model.onnx", model, inputs, DYNAMIC)
    graph = onnx.load(tmp_path / "model.onnx").graph
    names = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types = onnx.TensorProto
    assert names["conv_in.acts.0.zero_point"] == (types.INT16 if symmetric else types.UINT16)
    assert names["conv_in.integers0"] == names["down.0.block.0.conv1.integers0"] == types.UINT8
    assert names["down.0.block.0.conv2.integers0"] == types.INT16
    assert names["conv_out.weight"] == types.FLOAT
    assert [names[f"mid.block_{name}.acts.0.zero_point"] for name in ("1.conv1", "2.conv2")] == (
        [types.INT8, types.INT16] if symmetric else [types.UINT8, types.UINT16]
    )
    assert sum(node.op_type == "Clip" for node in graph.node) == 2
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL  # node by node, as the file says
    session = runtime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    errors = errors_of(session, model, inputs)
    assert statistics.median(errors) < 1e-5 and max(errors) < 0.05


def test_what_onnx_cannot_hold_is_named(network, rows):
    quant = QuantConfig(8, quant_act=True, quant_mode="linear")
    model = Calibration(network, PIXEL, replace(quant, time_bounds=(500.0,)), CalibrationConfig(), rows).run()
    with pytest.raises(ConfigError, match="timestep groups"):
        exportable(model)
    model = Calibration(network, PIXEL, quant, CalibrationConfig(), rows).run()
    quant_layers(model)["mid.block_1.conv1"].weight_quantizer.zero_point[0] = -5e6  # as of a constant channel
    with pytest.raises(ConfigError, match=r"mid\.block_1\.conv1: .* 16 bits"):
        exportable(model)
