"""Compile the Triton kernels of the integer engine for generations of GPUs, as they would be launched, without a GPU.

A process of its own, because tests run with `TRITON_INTERPRET`, which replaces Triton's compiler:
`python -m tests.support.compile_kernels few` prints what the machine code of each kernel holds, one JSON line for each.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qdiff.engines.gpu import kernels, launches

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITIES = (80, 86, 89, 90, 120)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")  # of the compiler, among the arguments of a launch
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int32: "*i32",
}  # fmt: skip


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of one launch holds.

    Attributes:
        case: the name of the case.
        kernel: the name of the kernel.
        capability: of the card, for example 80.
        tile: the compile-time numbers of the block.
        registers: of a thread.
        stack: bytes of a thread: what is spilled.
        shared: bytes of shared memory of a block.
        instructions: how often each instruction occurs, without its modifiers.
    """

    case: str
    kernel: str
    capability: int
    tile: dict[str, int]
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]


class Recorder:
    """Stands in for a kernel and compiles it where it would be launched."""

    def __init__(self, kernel: Any, capability: int, case: str, found: list[MachineCode]) -> None:
        self.kernel, self.capability, self.case, self.found = kernel, capability, case, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._compile

    def _compile(self, *args: Any, **named: Any) -> None:
        names = self.kernel.arg_names
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        values = dict(zip(names, args, strict=False)) | named
        assert list(values) and set(values) == set(names), set(names) ^ set(values)
        types, constants, attributes = {}, {}, {}
        for position, name in enumerate(names):
            value = values[name]
            constant = self.kernel.params[position].is_constexpr or (isinstance(value, int) and value == 1)
            types[name] = "constexpr" if constant else _type(value)
            if constant:
                constants[name] = value
            elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, types, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        tile = {name: value for name, value in values.items() if name in ("BM", "BN", "BK", "BL", "BP", "BC", "SPLITS")}
        self.found.append(MachineCode(self.case, self.kernel.__name__, self.capability, tile, *_inspect(compiled)))


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        assert value.data_ptr() % 16 == 0
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _inspect(compiled: Any) -> tuple[int, int, int, dict[str, int]]:
    """Registers, stack, shared memory and instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    sizes = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert sizes is not None, usage.stderr
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", code, re.MULTILINE)
    return int(sizes[1]), int(sizes[2]), compiled.metadata.shared, dict(Counter(names))


@contextmanager
def compiling(capability: int, case: str, found: list[MachineCode]) -> Iterator[None]:
    """Let launches compile for a generation of GPUs, and add what comes out to `found`."""
    originals = {name: getattr(kernels, name) for name in vars(kernels) if name.endswith("_kernel")}
    original = launches.capability_of
    try:
        launches.capability_of = lambda _: capability
        for name, kernel in originals.items():
            setattr(kernels, name, Recorder(kernel, capability, case, found))
        yield
    finally:
        launches.capability_of = original
        for name, kernel in originals.items():
            setattr(kernels, name, kernel)


# --- cases: launches on tensors that nobody reads --------------------------------------------------


def _ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32)


def _bytes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int8)


def multiply(
    image: tuple[int, int, int],
    c: int,
    oc: int,
    kernel: int = 3,
    bits: int = 8,
    full: bool = True,
    term: int = 0,
    packed: bool = False,
) -> None:
    """A product of N, H, W = `image`.

    `full`: with a correction for the weight, bias, shift and residual. `packed`: the weight has 4 bits.
    """
    n, h, w = image
    c = launches.stored_channels(c, packed)
    q = _bytes(n, h + kernel - 1, w + kernel - 1, c)
    weight = launches.pack_nibbles(_bytes(oc, kernel, kernel, c)) if packed else _bytes(oc, kernel, kernel, c)
    common = (weight, _ints(oc), torch.empty(oc), torch.empty(4), torch.empty(4), _ints(1))
    added = {
        "sums": _ints(*q.shape[:3]), "weight_zero": _ints(oc), "bias": torch.empty(oc),
        "shift": torch.empty(n, oc, dtype=torch.float16),
        "residual": torch.empty(n, h, w, oc, dtype=torch.float16),
    }  # fmt: skip
    named = (added if full else {}) | ({"weight_zero": None, "nibble_zero": _bytes(oc)} if packed else {})
    launches.product(q, *common, bits, False, term, (1, 1), (1, 1), torch.float16, **named)


def quantize(c: int = 320, bits: int = 8, norm: bool = False, **work: Any) -> None:
    """A quantization of [2, C, 64, 64] in float16; `norm`: after a GroupNorm."""
    width = c * (2 if work.get("geglu") else 1)
    x = torch.empty(2, 1, 64, 64, width, dtype=torch.float16)
    maps = {"a": torch.empty(2, c), "b": torch.empty(2, c)} if norm else {}
    if "layer_norm" in work:
        maps = {"a": torch.empty(c), "b": torch.empty(c)}
    common = (torch.empty(4), torch.empty(4), _ints(1), bits, False)
    launches.quantize(x, *common, (1, 1, 1, 1), launches.stored_channels(c), True, **maps, **work)


def normalize(c: int) -> None:
    """A GroupNorm of 32 groups of [2, C, 64, 64] in float16."""
    launches.group_norm_map(torch.empty(2, 64, 64, c, dtype=torch.float16), torch.empty(c), torch.empty(c), 32, 1e-5)


def attend(width: int, bits: int, keys: int) -> None:
    """An attention of 8 heads with probabilities of `bits` bits."""
    stored = launches.stored_head(width)
    q, k, v = (_bytes(16, length, stored) for length in (4096, keys, keys))
    scales, zeros = ([torch.empty(4) for _ in range(4)] for _ in range(2))
    signs = [False] * 4
    launches.attention(q, k, v, scales, zeros, _ints(1), [8, 8, 8, bits], signs, 8, width, 0.2, torch.float16)


PRODUCTS = {
    "large": partial(multiply, (8, 64, 64), 320, 320),
    "medium": partial(multiply, (8, 16, 16), 640, 640),
    "split": partial(multiply, (2, 8, 8), 1280, 1280),
    "few rows": partial(multiply, (1, 1, 2), 1280, 320, 1),
    "few columns": partial(multiply, (8, 64, 64), 64, 4),
    "few channels": partial(multiply, (8, 64, 64), 32, 320),
    "pixels": partial(multiply, (8, 32, 32), 96, 192, 1),
}
VARIANTS = {
    "plain": {"full": False},
    "full": {},
    "upper bytes": {"bits": 16, "term": kernels.HIGH},
    "lower bytes": {"bits": 12, "term": kernels.LOW},
    "packed": {"packed": True},
}
CASES: dict[str, Callable[[], None]] = {
    **{f"product, {n}, {kind}": partial(f, **v) for (n, f), (kind, v) in product(PRODUCTS.items(), VARIANTS.items())},
    "quantize": quantize,
    "quantize, group norm, SiLU, smoothing": partial(quantize, norm=True, silu=True, divisor=torch.empty(320)),
    "quantize, 16 bits": partial(quantize, bits=16, norm=True, silu=True),
    "quantize, layer norm": partial(quantize, layer_norm=1e-5),
    "quantize, wide layer norm": partial(quantize, c=1280, bits=12, layer_norm=1e-5),
    "quantize, GEGLU": partial(quantize, geglu=True),
    **{f"norm, {c} channels": partial(normalize, c) for c in (128, 320, 2560)},
    **{
        f"attention, {d}, {p} bits, {keys} keys": partial(attend, d, p, keys)
        for d, p, keys in product((32, 40, 80, 160, 256), (8, 16), (4096, 77))
    },
}  # fmt: skip
FEW = [(80, "product, large, full"), (90, "product, split, full"), (80, "attention, 40, 8 bits, 77 keys")]


def main(which: str, pattern: str = "") -> None:
    """Compile the cases: `few` of them, `all`, or those of one capability whose names match `pattern`."""
    capabilities = CAPABILITIES if which == "all" else (int(which),) if which != "few" else ()
    for capability, case in [*product(capabilities, CASES)] if capabilities else FEW:
        if not re.search(pattern, case):
            continue
        found: list[MachineCode] = []
        with compiling(capability, case, found):
            CASES[case]()
        for code in found:
            print(json.dumps(asdict(code)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
