"""Quantizers, running statistics and AdaRound against the reference data."""

import torch

from qdiff import quantizers as Q
from qdiff.scale_rules import choose_qparams
from tests.support import golden

golden.require()


def test_quantizers():
    data, cases = golden.tensors("units/quantizers.safetensors"), golden.read_json("units/quantizers.json")
    assert len(cases) > 100
    for case in cases:
        x = data[f"src.{case['source']}"]
        scale, zero_point = choose_qparams(
            x,
            case["n_bits"],
            symmetric=case["symmetric"],
            channel_wise=case["channel_wise"],
            method=case["scale_method"],
            always_zero=case["always_zero"],
        )
        assert torch.equal(zero_point, data[f"{case['id']}.zero_point"].float()), case
        assert golden.relative_error(scale, data[f"{case['id']}.delta"]) < 1e-6, case
        y = Q.fake_quantize(x, scale, zero_point, case["n_bits"], case["symmetric"])
        assert golden.relative_error(y, data[f"{case['id']}.dequantized"]) < 1e-6, case


def test_running_statistics():
    data = golden.tensors("units/running_stat.safetensors")
    low, high = Q.running_range(None, None, data["x0"])
    steps = sum(key.startswith("delta") for key in data)
    for j in range(steps):
        low, high = Q.running_range(low, high, data[f"x{j + 1}"])
        scale, zero_point = Q.qparams_from_range(low, high, 8, symmetric=False)
        assert golden.relative_error(scale, data[f"delta{j}"]) < 1e-6
        assert torch.equal(zero_point, data[f"zero_point{j}"].float())


def test_adaround():
    data = golden.tensors("units/adaround.safetensors")
    w, scale, zero = data["w"], data["delta"], data["zero_point"]
    assert golden.relative_error(Q.init_alpha(w, scale), data["alpha_init"]) < 1e-6
    assert golden.relative_error(Q.soft_round(w, data["alpha_init"], scale, zero, 4), data["soft_init"]) < 1e-6
    assert golden.relative_error(Q.soft_round(w, data["alpha"], scale, zero, 4), data["soft"]) < 1e-6
    hard = (Q.hard_integers(w, data["alpha"], scale, zero, 4) - zero) * scale
    assert golden.relative_error(hard, data["hard"]) < 1e-6
    for key in (k for k in data if k.startswith("regulariser_b")):
        beta = float(key.removeprefix("regulariser_b"))
        assert golden.relative_error(Q.rounding_regularizer(data["alpha"], beta), data[key]) < 1e-6
    betas = [Q.beta_schedule(i, 20) for i in range(21)]
    assert golden.relative_error(torch.tensor(betas), data["b_schedule"]) < 1e-6
