"""Reading files of tensors safely: nothing in them is executed, and what is wrong with one is said."""

import codecs
import logging
import pickle
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qdiff.architecture import architectures
from qdiff.checkpoint.training import weights_of, without_prefix
from qdiff.errors import CheckpointError
from qdiff.utils.files import describe_foreign_file
from qdiff.utils.finite import first_not_finite

log = logging.getLogger(__name__)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.ckpt`, `.pth`, `.pt` or `.safetensors` file, memory-mapped; nothing in it is executed.

    A training checkpoint is taken too (`qdiff.checkpoint.training`): its EMA weights where it has them; the log says
    what was taken.

    Raises:
        CheckpointError: no such file, damaged, not a checkpoint, or a pickle that wants to run code.
    """
    path = existing(path)
    if is_safetensors(path):
        with open_safetensors(path) as file:
            return without_prefix({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    content = _load_pickle(path)
    state, taken = weights_of(content)
    if state is None:
        raise CheckpointError(f"{path}: expected a state dict of tensors, found {_describe_object(content)}")
    if taken:
        log.warning("%s: a training checkpoint: taken: %s", path, taken)
    return state


def load_object(path: str | Path, arrays: bool = False) -> Any:
    """A pickled file of plain containers and tensors (a calibration set); the errors of `read_tensors`.

    Args:
        arrays: it may hold NumPy arrays of numbers too.
    """
    return _load_pickle(existing(path), dict(_ARRAYS) if arrays else {})


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as safetensors do: an 8-byte header length, then JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if foreign := describe_foreign_file(path):
        raise CheckpointError(f"{path}: expected a checkpoint, found {foreign}")
    return path


class _Inert:
    """Stands for an object of a training framework that is of no use here: built, filled and forgotten, never run."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


INERT = (
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "omegaconf.",
    "numpy.",
    "typing.",
    "collections.defaultdict",
    "_codecs.encode",
)
INERT_BUILTINS = {"dict", "list", "tuple", "set", "int", "float", "str", "bool"}
_DAMAGE = (  # what torch.load raises over damaged files
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
)


def _array_builders() -> Iterator[tuple[str, tuple[Any, str]]]:
    """What a pickled NumPy array asks for, under the names that NumPy 1 and 2 give it."""
    builders: tuple[Any, ...] = (np.zeros(1).__reduce__()[0], np.float32(0).__reduce__()[0])
    for builder in builders:
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            yield f"{module}.{builder.__name__}", (builder, f"{module}.{builder.__name__}")
    yield "numpy.ndarray", (np.ndarray, "numpy.ndarray")
    yield "numpy.dtype", (np.dtype, "numpy.dtype")
    yield "_codecs.encode", (codecs.encode, "_codecs.encode")
    for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "U1", "S1", "O"):
        name = f"numpy.dtypes.{type(np.dtype(kind)).__name__}"
        yield name, (type(np.dtype(kind)), name)


_ARRAYS = dict(_array_builders())


def _load_pickle(path: Path, allowed: Mapping[str, tuple[Any, str]] | None = None) -> Any:
    """`torch.load` of plain containers and tensors; leftovers of training frameworks become `_Inert` objects.

    Args:
        allowed: classes and functions that the pickle may have beside them, by full name.
    """
    stubs: dict[str, tuple[Any, str]] = dict(allowed or {})
    mmap = True
    while True:
        try:
            with torch.serialization.safe_globals(list(stubs.values())):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            name = _global_in(error)
            full = f"builtins.{name}" if name in INERT_BUILTINS else name
            if (name in INERT_BUILTINS or name.startswith(INERT)) and full not in stubs:
                stubs[full] = (type(name.rpartition(".")[2], (_Inert,), {}), full)
                continue
            if name:
                raise CheckpointError(
                    f"{path}: refused: its pickle asks for {name}, which is not plain tensors"
                ) from None
            raise CheckpointError(f"{path}: damaged or not a PyTorch checkpoint: it is no pickle of tensors") from None
        except PermissionError:
            raise CheckpointError(f"{path}: cannot be read (permission denied)") from None
        except _DAMAGE as error:
            if mmap and "mmap" in str(error):
                mmap = False  # files of torch < 1.6 are no zip archives and cannot be mapped
                continue
            raise CheckpointError(f"{path}: damaged or not a PyTorch checkpoint ({first_line(error)})") from None


def _global_in(error: pickle.UnpicklingError) -> str:
    """The name of the class or function that a refused pickle asked for, or nothing."""
    found = re.search(
        r"GLOBAL ([\w.]+)|Unsupported (?:global|class) ([\w.]+)|(\w+\.\w[\w.]*) was not an allowed", str(error)
    )
    return next((group for group in found.groups() if group), "") if found else ""


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def _describe_object(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(str, list(value)[:4]))}"
    return type(value).__name__


def load_into(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """Assign a full-precision state dict to `model` (which may be on the meta device), in float32.

    Raises:
        CheckpointError: keys or shapes differ; some are named. A value that is not a finite number.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_keys(expected, state, path)
    check_finite(path, {name: state[name] for name in expected})
    model.load_state_dict({name: state[name].float() for name in expected}, assign=True)
    return model.requires_grad_(False)


def check_finite(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """CheckpointError that names the first tensor with NaN or infinity."""
    if (name := first_not_finite(state)) is not None:
        raise CheckpointError(f"{path}: damaged: {name} holds values that are not finite numbers")


def check_keys(expected: Mapping[str, torch.Size], found: Mapping[str, Tensor], path: str | Path) -> None:
    """Compare names and shapes; the error names some of the differences and says what the file looks like."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [
            f"{len(names)} {word} ({_some(names)})"
            for word, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
        raise CheckpointError(f"{path}: keys do not fit: {'; '.join(parts)}; {look_of(found)}")
    wrong = [name for name, shape in expected.items() if found[name].shape != shape]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors have other shapes, first {name}: "
            f"found {list(found[name].shape)}, expected {list(expected[name])}"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def look_of(state: Mapping[str, Any]) -> str:
    """A few words on what a state dict seems to be, for error messages."""
    keys = list(state)
    known = ((part, architecture.name) for architecture in architectures() for part in architecture.signatures)
    family = next((name for part, name in known if any(part in key for key in keys)), None)
    kind = "quantized" if any(".delta" in key for key in keys) else "full-precision"
    words = [
        f"the file looks like a {kind} {family} network"
        if family
        else f"the file looks like no family known here ({kind})"
    ]
    if kind == "quantized":
        words.append("with split shortcuts" if has_split(keys) else "without split shortcuts")
        words.append("with activation step sizes" if has_acts(keys) else "weights only")
    return ", ".join(words)


def has_split(keys: Iterable[str]) -> bool:
    return any(".weight_quantizer_0." in key for key in keys)


def has_acts(keys: Iterable[str]) -> bool:
    return any(".act_quantizer" in key for key in keys)


def assign_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replace the parameters of `model` (perhaps on the meta device) by `values`."""
    for name, value in values.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Parameter(value, requires_grad=False))
