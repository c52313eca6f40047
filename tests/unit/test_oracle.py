"""The code of this project against `tests.support.oracle`, which was written from the papers in float64.

Both sides compute in float64 wherever our code allows it, and then they agree to a few units of the last
place. Scales are stored in float32, so they agree to its last place. Zero points and integers must be
equal.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ddim.samplers
import ldm.samplers
from ddim.config import DiffusionConfig
from ddim.family import PIXEL
from ddim.schedule import make_alphas_cumprod
from ddim.unet import AttnBlock
from ldm.attention import AttentionBlock, CrossAttention
from ldm.config import load_config
from ldm.family import LATENT
from ldm.samplers import Guided
from qdiff import quantizers as Q
from qdiff.config import QuantConfig
from qdiff.layers import ActQuantizer, QuantConv1d, QuantConv2d, QuantLayer, QuantLinear, WeightQuantizer
from qdiff.model import act_quantizers, enable_activations, init_weights, quantize_model
from qdiff.scale_rules import choose_qparams
from tests.support import oracle

WIDTHS = (2, 3, 4, 8, 16)
RULES = ("max", "max_scale", "mse")
FLOAT32 = 2.0**-24  # a number that is rounded to float32 moves by at most this part of itself
EXACT = 1e-12


def error(found: Tensor, expected: np.ndarray | float) -> float:
    """Relative L2 error of a tensor, which must have the shape and the precision of the reference."""
    expected = np.asarray(expected)
    assert tuple(found.shape) == expected.shape
    difference = np.linalg.norm(found.detach().double().numpy() - expected)
    return float(difference / max(np.linalg.norm(expected), 1e-300))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64 that float32 holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def array(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


# --- the quantizer and its scales --------------------------------------------------------------------


def data_of_each_kind() -> dict[str, Tensor]:
    """Data [4, 150] of several shapes, with channels of several sizes.

    In `outlier`, all values but one are on a 2-bit grid that ends at 0.21 of the range, the last candidate of
    the rule `mse`.
    """
    x = normal(4, 150, seed=1) * torch.tensor([[0.01], [0.3], [1.0], [20.0]]).double()
    kinds = {
        "signed": x,
        "skewed": x.exp().clamp(max=50),
        "positive": x.abs() + 0.5,
        "negative": -x.abs() - 0.2,
        "tailed": x**3,
    }
    kinds["outlier"] = torch.arange(600).reshape(4, 150) % 4 * 0.07
    kinds["outlier"][:, 7] = 1.0
    return {name: values.float().double() for name, values in kinds.items()}


@pytest.mark.parametrize("rule", RULES)
def test_scales(rule):
    cases = itertools.product(data_of_each_kind().items(), WIDTHS, (False, True), (False, True))
    for (kind, x), n_bits, symmetric, always_zero in cases:
        if kind == "negative" and always_zero and not symmetric:
            continue  # probabilities are not negative: the range has no scale
        settings = {"symmetric": symmetric, "always_zero": always_zero}
        for channel_wise in (False, True):
            case = (kind, rule, n_bits, symmetric, always_zero, channel_wise)
            scale, zero = choose_qparams(x, n_bits, channel_wise=channel_wise, method=rule, **settings)
            reference = oracle.channel_scales if channel_wise else oracle.scale
            expected_delta, expected_zero = reference(array(x), n_bits, rule, **settings)
            assert error(scale, expected_delta) <= (4 if rule == "mse" else 1) * FLOAT32, case
            assert np.array_equal(array(zero), expected_zero), case


def test_degenerate_ranges_get_the_least_scale():
    """The zero point of a constant negative channel exceeds 2^24; float32 does not hold them all."""
    for value, rule, symmetric in itertools.product((0.0, 2.0, -0.1914), RULES, (False, True)):
        x = torch.full((3, 5), value)
        scale, zero = choose_qparams(x, 4, method=rule, symmetric=symmetric)
        expected = oracle.scale(array(x), 4, rule, symmetric)
        assert error(scale, expected[0]) <= 4 * FLOAT32 and error(zero, expected[1]) <= 4 * FLOAT32


def test_integers_and_values():
    """Both sides hold the same scales. Some data are outside the range, some halfway between integers."""
    x = 40 * normal(3, 200, seed=2)
    x[1, :40] = torch.arange(-20, 20) + 0.5
    for n_bits, symmetric, channel_wise in itertools.product(WIDTHS, (False, True), (False, True)):
        scale = torch.tensor([[0.05], [1.0], [7.3]]).double() if channel_wise else torch.tensor(0.5).double()
        zero = torch.zeros_like(scale) if symmetric else (scale * 3 - 9).round()
        quantizer = oracle.Quantizer(array(scale), array(zero), n_bits, symmetric)
        integers = Q.quantize_nearest(x, scale, zero, n_bits, symmetric)
        assert np.array_equal(array(integers), quantizer.integers(array(x)))
        assert error(Q.fake_quantize(x, scale, zero, n_bits, symmetric), quantizer(array(x))) < EXACT
        assert Q.integer_range(n_bits, symmetric) == oracle.grid_limits(n_bits, symmetric)


def test_activation_quantizer_and_its_gradients():
    x = (3 * normal(200, seed=3)).requires_grad_()
    for n_bits, symmetric, always_zero in itertools.product(WIDTHS, (False, True), (False, True)):
        module = ActQuantizer(n_bits, symmetric, always_zero)
        zero = 0.0 if symmetric or always_zero else float(2**n_bits // 3)
        module.set_qparams(torch.tensor(4.0 / 2**n_bits), torch.tensor(zero))
        module = module.double()
        reference = oracle.Quantizer(float(module.scale), zero, n_bits, symmetric)
        assert torch.equal(module(x), x)
        module.enabled = True
        with torch.no_grad():
            assert error(module(x), reference(array(x))) < EXACT
        module.learning = True
        module.scale.requires_grad_()
        y = module(x)
        assert error(y, reference(array(x))) < EXACT
        weights = normal(200, seed=4)
        by_x, by_delta = torch.autograd.grad((weights * y).sum(), [x, module.scale])
        expected_x, expected_delta = oracle.lsq_gradients(array(x), reference.delta, zero, n_bits, symmetric)
        assert error(by_x, expected_x * array(weights)) < EXACT
        # The terms of the sum are up to 2^b times greater than the sum, and they carry the rounding errors of
        # x / delta.
        assert abs(float(by_delta) - (expected_delta * array(weights)).sum()) < EXACT * 2**n_bits


def test_running_ranges():
    batches = [normal(20, seed=seed) * (1 + seed) for seed in range(6)]
    low = high = None
    ranges = oracle.running_ranges([array(batch) for batch in batches])
    for batch, expected in zip(batches, ranges, strict=True):
        low, high = Q.running_range(low, high, batch)
        assert error(low, expected[0]) < 4 * FLOAT32 and error(high, expected[1]) < 4 * FLOAT32
        scale, zero = Q.qparams_from_range(low, high, 8, symmetric=False)
        expected_delta, expected_zero = oracle.scale_of_range(*expected, 8, "max")
        assert error(scale, expected_delta) < 8 * FLOAT32 and float(zero) == expected_zero


# --- AdaRound ----------------------------------------------------------------------------------------


def test_adaround():
    weight, noise = normal(6, 50, seed=5), 3 * normal(6, 50, seed=6)
    noise[:, 0] = 0.0
    for n_bits, rule in itertools.product(WIDTHS, RULES):
        scale, zero = (part.double() for part in choose_qparams(weight, n_bits, channel_wise=True, method=rule))
        w, d, z = array(weight), array(scale), array(zero)
        initial = Q.init_alpha(weight, scale)
        # Near the ends h is flat, and alpha is known less well: so it is compared by the roundings that it
        # gives.
        assert error(Q.rectified_sigmoid(initial), w / d - np.floor(w / d)) < EXACT * 2**n_bits
        assert error(initial, oracle.initial_alpha(w, d)) < EXACT * 2**n_bits
        for alpha in (initial, noise):
            a = array(alpha)
            assert error(Q.rectified_sigmoid(alpha), oracle.rectified_sigmoid(a)) < EXACT
            soft = Q.soft_round(weight, alpha, scale, zero, n_bits)
            assert error(soft, oracle.soft_rounded(w, a, d, z, n_bits)) < EXACT
            integers = Q.hard_integers(weight, alpha, scale, zero, n_bits)
            assert np.array_equal(array(integers), oracle.hard_rounded(w, a, d, z, n_bits))
            saturated = Q.alpha_from_integers(weight, integers, scale, zero)
            assert np.array_equal(array(integers), oracle.hard_rounded(w, array(saturated), d, z, n_bits))
            for beta in (20.0, 7.5, 2.0):
                expected = oracle.rounding_regularizer(a, beta)
                assert error(Q.rounding_regularizer(alpha, beta), expected) < EXACT


def test_beta_schedule():
    for total, warmup in ((20, 0.2), (1000, 0.2), (7, 0.5), (50, 0.0)):
        for step in range(total + 1):
            found = Q.beta_schedule(step, total, warmup)
            assert math.isclose(found, oracle.beta_at(step, total, warmup), rel_tol=EXACT)


# --- layers ------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 2, "groups": 2},
    {"kernel_size": 3, "groups": 4, "padding": 2, "dilation": 2, "bias": False},
]
CONVOLUTIONS_2D = [{"kernel_size": (3, 1), "stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)}]


def float_layers(channels: int = 4, grouped: bool = True) -> Iterator[nn.Module]:
    """Layers of every quantized kind with `channels` input channels; their output channels differ in size."""
    torch.manual_seed(0)
    settings = [one for one in CONVOLUTIONS if grouped or one.get("groups", 1) == 1]
    layers: list[nn.Module] = [nn.Conv2d(channels, 4, **one) for one in settings + CONVOLUTIONS_2D]
    layers += [nn.Conv1d(channels, 8, **one) for one in settings]
    layers += [nn.Linear(channels, 5), nn.Linear(channels, 3, bias=False)]
    for layer in layers:
        layer.requires_grad_(False)
        layer.weight.mul_(torch.rand(len(layer.weight), *[1] * (layer.weight.dim() - 1)) + 0.1)
        yield layer


def reference_layer(layer: nn.Module) -> oracle.Layer:
    """The oracle's product for a layer of PyTorch."""
    if isinstance(layer, nn.Linear):
        return oracle.linear

    def product(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        return oracle.convolution(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    return product


def quantized(layer: nn.Module, n_bits: int, rule: str, symmetric: bool, split: int = 0) -> QuantLayer:
    """The quantized form of a layer in float64; its 6-bit inputs clamp some standard normal numbers."""
    kind = {nn.Conv2d: QuantConv2d, nn.Conv1d: QuantConv1d, nn.Linear: QuantLinear}[type(layer)]
    found = kind(layer, n_bits, 6, symmetric, split)
    found.init_weight_scales(rule)
    for number, quantizer in enumerate(found.act_quantizers):
        zero = 0.0 if symmetric else 30.0 - 7 * number
        quantizer.set_qparams(torch.tensor(0.07 + 0.03 * number), torch.tensor(zero))
        quantizer.enabled = True
    return found.double()


def of_act(quantizer: ActQuantizer) -> oracle.Quantizer:
    scale, zero_point = float(quantizer.scale), float(quantizer.zero_point)
    return oracle.Quantizer(scale, zero_point, quantizer.n_bits, quantizer.symmetric)


def of_weight(quantizer: WeightQuantizer) -> oracle.Quantizer:
    return oracle.Quantizer(array(quantizer.scale), array(quantizer.zero_point), quantizer.n_bits)


def check_weight(quantizer: WeightQuantizer, weight: np.ndarray, rule: str) -> None:
    """Scales by the rule, and the integers of these scales."""
    scale, zero = oracle.channel_scales(weight, quantizer.n_bits, rule)
    assert error(quantizer.scale, scale) <= 4 * FLOAT32
    assert np.array_equal(array(quantizer.zero_point), zero)
    assert np.array_equal(array(quantizer.integers), of_weight(quantizer).integers(weight))


def input_of(layer: nn.Module) -> Tensor:
    """[2, 3, features] for a linear layer, [2, channels, 5, ...] for a convolution."""
    if isinstance(layer, nn.Linear):
        return normal(2, 3, layer.in_features, seed=7)
    return normal(2, layer.in_channels, *[5] * (layer.weight.dim() - 2), seed=7)


def test_layers():
    settings = itertools.cycle(itertools.product(WIDTHS, RULES, (False, True)))
    for layer, _ in itertools.product(float_layers(), range(3)):
        n_bits, rule, symmetric = next(settings)
        weight, bias = array(layer.weight), None if layer.bias is None else array(layer.bias)
        found, x = quantized(layer, n_bits, rule, symmetric), input_of(layer)
        check_weight(found.weight_quantizer, weight, rule)
        quantizers = of_weight(found.weight_quantizer), of_act(found.act_quantizer)
        expected = oracle.quantized_layer(reference_layer(layer), array(x), weight, bias, *quantizers)
        assert error(found(x), expected) < EXACT, (layer, n_bits, rule, symmetric)


def test_split_layers():
    """Of the five input channels the first three are `h`; those of a linear layer are its last dimension."""
    settings = itertools.cycle(itertools.product(WIDTHS, RULES, (False, True)))
    for layer, _ in itertools.product(float_layers(5, grouped=False), range(3)):
        n_bits, rule, symmetric = next(settings)
        weight, bias = array(layer.weight), None if layer.bias is None else array(layer.bias)
        found, x = quantized(layer, n_bits, rule, symmetric, split=3), input_of(layer)
        weights = weight[:, :3], weight[:, 3:]
        halves = np.split(array(x), [3], axis=-1 if isinstance(layer, nn.Linear) else 1)
        for quantizer, part in zip(found.weight_quantizers, weights, strict=True):
            check_weight(quantizer, part, rule)
        of_weights = tuple(map(of_weight, found.weight_quantizers))
        of_acts = tuple(map(of_act, found.act_quantizers))
        product = reference_layer(layer)
        expected = oracle.split_layer(product, *halves, *weights, bias, of_weights, of_acts)
        assert error(found(x), expected) < EXACT, (layer, n_bits, rule, symmetric)


# --- attentions --------------------------------------------------------------------------------------


class Block:
    """A quantized block in float64 beside its full-precision weights, for the oracle."""

    def __init__(self, block: nn.Module, family: object, config: QuantConfig) -> None:
        torch.manual_seed(8)
        for parameter in block.requires_grad_(False).parameters():
            parameter.normal_(0, 0.7)
        self.config = config
        self.weights = {name: array(parameter) for name, parameter in block.named_parameters()}
        self.model = quantize_model(block, family, config)
        init_weights(self.model, "max")
        enable_activations(self.model, True)
        for number, (name, quantizer) in enumerate(sorted(act_quantizers(self.model).items())):
            scale, zero = self.scale(name, quantizer, number, family is PIXEL)
            quantizer.set_qparams(torch.tensor(scale), torch.tensor(zero))
        self.model = self.model.double()

    @staticmethod
    def scale(name: str, quantizer: ActQuantizer, number: int, pixel: bool) -> tuple[float, float]:
        """A scale and a zero point: probabilities reach 1, other operands reach 3, 4, or 5 on both sides.

        Only in the pixel family do unsigned probabilities have a zero point, as every other activation does.
        """
        low, high = oracle.grid_limits(quantizer.n_bits, quantizer.symmetric)
        if quantizer.is_softmax:
            return 1.0 / high, 1.0 if pixel and not quantizer.symmetric else 0.0
        top = 3.0 + number % 3
        if quantizer.symmetric:
            return top / high, 0.0
        return 2 * top / (high - low), float((high + 1) // 2 - number)

    def layer(self, name: str, x: np.ndarray, product: oracle.Layer) -> np.ndarray:
        """What the oracle gives for one of the block's layers."""
        layer = self.model.get_submodule(name)
        quantizers = of_weight(layer.weight_quantizer), of_act(layer.act_quantizer)
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return oracle.quantized_layer(product, x, weight, bias, *quantizers)

    def operands(self, first: str, second: str) -> oracle.AttentionQuantizers:
        """The quantizers of q, k, v, and w, after a check of their widths and signs."""
        found = {}
        for path in (first, second):
            for name, quantizer in self.model.get_submodule(path).named_children():
                found[name.removeprefix("act_quantizer_")] = of_act(quantizer)
        widths = {name: quantizer.n_bits for name, quantizer in found.items()}
        assert widths == dict.fromkeys("qkv", self.config.act_bit) | {"w": self.config.sm_abit}
        assert all(found[name].symmetric == self.config.a_sym for name in "qkv")
        return oracle.AttentionQuantizers(**found)


WIDTHS_OF_ATTENTION = list(itertools.product((4, 8), (4, 8, 16), (False, True)))  # act_bit, sm_abit, a_sym


def configurations() -> Iterator[QuantConfig]:
    for act_bit, sm_abit, a_sym in WIDTHS_OF_ATTENTION:
        yield QuantConfig(4, act_bit, quant_act=True, sm_abit=sm_abit, a_sym=a_sym)


def pointwise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """A convolution with a kernel of one pixel, of [N, C, T] or [N, C, H, W]."""
    ones, zeros = [1] * (x.ndim - 2), [0] * (x.ndim - 2)
    return oracle.convolution(x, weight, bias, ones, zeros, ones)


def test_pixel_attention():
    x = 0.003 * normal(2, 4, 3, 2, seed=9)  # so small that the epsilon of the norm counts
    for config in configurations():
        block = Block(AttnBlock(4, 2), PIXEL, config)
        operands = block.operands("qk", "av")
        assert operands.w.symmetric == config.a_sym
        h = oracle.group_norm(array(x), 2, block.weights["norm.weight"], block.weights["norm.bias"], 1e-6)
        q, k, v = (block.layer(name, h, pointwise) for name in "qkv")
        h = block.layer("proj_out", oracle.pixel_attention(q, k, v, operands), pointwise)
        assert error(block.model(x), array(x) + h) < EXACT, config


def test_qkv_attention():
    x = 0.01 * normal(2, 8, 3, 2, seed=10)
    for config in configurations():
        block = Block(AttentionBlock(8, 2, 4), LATENT, config)
        operands = block.operands("attention.qkv_matmul", "attention.smv_matmul")
        assert not operands.w.symmetric and operands.w.zero_point == 0
        tokens = array(x).reshape(2, 8, 6)
        h = oracle.group_norm(tokens, 4, block.weights["norm.weight"], block.weights["norm.bias"], 1e-5)
        h = oracle.qkv_attention(block.layer("qkv", h, pointwise), 2, operands)
        expected = tokens + block.layer("proj_out", h, pointwise)
        assert error(block.model(x), expected.reshape(2, 8, 3, 2)) < EXACT, config


@pytest.mark.parametrize("context_dim", [None, 5])
def test_cross_attention(context_dim):
    x, context = normal(2, 4, 6, seed=11), None if context_dim is None else normal(2, 3, context_dim, seed=12)
    for config in configurations():
        block = Block(CrossAttention(6, 3, context_dim), LATENT, config)
        operands = block.operands("qk", "av")
        assert operands.w.symmetric == config.a_sym and operands.w.zero_point == 0
        inputs = {
            "to_q": x,
            "to_k": x if context is None else context,
            "to_v": x if context is None else context,
        }
        q, k, v = (block.layer(name, array(values), oracle.linear) for name, values in inputs.items())
        expected = block.layer("to_out.0", oracle.cross_attention(q, k, v, 3, operands), oracle.linear)
        assert error(block.model(x, context), expected) < EXACT, config


# --- samplers ----------------------------------------------------------------------------------------

PIXEL_ALPHAS = oracle.alpha_bars(oracle.linear_betas(1e-4, 0.02))
LATENT_ALPHAS = oracle.alpha_bars(oracle.latent_betas(0.0015, 0.0195))
SHAPE = (2, 3, 4)


def eps(x: np.ndarray, t: float) -> np.ndarray:
    """A smooth noise prediction from the sample and the time; networks are given the time in float32."""
    t = float(np.float32(t))
    return np.tanh(x * (0.6 + 0.4 * t / 1000)) + 0.2 * np.cos(3 * x + t / 90)


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    """`eps` as the project's samplers call it."""
    assert x.dtype == torch.float64 and t.shape == (len(x),) and bool((t == t[0]).all())
    return torch.from_numpy(eps(array(x), float(t[0])))


class Noises:
    """The same noise samples for both sides, which must draw the same number of them."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(13)
        self.kept: list[np.ndarray] = []
        self.taken = 0

    def draw(self) -> Tensor:
        self.kept.append(self.random.standard_normal(SHAPE))
        return torch.from_numpy(self.kept[-1])

    def again(self) -> Iterator[np.ndarray]:
        for noise in self.kept:
            self.taken += 1
            yield noise


def sampler_error(
    ours: Callable,
    reference: Callable,
    a_bar: np.ndarray,
    steps: list[int] | int,
    **eta: float,
) -> float:
    """The error of one of our samplers from the oracle's; both have the same start and noise samples.

    The oracle's DPM-Solvers take the number of steps; ours take the grid.
    """
    x, noises = normal(*SHAPE, seed=14), Noises()
    timesteps = ddim.samplers.dpm_solver_timesteps(steps) if isinstance(steps, int) else torch.tensor(steps)
    found = ours(denoiser, x, torch.from_numpy(a_bar), timesteps, noises.draw, **eta)
    result = error(found, reference(eps, array(x), a_bar, steps, noises.again(), **eta))
    assert noises.taken == len(noises.kept)
    return result


def test_schedules_and_steps():
    assert error(make_alphas_cumprod(DiffusionConfig()), PIXEL_ALPHAS) < EXACT
    config = load_config("configs/stable-diffusion/v1-inference.yaml")
    assert error(config.alphas_cumprod, oracle.alpha_bars(oracle.latent_betas(0.00085, 0.012))) < EXACT
    for steps in (*range(2, 60), *range(60, 1001, 37), 100, 300, 400, 500, 501, 999, 1000):
        for skip_type in ("uniform", "quad"):
            assert ddim.samplers.ddim_timesteps(skip_type, steps).tolist() == oracle.pixel_steps(skip_type, steps)
        assert ldm.samplers.latent_timesteps(steps).tolist() == oracle.latent_steps(steps)
        assert ddim.samplers.dpm_solver_orders(steps) == oracle.single_step_orders(steps)


def alpha_in_float64(a_bar: Tensor, t: int) -> Tensor:
    """Stands for `ddim.samplers._alpha`."""
    return a_bar[t] if t >= 0 else torch.ones((), dtype=torch.float64)


def alphas_in_float64(a_bar: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for `ldm.samplers._alphas`."""
    return a_bar[timesteps], torch.cat([a_bar[:1], a_bar[timesteps[:-1]]])


@pytest.fixture(params=["float32", "float64"])
def tables(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The precision in which our samplers look up alpha-bar.

    They do so in float32, and the tolerances of these runs are what that precision allows. In float64 every
    other difference shows.
    """
    if request.param == "float64":
        monkeypatch.setattr(ddim.samplers, "_alpha", alpha_in_float64)
        monkeypatch.setattr(ldm.samplers, "_alphas", alphas_in_float64)
    return request.param


def test_pixel_ddim(tables):
    bound = EXACT if tables == "float64" else 1e-6
    for skip_type, count, eta in itertools.product(("uniform", "quad"), (7, 100), (0.0, 0.4, 1.0)):
        steps = oracle.pixel_steps(skip_type, count)
        found = sampler_error(ddim.samplers.sample_ddim, oracle.pixel_ddim, PIXEL_ALPHAS, steps, eta=eta)
        assert found < bound, (skip_type, count, eta)


def test_pixel_ancestral(tables):
    """In float32, 1 - alpha-bar has three digits at the first time steps. Coefficients are divided by it."""
    bound = EXACT if tables == "float64" else 1e-4
    for skip_type, count in (("uniform", 10), ("uniform", 100), ("quad", 20), ("uniform", 1000)):
        steps = oracle.pixel_steps(skip_type, count)
        found = sampler_error(ddim.samplers.sample_ddpm, oracle.ddpm_noisy, PIXEL_ALPHAS, steps)
        assert found < bound, (skip_type, count)


def test_latent_ddim_and_plms(tables):
    bound = EXACT if tables == "float64" else 1e-6
    for count in (1, 2, 3, 4, 5, 20, 300):
        steps = oracle.latent_steps(count)
        for eta in (0.0, 0.4, 1.0):
            found = sampler_error(ldm.samplers.sample_ddim, oracle.latent_ddim, LATENT_ALPHAS, steps, eta=eta)
            assert found < bound, (count, eta)
        assert sampler_error(ldm.samplers.sample_plms, oracle.plms, LATENT_ALPHAS, steps) < bound, count


def test_latent_ancestral():
    """The coefficients are formed in float64 and then rounded to float32."""
    steps = list(range(1000))
    assert sampler_error(ldm.samplers.sample_ancestral, oracle.ancestral, LATENT_ALPHAS, steps) < 1e-6


def test_dpm_solvers():
    """Their coefficients are formed in float64 throughout."""
    for count in (1, 2, 3, 4, 5, 6, 20):
        ours, reference = ddim.samplers.sample_dpm_solver, oracle.dpm_solver_single
        assert sampler_error(ours, reference, PIXEL_ALPHAS, count) < EXACT, count
    for count in (1, 2, 3, 14, 15, 20):
        ours, reference = ldm.samplers.sample_dpm_solver_2m, oracle.dpm_solver_2m
        assert sampler_error(ours, reference, LATENT_ALPHAS, count) < EXACT, count


def test_guidance():
    """One batch holds the unconditional rows first. Without guidance there are the given contexts alone."""
    x, t = normal(2, 3, 4, seed=15), torch.tensor([40.0, 900.0])
    given, without = normal(2, 5, 3, seed=16), normal(2, 5, 3, seed=17)
    batches = []

    def network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        batches.append(len(x))
        return torch.tanh(x * context.mean((1, 2))[:, None, None] + t[:, None, None] / 1000)

    e_uncond, e_cond = array(network(x, t, without)), array(network(x, t, given))
    batches.clear()
    for scale in (0.0, 0.5, 3.0, 7.5):
        found = Guided(network, given, without, scale)(x, t)
        assert error(found, oracle.guided(e_uncond, e_cond, scale)) < EXACT
    assert batches == [4, 4, 4, 4]
    for plain in (Guided(network, given, without, 1.0), Guided(network, given, None, 7.5)):
        assert error(plain(x, t), e_cond) < EXACT
    assert batches[4:] == [2, 2]
