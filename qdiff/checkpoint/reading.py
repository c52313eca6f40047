"""Safe reading of files of tensors. Nothing in them is executed; an error says what is wrong with a file."""

import codecs
import logging
import pickle
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qdiff.architecture import architectures
from qdiff.checkpoint.training import find_weights, strip_prefixes
from qdiff.errors import CheckpointError
from qdiff.utils.files import describe_foreign_file
from qdiff.utils.finite import first_not_finite

log = logging.getLogger(__name__)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a `.ckpt`, `.pth`, `.pt` or `.safetensors` file, memory-mapped. Nothing in it is executed.

    The file may be a training checkpoint (`qdiff.checkpoint.training`). Its EMA weights are preferred, and the log says
    what was taken.

    Raises:
        CheckpointError: the file is missing or damaged, is not a checkpoint, or is a pickle that asks to run code.
    """
    path = existing_file(path)
    if is_safetensors(path):
        with open_safetensors(path) as file:
            return strip_prefixes({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    content = _load_pickle(path)
    state, description = find_weights(content)
    if state is None:
        raise CheckpointError(f"{path}: expected a state dict of tensors, found {_describe_object(content)}")
    if description:
        log.warning("%s: a training checkpoint: taken: %s", path, description)
    return state


def load_object(path: str | Path, arrays: bool = False) -> Any:
    """Read a pickled file of plain containers and tensors, such as a calibration set.

    Args:
        path: the file.
        arrays: allow NumPy arrays of numbers too.

    Raises:
        CheckpointError: the file is missing or damaged, or its pickle asks to run code.
    """
    return _load_pickle(existing_file(path), dict(_ARRAY_GLOBALS) if arrays else {})


def is_safetensors(path: Path) -> bool:
    """Whether the file begins like a safetensors file, with an 8-byte header length and JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def existing_file(path: str | Path) -> Path:
    """The path of a file that may be a checkpoint.

    Raises:
        CheckpointError: there is no such file, or it is of another kind, such as a web page.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if foreign := describe_foreign_file(path):
        raise CheckpointError(f"{path}: expected a checkpoint, found {foreign}")
    return path


class _Inert:
    """A stand-in for objects of training frameworks, which are not needed. It ignores its arguments and its state."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Names that a pickle may ask for and that become `_Inert` objects.
INERT_PREFIXES = (
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
_DAMAGE_ERRORS = (  # torch.load raises these for damaged files
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


def _array_globals() -> Iterator[tuple[str, tuple[Any, str]]]:
    """The functions and classes that a pickled NumPy array asks for, by their names in NumPy 1 and 2."""
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


_ARRAY_GLOBALS = dict(_array_globals())


def _load_pickle(path: Path, allowed: Mapping[str, tuple[Any, str]] | None = None) -> Any:
    """Load plain containers and tensors by `torch.load`. Objects of training frameworks become `_Inert` objects.

    Args:
        path: the file.
        allowed: further classes and functions that the pickle may ask for, by full name.
    """
    stubs: dict[str, tuple[Any, str]] = dict(allowed or {})
    mmap = True
    while True:
        try:
            with torch.serialization.safe_globals(list(stubs.values())):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            name = _refused_global(error)
            full_name = f"builtins.{name}" if name in INERT_BUILTINS else name
            if (name in INERT_BUILTINS or name.startswith(INERT_PREFIXES)) and full_name not in stubs:
                stubs[full_name] = (type(name.rpartition(".")[2], (_Inert,), {}), full_name)
                continue
            if name:
                raise CheckpointError(
                    f"{path}: refused: its pickle asks for {name}, which is not plain tensors"
                ) from None
            raise CheckpointError(f"{path}: damaged or not a PyTorch checkpoint: it is no pickle of tensors") from None
        except PermissionError:
            raise CheckpointError(f"{path}: cannot be read (permission denied)") from None
        except _DAMAGE_ERRORS as error:
            if mmap and "mmap" in str(error):
                mmap = False  # files of torch < 1.6 are no zip archives and cannot be mapped
                continue
            raise CheckpointError(f"{path}: damaged or not a PyTorch checkpoint ({first_line(error)})") from None


def _refused_global(error: pickle.UnpicklingError) -> str:
    """The name of the class or function that a refused pickle asked for; empty if the error names none."""
    match = re.search(
        r"GLOBAL ([\w.]+)|Unsupported (?:global|class) ([\w.]+)|(\w+\.\w[\w.]*) was not an allowed", str(error)
    )
    return next((group for group in match.groups() if group), "") if match else ""


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, in a `with` statement. CheckpointError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 160 characters; its type if it has no message."""
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def _describe_object(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(str, list(value)[:4]))}"
    return type(value).__name__


def load_into(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """Assign a full-precision state dict to `model`, which may be on the meta device, in float32.

    Args:
        model: the network.
        state: its parameters and buffers.
        path: the file that they come from, for messages.

    Raises:
        CheckpointError: names or shapes differ (the message has some of them), or a value is not a finite number.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    validate_keys(expected, state, path)
    validate_finite(path, {name: state[name] for name in expected})
    model.load_state_dict({name: state[name].float() for name in expected}, assign=True)
    return model.requires_grad_(False)


def validate_finite(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a tensor has NaN or infinity. The message has the name of the first one."""
    if (name := first_not_finite(state)) is not None:
        raise CheckpointError(f"{path}: damaged: {name} holds values that are not finite numbers")


def validate_keys(expected: Mapping[str, torch.Size], state: Mapping[str, Tensor], path: str | Path) -> None:
    """Compare the names and the shapes of a state dict with the expected ones.

    Raises:
        CheckpointError: they differ. The message has some of the differences, and a description of the file.
    """
    missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or unexpected:
        differences = [
            f"{len(names)} {kind} ({_first_names(names)})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise CheckpointError(f"{path}: keys do not fit: {'; '.join(differences)}; {describe_state(state)}")
    wrong = [name for name, shape in expected.items() if state[name].shape != shape]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors have other shapes, first {name}: "
            f"found {list(state[name].shape)}, expected {list(expected[name])}"
        )


def _first_names(names: Sequence[str]) -> str:
    """The first three names, as text."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def describe_state(state: Mapping[str, Any]) -> str:
    """Describe what a state dict looks like, for error messages: its family, and how it is quantized."""
    keys = list(state)
    signatures = ((part, architecture.name) for architecture in architectures() for part in architecture.signatures)
    family = next((name for part, name in signatures if any(part in key for key in keys)), None)
    kind = "quantized" if any(".delta" in key for key in keys) else "full-precision"
    if family:
        description = f"the file looks like a {kind} {family} network"
    else:
        description = f"the file looks like no family known here ({kind})"
    if kind == "quantized":
        description += ", with split shortcuts" if has_split(keys) else ", without split shortcuts"
        description += ", with activation scales" if has_activation_scales(keys) else ", weights only"
    return description


def has_split(keys: Iterable[str]) -> bool:
    """Whether a published file was written with split shortcuts, from the names of its tensors."""
    return any(".weight_quantizer_0." in key for key in keys)


def has_activation_scales(keys: Iterable[str]) -> bool:
    """Whether a published file holds activation scales, from the names of its tensors."""
    return any(".act_quantizer" in key for key in keys)


def assign_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replace the parameters of `model`, which may be on the meta device, by `values`, given by name."""
    for name, value in values.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Parameter(value, requires_grad=False))
