"""Export to ONNX. The integers are checked in the file; ONNX Runtime runs it (the extra `export`)."""

import copy
import statistics
from dataclasses import replace

import pytest
import torch

from ddim.family import PIXEL
from qdiff.calibration.run import calibrate
from qdiff.config import CalibrationConfig, ConfigError, QuantConfig
from qdiff.model import quant_layers
from qdiff.onnx import export_onnx, exportable
from tests.support import golden, tiny


@pytest.fixture(scope="module", params=[(4, True, "max", True), (8, False, "mse", False), (8, True, "mse", False)])
def case(request):
    bits, symmetric, method, split = request.param
    network = tiny.unet(config=replace(tiny.MODEL, ch_mult=(1,), attn_resolutions=()))  # exports take a second for ten layers
    rows = tiny.rows(network)
    quant = QuantConfig(
        bits, quant_act=True, a_sym=symmetric, split=split, quant_mode="linear", weight_scale_method=method, act_scale_method=method
    )
    model = calibrate(network, PIXEL, quant, CalibrationConfig(), rows)
    return model, tuple(part[::8][:8] for part in rows.inputs), bits


def inputs64(inputs):
    return tuple(part.double() for part in inputs)


@torch.no_grad()
def test_what_is_exported_computes_the_same(case):
    model, inputs, _ = case
    assert golden.relative_error(exportable(model).double()(*inputs64(inputs)), copy.deepcopy(model).double()(*inputs64(inputs))) < 1e-6


def test_runtime_and_file_agree_with_the_simulation(case, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, inputs, bits = case
    export_onnx(tmp_path / "model.onnx", model, inputs)
    graph = onnx.load(tmp_path / "model.onnx").graph
    integers = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if ".integers0" in t.name}
    assert len(integers) == len(quant_layers(model))
    if bits == 4:
        assert {t.data_type for t in graph.initializer if ".integers" in t.name} == {onnx.TensorProto.UINT4}
    for name, values in integers.items():
        quantizer = quant_layers(model)[name.split(".integers")[0]].weight_quantizer
        stored = quantizer.integers if values.min() >= 0 else quantizer.integers.double() - quantizer.zero_point.double()
        assert torch.equal(torch.from_numpy(values.astype("float64")), stored.double())
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL  # node by node, as the file says
    session = runtime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (part.numpy() for part in inputs), strict=True)))
    with torch.no_grad():
        expected = exportable(model)(*inputs)
    # in float32 a value on the edge between two integers may fall to either side, so that a row of them differs more
    errors = [golden.relative_error(row, other) for row, other in zip(torch.from_numpy(found), expected, strict=True)]
    assert statistics.median(errors) < 1e-5 and max(errors) < 0.05


def test_what_onnx_cannot_hold_is_named(network, rows):
    for change, words in (({"act_bit": 6}, "6-bit"), ({"time_bounds": (500.0,)}, "time-step sets")):
        model = calibrate(network, PIXEL, QuantConfig(quant_act=True, quant_mode="linear", **change), CalibrationConfig(), rows)
        with pytest.raises(ConfigError, match=words):
            exportable(model)
    model = calibrate(network, PIXEL, QuantConfig(8, quant_act=True, quant_mode="linear"), CalibrationConfig(), rows)
    quant_layers(model)["mid.block_1.conv1"].weight_quantizer.zero_point[0] = -5e6  # as of a constant channel
    with pytest.raises(ConfigError, match=r"mid\.block_1\.conv1: .* 16 bits"):
        exportable(model)
