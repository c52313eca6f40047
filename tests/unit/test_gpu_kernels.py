"""The Triton kernels in the interpreter: exact in every element, the same for all tiles, of the traffic they state."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qdiff.quantizers import integer_range
from tests.support.interpreter import counting, launches, traffic

GROUP = torch.tensor([1], dtype=torch.int32)  # timestep group 1 of 2
NO_PADDING = (0, 0, 0, 0)  # top, bottom, left, right
TILES = [(64, 64, 32, 1), (32, 32, 32, 1), (128, 32, 64, 1), (64, 32, 64, 3), (32, 64, 32, 4)]


@dataclass(frozen=True)
class Product:
    """A convolution, whose sizes are odd and whose channels are no multiples of 32 unless a case says more."""

    name: str
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    channels: tuple[int, int] = (40, 24)
    image: tuple[int, int, int] = (2, 7, 5)
    bits: int = 8
    symmetric: bool = False
    zero: float = 100
    correct: bool = False  # for a weight of 8 bits, which has a zero point
    packed: bool = False  # for a weight of 4 bits
    added: bool = False  # bias, shift and residual
    dtype: torch.dtype = torch.float32


PRODUCTS = [
    Product("3x3"),
    Product("5x5, zero point 255", kernel=5, padding=(2, 2, 2, 2), zero=255),
    Product("stride 2, padding at the right and bottom, zero point 0", stride=2, padding=(0, 1, 0, 1), zero=0),
    Product("dilation 2, signed", dilation=2, padding=(2, 2, 2, 2), symmetric=True, zero=0),
    Product("1x1, zero point above", kernel=1, padding=NO_PADDING, zero=300),
    Product("1x1, zero point below", kernel=1, padding=NO_PADDING, zero=-77, correct=True),
    Product("3x3 without padding, zero point above", padding=NO_PADDING, zero=300, correct=True),
    Product("W8", correct=True, added=True),
    Product("W8, signed, stride 2", correct=True, symmetric=True, zero=0, stride=2, channels=(64, 33)),
    Product("4 bits", bits=4, zero=7, added=True, dtype=torch.float16),
    Product("16 bits", bits=16, zero=30000, added=True),
    Product("16 bits, signed, W8", bits=16, symmetric=True, zero=0, correct=True, dtype=torch.bfloat16, added=True),
    Product("12 bits, W8, zero point 0", bits=12, zero=0, correct=True),
    Product("12 bits, signed", bits=12, symmetric=True, zero=0, kernel=1, padding=NO_PADDING),
    Product("9 bits", bits=9, zero=301, kernel=1, padding=NO_PADDING),
    Product("linear, split sums", kernel=1, padding=NO_PADDING, channels=(512, 40), image=(1, 1, 19), added=True),
    Product("packed", packed=True, added=True),
    Product("packed, signed, 12 bits", packed=True, bits=12, symmetric=True, zero=0, channels=(96, 24)),
    Product("packed, split sums", packed=True, kernel=1, padding=NO_PADDING, channels=(1000, 40), image=(1, 1, 19)),
    Product("no sums to split", kernel=1, padding=NO_PADDING, channels=(32, 8), image=(1, 1, 1), zero=3),
]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another type; the interpreter cuts bfloat16 off, which a GPU rounds to nearest."""
    return (x.view(torch.int32) & -65536).view(torch.float32).to(dtype) if dtype == torch.bfloat16 else x.to(dtype)


class Operands:
    """Quantized inputs of a case, its weight, and what the layer adds."""

    def __init__(self, case: Product) -> None:
        torch.manual_seed(0)
        self.case, self.form = case, launches.ByteFormat(case.bits, case.symmetric)
        n, h, w = case.image
        c, oc = case.channels
        k, stored = case.kernel, launches.stored_channels(c, case.packed)
        self.x = torch.randn(n, 1, h, w, c)
        self.x_scale = torch.tensor([77.0, 6 / 2**case.bits])
        self.x_zero = torch.tensor([5.0, case.zero])
        common = (self.x_scale, self.x_zero, GROUP, case.bits, case.symmetric)
        self.stored = launches.quantize(self.x, *common, case.padding, stored, True)
        self.common = common
        self.weight = torch.randint(-128 if case.correct else -15, 128 if case.correct else 16, (oc, k, k, stored))
        self.nibble_zero = torch.randint(0, 16, (oc,), dtype=torch.int8) if case.packed else None
        if self.nibble_zero is not None:
            self.weight = torch.randint(0, 16, self.weight.shape) - self.nibble_zero.view(-1, 1, 1, 1)
        self.weight[..., c:] = 0
        self.missing = torch.randint(-90, 90, (oc,), dtype=torch.int32) if case.correct else None
        self.scale = torch.rand(oc) / 50 + 0.01
        rows = self.sums(torch.zeros(1)).shape[:3]
        self.bias, self.shift = (torch.randn(oc), torch.randn(n, oc).to(case.dtype)) if case.added else (None, None)
        self.residual = torch.randn(*rows, oc).to(case.dtype) if case.added else None

    def integers(self) -> Tensor:
        """q - zero point of the padded input by the formula of the quantizer, [N, H, W, C]."""
        low, high = integer_range(self.case.bits, self.case.symmetric)
        zero, padding = self.x_zero[1], self.case.padding
        q = (self.x[:, 0] / self.x_scale[1]).round().clamp(low - zero, high - zero)
        return F.pad(q, (0, 0, padding[2], padding[3], padding[0], padding[1])).int()

    def planes(self) -> list[Tensor]:
        """The stored bytes less their zero point, in the order of the terms, [N, H, W, C]."""
        zeros = self.form.stored_zeros(int(self.case.zero))
        stored = self.stored[:2][::-1] if self.form.wide else self.stored[:1]
        return [plane.int() - zero for plane, zero in zip(stored, zeros, strict=True)]

    def totals(self) -> list[Tensor]:
        """The sums of the planes over the channels, by the kernel."""
        return self.stored[2:][::-1] if self.form.wide else self.stored[1:]

    def sums(self, plane: Tensor) -> Tensor:
        """The exact sums of a product, [N, OH, OW, OC]; of zeros, only the shape counts."""
        case = self.case
        n, h, w = case.image
        height, width = h + sum(case.padding[:2]), w + sum(case.padding[2:])
        x = plane[..., : case.channels[0]].expand(n, height, width, case.channels[0]).permute(0, 3, 1, 2)
        weight = self.weight[..., : case.channels[0]].permute(0, 3, 1, 2).double()
        if self.missing is not None:
            weight = weight + self.missing.view(-1, 1, 1, 1)
        return F.conv2d(x.double(), weight, stride=case.stride, dilation=case.dilation).permute(0, 2, 3, 1)

    def expected(self) -> Tensor:
        """The product, each step of the epilogue in float32 as in the kernel."""
        result = self.residual
        for term, plane in zip(self.form.terms, self.planes(), strict=True):
            last = term == self.form.terms[-1]
            sums = self.sums(plane)
            assert sums.abs().max() < 2**31
            value = sums.float() * (self.x_scale[1] * (256 if term == launches.kernels.HIGH else 1) * self.scale)
            if last and self.bias is not None:
                value = value + self.bias + self.shift[:, None, None].float()
            value = value if result is None else value + result.float()
            result = rounded(value, self.case.dtype) if last else value
        return result

    def product(self, tile: tuple[int, int, int, int] | None = None) -> Tensor:
        """The product by the kernels: with the tile that the engine chooses, or another."""
        case, form, residual = self.case, self.form, self.residual
        stored = self.stored[:2][::-1] if form.wide else self.stored[:1]
        weight = self.weight.to(torch.int8)
        sums = weight.flatten(1).sum(1, dtype=torch.int32)
        if self.nibble_zero is not None:
            weight = launches.pack_nibbles(weight + self.nibble_zero.view(-1, 1, 1, 1))
        weights = (weight, sums, self.scale)
        for term, q, total in zip(form.terms, stored, self.totals(), strict=True):
            last = term == form.terms[-1]
            args = (q, *weights, *self.common, term, (case.stride,) * 2, (case.dilation,) * 2)
            named = {"sums": total, "weight_zero": self.missing} if case.correct else {"nibble_zero": self.nibble_zero}
            named |= {"bias": self.bias, "shift": self.shift} if last else {}
            dtype = case.dtype if last else torch.float32
            launch = launches.product if tile is None else launches.launch_product
            args = args if tile is None else (launches.Tile(*tile), *args)
            residual = launch(*args, dtype, **named, residual=residual)
        return residual


# --- products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
def test_products_and_their_epilogues_are_exact(case):
    operands, c = Operands(case), case.channels[0]
    planes = operands.planes()
    value = planes[0] * 256 + planes[1] if operands.form.wide else planes[0]
    if all(-128 <= zero < 128 for zero in operands.form.stored_zeros(int(case.zero))):
        assert (value[..., c:] == 0).all()  # additional channels hold the zero point
    assert torch.equal(value[..., :c], operands.integers())
    for plane, total in zip(planes, operands.totals(), strict=True):
        assert torch.equal(total, plane[..., :c].sum(3, dtype=torch.int32))
    found = operands.product()
    assert found.dtype == case.dtype and torch.equal(found, operands.expected())


@pytest.mark.parametrize(
    "case", [PRODUCTS[7], pytest.param(PRODUCTS[10], marks=pytest.mark.slow)], ids=lambda case: case.name
)
def test_tiles_and_split_sums_do_not_change_a_bit(case):
    operands = Operands(replace(case, channels=(64, 40)))
    expected = operands.expected()
    for tile in TILES:
        assert torch.equal(operands.product(tile), expected), tile


def test_packed_weights_have_tiles_of_one_depth():
    operands = Operands(Product("", packed=True, channels=(128, 40)))
    expected = operands.expected()
    for tile in TILES:
        depth64 = (*tile[:2], 64, *tile[3:])
        assert torch.equal(operands.product(depth64), expected), tile
    with pytest.raises(ValueError, match="a packed weight needs tiles of depth 64, found 32"):
        operands.product(TILES[0])


def test_the_sums_of_the_largest_bytes_are_exact():
    """Sums of q alone leave float32's 24 bits, and the correction brings them back."""
    c = 512
    case = Product("", kernel=3, padding=NO_PADDING, channels=(c, 8), image=(1, 3, 3), correct=True)
    for q, w, zero in ((255, 127, 0), (0, -128, 255), (255, -128, 0)):
        operands = Operands(replace(case, zero=zero))
        operands.x = torch.full_like(operands.x, (q - zero) * operands.x_scale[1].item())
        operands.stored = launches.quantize(operands.x, *operands.common, NO_PADDING, c, True)
        operands.weight = torch.full_like(operands.weight, w)
        operands.missing = torch.full((8,), -w + 1, dtype=torch.int32)
        assert (operands.sums(operands.planes()[0]).abs() == 9 * c * 255).all()
        assert torch.equal(operands.product(), operands.expected())


# --- quantization ----------------------------------------------------------------------------------


def steps(x: Tensor, scale: float, zero: int, n_bits: int = 8) -> Tensor:
    """The unsigned integers of values."""
    return ((x / torch.tensor(scale)).round() + zero).clamp(0, 2**n_bits - 1).int()


def quantized(x: Tensor, scale: float, zero: int, n_bits: int = 8, **work) -> Tensor:
    """The unsigned integers by the kernel, [..., C] like the `x` [N, heads, H, W, C]."""
    c = x.shape[-1] // (2 if work.get("geglu") else 1)
    scales, zeros = torch.tensor([99.0, scale]), torch.tensor([9.0, zero])
    stored = launches.stored_channels(c)
    out = launches.quantize(x, scales, zeros, GROUP, n_bits, False, NO_PADDING, stored, False, **work)
    form = launches.ByteFormat(n_bits, False)
    if not form.wide:
        assert len(out) == 1
        return out[0][..., :c].int() + 128
    room = (128 - zero) % 256 if form.room else 0
    return (out[1][..., :c].int() + 128) * 256 + out[0][..., :c].int() + 128 - room


def assert_near(found: Tensor, expected: Tensor) -> None:
    """The functions differ in the last bit of a float, so that a value on an edge may be one step off."""
    assert found.shape == expected.shape and expected.float().std() > 10
    assert (found - expected).abs().max() <= 1
    assert (found != expected).float().mean() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantization_is_exact_for_all_types_and_strides(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 40, 7, 9) * 3).to(dtype)
    x[0, :, 0, 0] = torch.arange(40) / 16 - 1.25 + 1 / 32  # halves, which round to even
    x[0, :4, 0, 1] = torch.tensor([1e30, -1e30, 300.0, -300.0])
    rows = x.permute(0, 2, 3, 1)
    views = [rows, rows.contiguous(), rows[:, :, 1:6:2], rows[..., 3:36], rows[..., 1::2], rows[1:].flip(1)]
    for view in views:
        found = quantized(view[:, None], 1 / 16, 120)
        assert torch.equal(found, steps(view.float(), 1 / 16, 120))
    heads = x.view(2, 4, 10, 63).transpose(2, 3)[:, :, None]  # [N, heads, 1, T, d]
    assert torch.equal(quantized(heads, 0.05, 128), steps(heads.float(), 0.05, 128).flatten(0, 1))


@pytest.mark.parametrize(("n_bits", "zero"), [(8, 120), (12, 1900), (16, 33000)])
def test_a_factor_and_smoothing_are_exact(n_bits, zero):
    torch.manual_seed(0)
    x, divisor = torch.randn(1, 1, 5, 7, 40), torch.exp2(torch.rand(40) * 4 - 2)
    found = quantized(x, 8 / 2**n_bits, zero, n_bits, divisor=divisor, factor=0.7)
    assert torch.equal(found, steps(x[0] * 0.7 / divisor, 8 / 2**n_bits, zero, n_bits))


@pytest.mark.parametrize("mean", [0, 300])
def test_group_norms_are_those_of_float64(mean):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 48, 9, 7) * 3 + mean, torch.randn(48), torch.randn(48)
    a, b = launches.group_norm_map(x.permute(0, 2, 3, 1), weight, bias, 4, 1e-5)
    expected = F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)
    found = x.double() * a[:, :, None, None] + b[:, :, None, None]
    assert (found - expected).abs().max() < 1e-5 * (1 + mean / 10)  # float32 holds b to its last bit only


def test_group_norm_and_silu_are_quantized_in_one_pass():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 48, 9, 7) * 3 + 1, torch.randn(48), torch.randn(48)
    rows = x.permute(0, 2, 3, 1)
    a, b = launches.group_norm_map(rows, weight, bias, 4, 1e-5)
    expected = F.silu(F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)).permute(0, 2, 3, 1)
    assert_near(quantized(rows[:, None], 0.02, 40, a=a, b=b, silu=True), steps(expected.float(), 0.02, 40))
    scales, zeros, padding = torch.ones(2) / 50, torch.full((2,), 40.0), (1, 1, 1, 1)
    padded = launches.quantize(rows[:, None], scales, zeros, GROUP, 8, False, padding, 64, True, a, b, silu=True)
    border = torch.ones(11, 9, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert (padded[0][:, border] == 40 - 128).all() and (padded[1][:, border] == 0).all()


@pytest.mark.parametrize("c", [33, 320])
def test_layer_norm_is_quantized_in_one_pass(c):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 1, 1, 9, c) + 5, torch.randn(c), torch.randn(c)
    expected = F.layer_norm(x[:, 0].double(), (c,), weight.double(), bias.double(), 1e-5)
    assert_near(quantized(x, 0.03, 120, a=weight, b=bias, layer_norm=1e-5), steps(expected.float(), 0.03, 120))


def test_geglu_is_quantized_in_one_pass():
    torch.manual_seed(0)
    x = torch.randn(2, 1, 1, 9, 2 * 72) * 2
    value, gate = x[:, 0].double().chunk(2, -1)
    assert_near(quantized(x, 0.03, 120, geglu=True), steps((value * F.gelu(gate)).float(), 0.03, 120))


# --- attention -------------------------------------------------------------------------------------


class Attention:
    """The operands of an attention of 2 heads with two timestep groups, of which the second one is used."""

    def __init__(self, n_bits: int, n: int, t: int, keys: int, width: int) -> None:
        torch.manual_seed(0)
        self.n_bits, self.width, self.symmetric = n_bits, width, [False, True, False, False]
        self.x = [torch.randn(n, length, 2, width) for length in (t, keys, keys)]
        self.scales = [0.03, 0.035, 0.04, 1 / (2**n_bits - 1) / 3]
        self.zeros = [120.0, 0.0, 90.0, 0.0]

    def integers(self, place: int) -> Tensor:
        """q - zero point of one operand, float64 [N, heads, T, width]."""
        low, high = integer_range(8, self.symmetric[place])
        q = (self.x[place] / torch.tensor(self.scales[place])).round()
        return q.clamp(low - self.zeros[place], high - self.zeros[place]).double().transpose(1, 2)

    def probabilities(self) -> Tensor:
        """Their integers, float64 [N, heads, T, keys]."""
        logits = self.integers(0) @ self.integers(1).transpose(2, 3) * (self.scales[0] * self.scales[1] * self.factor)
        return (torch.softmax(logits, 3) / self.scales[3]).round().clamp(0, 2**self.n_bits - 1)

    @property
    def factor(self) -> float:
        return self.width**-0.5

    def __call__(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The attention by the kernels, [N, heads, T, width]."""
        scales, zeros = ([torch.tensor([3.0, part]) for part in parts] for parts in (self.scales, self.zeros))
        stored = launches.stored_head(self.width)
        parts = [
            launches.quantize(
                x.transpose(1, 2)[:, :, None],
                scales[i],
                zeros[i],
                GROUP,
                8,
                self.symmetric[i],
                NO_PADDING,
                stored,
                False,
            )[0][:, 0]
            for i, x in enumerate(self.x)
        ]
        bits = [8, 8, 8, self.n_bits]
        y = launches.attention(*parts, scales, zeros, GROUP, bits, self.symmetric, 2, self.width, self.factor, dtype)
        assert y.dtype == dtype
        return y.transpose(1, 2)


@pytest.mark.parametrize(("n_bits", "keys", "width"), [(8, 77, 80), (12, 40, 48), (16, 77, 80)])
def test_probabilities_are_at_most_one_step_off_and_their_products_exact(n_bits, keys, width):
    """Values that are a unit matrix show the probabilities themselves."""
    attention = Attention(n_bits, 1, 40, keys, width)
    values = attention.x[2]
    attention.x[2] = (torch.eye(keys, width) * 64 * attention.scales[2])[None, :, None].expand(1, keys, 2, width)
    shown = attention().double() / (64 * attention.scales[2] * attention.scales[3])
    found, expected = shown[..., :keys].round(), attention.probabilities()
    assert (shown[..., keys:] == 0).all() and (shown[..., :keys] - found).abs().max() < 0.01
    assert (found - expected).abs().max() <= 1
    assert (found != expected).double().mean() <= (1e-3 if n_bits == 8 else 0.02)  # the steps of 16 bits are small
    assert expected.std() > 3 and expected.max() > 2**n_bits / 20
    attention.x[2] = values
    sums = found @ attention.integers(2)
    scale = torch.tensor(attention.scales[3]) * torch.tensor(attention.scales[2])
    if n_bits == 8:
        assert torch.equal(attention(), sums.float() * scale)
        assert torch.equal(attention(torch.float16), (sums.float() * scale).half())
    else:  # two sums of bytes, each of which float32 rounds
        error = (attention().double() - sums * scale.double()).abs().max() / (sums.abs().max() * scale)
        assert error < 1e-5


@pytest.mark.parametrize(("keys", "width"), [(5, 8), (130, 32)])
def test_attentions_of_all_sizes_are_the_quantized_formula(keys, width):
    attention = Attention(8, 2, 7, keys, width)
    expected = attention.probabilities() @ attention.integers(2) * (attention.scales[2] * attention.scales[3])
    assert (attention() - expected).norm() / expected.norm() < 1e-3


# --- traffic and meta implementations --------------------------------------------------------------

SCALE = (torch.tensor([0.02]), torch.tensor([100.0]), torch.zeros(1, dtype=torch.int32))


def integers(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.randint(-100, 100, shape, dtype=dtype)


def quantize_arguments(
    shape: tuple[int, ...], n_bits: int = 8, padding: tuple[int, ...] = NO_PADDING, sums: bool = False, **work
) -> tuple[tuple, dict]:
    c = shape[-1] // (2 if work.get("geglu") else 1)
    vector = (c,) if "layer_norm" in work else (shape[0], c)
    if work.pop("affine", False) or "layer_norm" in work:
        work |= {"a": torch.rand(vector), "b": torch.rand(vector)}
    return (torch.randn(shape), *SCALE, n_bits, False, padding, launches.stored_channels(c), sums), work


def product_arguments(
    shape: tuple[int, ...],
    oc: int,
    kernel: int = 3,
    stride: int = 1,
    full: bool = False,
    half: bool = False,
    packed: bool = False,
) -> tuple[tuple, dict]:
    n, h, w, c = shape
    dtype = torch.float16 if half else torch.float32
    weight = (integers(oc, kernel, kernel, c), integers(oc, dtype=torch.int32), torch.rand(oc))
    rows = [(size - kernel) // stride + 1 for size in (h, w)]
    added = {
        "sums": integers(n, h, w, dtype=torch.int32), "weight_zero": integers(oc, dtype=torch.int32),
        "bias": torch.rand(oc), "shift": torch.rand(n, oc).to(dtype), "residual": torch.rand(n, *rows, oc).to(dtype),
    }  # fmt: skip
    added = added if full else {}
    if packed:
        weight = (launches.pack_nibbles(weight[0] & 15), *weight[1:])
        added = {"nibble_zero": integers(oc), "residual": torch.rand(n, *rows, oc).to(dtype)}
    return (integers(*shape), *weight, *SCALE, 8, False, 0, (stride,) * 2, (1, 1), dtype), added


def norm_arguments(shape: tuple[int, ...], groups: int) -> tuple[tuple, dict]:
    return (torch.randn(shape), torch.rand(shape[3]), torch.rand(shape[3]), groups, 1e-5), {}


def attention_arguments(t: int, keys: int, width: int, n_bits: int = 8) -> tuple[tuple, dict]:
    stored = launches.stored_head(width)
    operands = (integers(4, length, stored) for length in (t, keys, keys))
    scales, zeros = [torch.rand(1) / 50 for _ in range(4)], [torch.zeros(1) for _ in range(4)]
    bits = [8, 8, 8, n_bits]
    return (*operands, scales, zeros, SCALE[2], bits, [False] * 4, 2, width, 0.2, torch.float16), {}


SPLIT = (1, 6, 6, 256)
# operator, what makes its arguments, what that takes; blocks of products get larger the fewer multiprocessors there are
LAUNCHES = [
    ("quantize", quantize_arguments, {"shape": (2, 1, 9, 7, 40), "padding": (1, 1, 1, 1), "sums": True}, 108),
    ("quantize", quantize_arguments, {"shape": (1, 1, 8, 8, 96), "n_bits": 16, "affine": True, "silu": True}, 108),
    ("quantize", quantize_arguments, {"shape": (1, 2, 1, 50, 80), "geglu": True, "divisor": torch.ones(40)}, 108),
    ("quantize", quantize_arguments, {"shape": (2, 1, 1, 50, 72), "layer_norm": 1e-5}, 108),
    ("product", product_arguments, {"shape": (2, 9, 7, 64), "oc": 72, "full": True}, 4),
    ("product", product_arguments, {"shape": SPLIT, "oc": 70, "full": True, "half": True}, 108),
    ("product", product_arguments, {"shape": (1, 17, 18, 32), "oc": 40, "stride": 2}, 108),
    ("product", product_arguments, {"shape": (1, 1, 150, 96), "oc": 150, "kernel": 1, "full": True}, 4),
    ("product", product_arguments, {"shape": (1, 9, 7, 128), "oc": 72, "packed": True}, 108),
    ("product", product_arguments, {"shape": SPLIT, "oc": 70, "packed": True, "half": True}, 108),
    ("product", product_arguments, {"shape": (2, 17, 18, 64), "oc": 150, "stride": 2, "packed": True}, 4),
    ("group_norm_map", norm_arguments, {"shape": (2, 9, 7, 40), "groups": 4}, 108),
    ("group_norm_map", norm_arguments, {"shape": (1, 40, 40, 32), "groups": 2}, 108),
    ("group_norm_map", norm_arguments, {"shape": (3, 4, 4, 96), "groups": 8}, 108),
    ("attention", attention_arguments, {"t": 50, "keys": 77, "width": 40}, 108),
    ("attention", attention_arguments, {"t": 70, "keys": 64, "width": 32}, 108),
    ("attention", attention_arguments, {"t": 33, "keys": 130, "width": 80, "n_bits": 16}, 108),
]


@pytest.mark.parametrize("index", range(len(LAUNCHES)), ids=lambda index: f"{LAUNCHES[index][0]}-{index}")
def test_the_traffic_is_what_the_interpreter_loads_and_stores(index, monkeypatch):
    """Meta implementations give the shapes, types and strides of the real ones."""
    torch.manual_seed(0)
    name, make, sizes, processors = LAUNCHES[index]
    monkeypatch.setattr(launches, "MULTIPROCESSORS", processors)
    args, named = make(**sizes)
    with counting() as counter:
        found = getattr(launches, name)(*args, **named)
    stated, counted = getattr(traffic, f"{name}_traffic")(*args, **named), counter.traffic()
    assert stated.launches == counted.launches == (2 if sizes.get("shape") == SPLIT else 1)
    for field in ("loads", "stores", "distinct"):
        assert getattr(stated, field) == pytest.approx(getattr(counted, field), rel=0.05), (field, stated, counted)
    meta = getattr(launches, name)(*on_meta(args), **{key: on_meta(value) for key, value in named.items()})
    assert shapes(meta) == shapes(found) and all(part.is_meta for part in listed(meta))


def on_meta(value):
    if isinstance(value, Tensor):
        return value.to("meta")
    return type(value)(map(on_meta, value)) if isinstance(value, list | tuple) else value


def listed(value: Tensor | list[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def shapes(value: Tensor | list[Tensor]) -> list[tuple]:
    return [(part.shape, part.dtype, part.stride()) for part in listed(value)]


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 5, 8, 11])
def test_operators_are_registered_as_pytorch_expects(index):
    name, make, sizes, _ = LAUNCHES[index]
    args, named = make(**sizes)
    torch.library.opcheck(getattr(launches, name), args, named, test_utils=("test_schema", "test_faketensor"))
