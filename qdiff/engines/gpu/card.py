"""What is known of a card: whether the kernels can run there, whether they are exact, and whether they are faster."""

import hashlib
import importlib.util
import json
import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from qdiff.errors import WriteError
from qdiff.utils.download import cache_root
from qdiff.utils.files import write_text

log = logging.getLogger(__name__)

MIN_CAPABILITY = 80  # Triton has no int8 products for older cards
# where int8 is expected to be faster than float16, from the traffic and the arithmetic of whole networks
EXPECTED_FASTER = (80, 86, 89)
MEASURED: tuple[str, ...] = ()  # the names of cards that have a row in docs/engines.md

FOUR, PACKED, EIGHT = "4 bits", "4 bits, packed", "8 bits"
# images, height, width and channels of the input, output channels, kernel, stride, padding, weights
SHAPES = (
    *((2, 16, 16, 32, 32, 3, 1, 1, weights) for weights in (FOUR, EIGHT)),
    *((1, 8, 8, 320, 320, 3, 1, 1, weights) for weights in (FOUR, PACKED, EIGHT)),
    *((1, 9, 7, 96, 40, 3, 2, 1, weights) for weights in (FOUR, EIGHT)),
    *((2, 8, 8, 2560, 64, 1, 1, 0, weights) for weights in (FOUR, PACKED, EIGHT)),
    *((1, 1, 77, 768, 320, 1, 1, 0, weights) for weights in (FOUR, EIGHT)),
    *((8, 32, 32, 128, 256, 3, 1, 1, weights) for weights in (FOUR, PACKED, EIGHT)),
)


def why_unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a card; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < MIN_CAPABILITY:
        return f"int8 kernels need compute capability 8.0, this card has {major}.{minor}"
    return None


def expected_faster(device: torch.device) -> bool:
    """Whether int8 is expected to be faster than float16 on a card."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor in EXPECTED_FASTER


def origin(device: torch.device) -> str:
    """The card's name, for the log, with a note if it was not measured."""
    name = torch.cuda.get_device_name(device)
    return name if name in MEASURED else f"{name}, not measured on this card"


def why_wrong(device: torch.device) -> str | None:
    """Why the kernels give wrong numbers on a card; None: they are right. It is tried once and remembered on disk."""
    return _check(torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)


def first_line(error: Exception) -> str:
    """The first line of an error, or its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@cache
def _check(device: torch.device) -> str | None:
    name = torch.cuda.get_device_name(device)
    wrong = f"the int8 kernels give wrong numbers on {name}"
    path = _record_path(device)
    try:
        return None if json.loads(path.read_text(encoding="utf-8"))["exact"] else wrong
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log.info("engine: checking the int8 kernels on %s, which compiles them", name)
    try:
        exact = products_are_exact(device) and functions_are_near(device)
    except Exception as error:  # Triton has no common base of its errors
        return f"the int8 kernels do not run on {name} ({first_line(error)})"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"exact": exact}))
    except (OSError, WriteError) as error:
        log.warning("engine: the check is not remembered (%s)", str(error).splitlines()[0])
    return None if exact else wrong


def _record_path(device: torch.device) -> Path:
    """The file that remembers a check: it is of this card, these releases and these kernels."""
    import triton

    sources = [Path(__file__).with_name(name).read_bytes() for name in ("kernels.py", "launches.py")]
    facts = [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)]
    releases = [torch.__version__, torch.version.cuda, triton.__version__]
    key = hashlib.sha256(repr((facts, releases)).encode() + b"".join(sources)).hexdigest()[:16]
    return cache_root() / "qdiff" / f"int8-{key}.json"


def products_are_exact(device: torch.device) -> bool:
    """Compare products on a device with integers that are computed on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return all(_product_is_exact(device, generator, *shape) for shape in SHAPES)


def _product_is_exact(
    device: torch.device,
    generator: torch.Generator,
    n: int,
    height: int,
    width: int,
    channels: int,
    outputs: int,
    kernel: int,
    stride: int,
    pad: int,
    weights: str,
) -> bool:
    from qdiff.engines.gpu import kernels, launches  # needs triton

    wide = weights == EIGHT
    q = torch.randint(-128, 128, (n, height + 2 * pad, width + 2 * pad, channels), generator=generator)
    low, high = (-128, 128) if wide else (0, 16)
    integers = torch.randint(low, high, (outputs, kernel, kernel, channels), generator=generator)
    nibble_zero = torch.randint(0, 1 if wide else 16, (outputs,), generator=generator, dtype=torch.int8)
    w = integers - nibble_zero.view(-1, 1, 1, 1)
    missing = torch.randint(-100, 100, (outputs,), generator=generator)
    zero = -37  # of the stored bytes
    exact = F.conv2d(
        (q - zero).permute(0, 3, 1, 2).double(),
        (w + (missing.view(-1, 1, 1, 1) if wide else 0)).permute(0, 3, 1, 2).double(),
        stride=stride,
    )
    sums = (q - zero).sum(3, dtype=torch.int32).to(device) if wide else None
    one, bytes_q = torch.ones(1, device=device), q.to(device, torch.int8)
    bytes_w = (launches.pack_nibbles(integers) if weights == PACKED else w.to(torch.int8)).to(device)
    found = launches.product(
        bytes_q, bytes_w, w.flatten(1).sum(1, dtype=torch.int32).to(device), torch.ones(outputs, device=device),
        one, torch.full((1,), zero + 128.0, device=device), torch.zeros(1, dtype=torch.int32, device=device), 8, False,
        kernels.ONE_BYTE, (stride, stride), (1, 1), torch.float32,
        sums=sums, weight_zero=missing.to(device, torch.int32) if wide else None,
        nibble_zero=nibble_zero.to(device) if weights == PACKED else None,
    )  # fmt: skip
    return torch.equal(found.cpu(), exact.permute(0, 2, 3, 1).float())


def functions_are_near(device: torch.device) -> bool:
    """Compare quantization after norms and an attention on a device with float64 on the CPU."""
    from qdiff.engines.gpu import launches  # needs triton

    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def on_card(*tensors: Tensor) -> list[Tensor]:
        return [tensor.to(device) for tensor in tensors]

    step, zero = torch.tensor([0.03]), torch.tensor([120.0])
    qparams = [*on_card(step, zero), torch.zeros(1, dtype=torch.int32, device=device)]
    x, weight, bias = normal(2, 9, 7, 64), normal(64), normal(64)
    a, b = launches.group_norm_map(*on_card(x, weight, bias), 8, 1e-5)
    image = launches.quantize(x.to(device)[:, None], *qparams, 8, False, (0,) * 4, 64, False, a=a, b=b, silu=True)[0]
    normed = F.group_norm(x.permute(0, 3, 1, 2).double(), 8, weight.double(), bias.double()).permute(0, 2, 3, 1)
    a, b = on_card(weight, bias)
    tokens = launches.quantize(
        x.to(device)[:, None], *qparams, 8, False, (0,) * 4, 64, False, a=a, b=b, layer_norm=1e-5
    )[0]
    layer = F.layer_norm(x.double(), (64,), weight.double(), bias.double())
    for found, expected in ((image, F.silu(normed)), (tokens, layer)):
        right = (expected / 0.03).round().clamp(-120, 135) - 8
        if (found.cpu().double() - right).abs().max() > 1:
            return False
    return _attention_is_near(device, generator)


def _attention_is_near(device: torch.device, generator: torch.Generator) -> bool:
    """Compare an attention with 16-bit probabilities."""
    from qdiff.engines.gpu import launches  # needs triton

    q, k, v = (torch.randint(-128, 128, (2, 70, 256), generator=generator, dtype=torch.int8) for _ in range(3))
    scales = [torch.tensor([scale]) for scale in (0.02, 0.02, 0.03, 1 / 65535)]
    zeros = [torch.tensor([zero]) for zero in (128.0, 120.0, 131.0, 0.0)]  # of the integers, which are 128 more
    index = torch.zeros(1, dtype=torch.int32, device=device)
    found = launches.attention(
        q.to(device), k.to(device), v.to(device), [scale.to(device) for scale in scales],
        [zero.to(device) for zero in zeros], index, [8, 8, 8, 16], [False] * 4, 1, 200, 0.05, torch.float32,
    )  # fmt: skip
    values = [(x.double() + 128 - zero) * scale for x, zero, scale in zip((q, k, v), zeros, scales, strict=False)]
    expected = torch.softmax(values[0] @ values[1].transpose(1, 2) * 0.05, dim=2) @ values[2]
    difference = found.cpu().double()[:, :, 0] - expected[..., :200]
    return bool(difference.norm() / expected[..., :200].norm() < 1e-3)
