"""The scale rules and AdaRound: properties and edge cases."""

import math

import pytest
import torch

from qdiff import quantizers as Q
from qdiff.scale_rules import MSE_NORM, choose_qparams
from tests.support import golden


@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_saturated_alpha_gives_back_any_integers(n_bits):
    torch.manual_seed(n_bits)
    w = torch.randn(8, 20)
    scale, zero = choose_qparams(w, n_bits, channel_wise=True, method="mse")
    down = torch.rand_like(w) < 0.5
    integers = torch.clamp(torch.where(down, (w / scale).floor(), (w / scale).ceil()) + zero, 0, 2**n_bits - 1)
    alpha = Q.alpha_from_integers(w, integers, scale, zero)
    assert torch.equal(Q.hard_integers(w, alpha, scale, zero, n_bits), integers)
    soft = Q.soft_round(w, alpha, scale, zero, n_bits)
    assert golden.relative_error(soft, (integers - zero) * scale) < 1e-6


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n_bits", [2, 3, 8, 16])
def test_error_of_the_max_rule_is_half_a_step(n_bits, symmetric):
    x = torch.linspace(-3, 2, 1001)
    scale, zero = choose_qparams(x, n_bits, symmetric=symmetric)
    error = (Q.fake_quantize(x, scale, zero, n_bits, symmetric) - x).abs().max().item()
    # an asymmetric zero point is rounded too: the far end may be clamped by up to half a step more
    assert error <= scale.item() * (0.5 if symmetric else 1.0) * (1 + 1e-3)


def test_mse_never_does_worse_than_max_in_its_own_norm():
    torch.manual_seed(0)
    x = torch.randn(16, 300) ** 3
    scores = {}
    for method in ("max", "mse"):
        scale, zero = choose_qparams(x, 4, channel_wise=True, method=method)
        scores[method] = (Q.fake_quantize(x, scale, zero, 4, False) - x).abs().pow(MSE_NORM).mean(1)
    assert (scores["mse"] <= scores["max"] * (1 + 1e-6)).all()
    assert (scores["mse"] < scores["max"]).any()


def test_degenerate_range_is_reported(caplog):
    scale, zero = choose_qparams(torch.zeros(10), 8)
    assert scale.item() == pytest.approx(Q.MIN_SCALE) and zero.item() == 0
    assert "degenerate" in caplog.text


def test_gradient_of_the_scale_is_that_of_lsq():
    x = torch.tensor([0.3, -0.2, 5.0, -5.0], dtype=torch.float64)
    scale = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    Q.fake_quantize(x, scale, torch.tensor(0.0, dtype=torch.float64), 4, True).sum().backward()
    inside = sum(round(v / 0.25) - v / 0.25 for v in (0.3, -0.2))
    assert scale.grad.item() == pytest.approx(inside + 7 - 8)


def test_beta_schedule_ends():
    assert Q.beta_schedule(0, 100) == Q.beta_schedule(19, 100) == 20.0
    assert math.isclose(Q.beta_schedule(100, 100), 2.0)
