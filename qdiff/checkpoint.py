"""Reading checkpoints safely, and the two formats of a quantized network.

Published: `torch.save` of the wrapped network's state, prefix `model.`, full-precision weights with
AdaRound's alpha; bit widths are not stored. Packed: safetensors with the integers at their true width,
everything needed to rebuild the network in the header, and a sha256 of every tensor.
"""

import hashlib
import json
import pickle
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qdiff import quantizers as Q
from qdiff.config import ConfigError, QuantConfig
from qdiff.files import atomic_write, describe_foreign_file
from qdiff.model import FAMILIES, Family, act_quantizers, enable_activations, quant_layers, quantize_model, time_steps

PACKED_VERSION = 1
PREFIX = "model."


class CheckpointError(ValueError):
    """A file that cannot be used; the message says what was found and what was expected."""


# --- reading any file of tensors ---------------------------------------------------------------


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.ckpt`, `.pth`, `.pt` or `.safetensors` file, memory-mapped; nothing in it is executed.

    Raises:
        CheckpointError: no such file, damaged, not a checkpoint, or a pickle that wants to run code.
    """
    path = _existing(path)
    if is_safetensors(path):
        with _open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = _load_pickle(path)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict of tensors, found {_describe_object(state)}")
    return dict(state)


def load_object(path: str | Path) -> Any:
    """A pickled file of plain containers and tensors (a calibration set); the errors of `read_tensors`."""
    return _load_pickle(_existing(path))


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as safetensors do: an 8-byte header length, then JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def _existing(path: str | Path) -> Path:
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


def _load_pickle(path: Path) -> Any:
    """`torch.load` of plain containers and tensors; leftovers of training frameworks become `_Inert` objects."""
    stubs: dict[str, tuple[type, str]] = {}
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
                raise CheckpointError(f"{path}: refused: its pickle asks for {name}, which is not plain tensors") from None
            raise CheckpointError(f"{path}: damaged or not a PyTorch checkpoint: it is no pickle of tensors") from None
        except PermissionError:
            raise CheckpointError(f"{path}: cannot be read (permission denied)") from None
        except _DAMAGE as error:
            if mmap and "mmap" in str(error):
                mmap = False  # files of torch < 1.6 are no zip archives and cannot be mapped
                continue
            raise CheckpointError(f"{path}: damaged or not a PyTorch checkpoint ({_first_line(error)})") from None


def _global_in(error: pickle.UnpicklingError) -> str:
    """The name of the class or function that a refused pickle asked for, or nothing."""
    found = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class) ([\w.]+)|(\w+\.\w[\w.]*) was not an allowed", str(error))
    return next((group for group in found.groups() if group), "") if found else ""


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def _describe_object(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(str, list(value)[:4]))}"
    return type(value).__name__


def load_into(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """Assign a full-precision state dict to `model` (which may be on the meta device), in float32.

    Raises:
        CheckpointError: keys or shapes differ; some are named.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_keys(expected, state, path)
    model.load_state_dict({name: state[name].float() for name in expected}, assign=True)
    return model.requires_grad_(False)


def check_keys(expected: Mapping[str, torch.Size], found: Mapping[str, Tensor], path: str | Path) -> None:
    """Compare names and shapes; the error names some of the differences and says what the file looks like."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [f"{len(names)} {word} ({_some(names)})" for word, names in (("missing", missing), ("unexpected", extra)) if names]
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
    signatures = {family.signature: name for name, family in FAMILIES.items()}
    family = next((name for sign, name in signatures.items() if any(sign in key for key in keys)), None)
    if family is None and any("input_blocks." in key for key in keys):
        family = "latent or stable-diffusion"
    kind = "quantized" if any(".delta" in key for key in keys) else "full-precision"
    words = [f"the file looks like a {kind} {family} network" if family else f"the file looks like no family known here ({kind})"]
    if kind == "quantized":
        words.append("with split shortcuts" if _has_split(keys) else "without split shortcuts")
        words.append("with activation step sizes" if _has_acts(keys) else "weights only")
    return ", ".join(words)


def _has_split(keys: Iterable[str]) -> bool:
    return any(".weight_quantizer_0." in key for key in keys)


def _has_acts(keys: Iterable[str]) -> bool:
    return any(".act_quantizer" in key for key in keys)


# --- the published format --------------------------------------------------------------------------


def published_names(model: nn.Module, family: Family) -> dict[str, str]:
    """From the path of each product's quantizer here to its name in a published file."""
    names = {}
    for path, module in model.named_modules():
        for attribute, product in family.products.get(type(module), {}).items():
            for operand in product.operands:
                inner = f"{path}.{attribute}.act_quantizer_{operand}"
                names[inner] = f"{path}.act_quantizer_{operand}" if product.on_block else inner
    return names


def published_shapes(model: nn.Module, family: Family, activations: bool = True) -> dict[str, torch.Size]:
    """Every key of the published file of a quantized `model`, with its shape."""
    shapes: dict[str, torch.Size] = {name: p.shape for name, p in model.named_parameters()}
    for path, layer in quant_layers(model).items():
        shapes[f"{path}.weight"] = layer.shape
        for suffix, quantizer in zip(("", "_0"), layer.weight_quantizers, strict=False):
            stem = f"{path}.weight_quantizer{suffix}"
            shapes[f"{stem}.alpha"] = quantizer.integers.shape
            shapes[f"{stem}.delta"] = shapes[f"{stem}.zero_point"] = quantizer.delta.shape
    if activations:
        renamed = published_names(model, family)
        for path in act_quantizers(model):
            stem = renamed.get(path, path)
            shapes[f"{stem}.delta"] = shapes[f"{stem}.zero_point"] = torch.Size([])
    return {PREFIX + name: shape for name, shape in shapes.items()}


def save_published(path: str | Path, model: nn.Module, family: Family, weights: Mapping[str, Tensor], activations: bool) -> None:
    """Write the published format.

    Args:
        weights: the full-precision state dict of the network: the file stores weights with alphas.
        activations: write the activation step sizes too.

    Raises:
        CheckpointError: the network has time-step sets, which this format cannot hold, or the weights are those of another network.
    """
    if time_steps(model) is not None:
        raise CheckpointError(f"{path}: the published format holds one step size for all time steps, not time-step sets")
    state: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    for name, layer in quant_layers(model).items():
        weight = weights[f"{name}.weight"].detach().float().cpu()
        state[f"{name}.weight"] = weight
        parts = zip(("", "_0"), layer.weight_quantizers, layer._parts(weight), strict=False)
        for suffix, quantizer, part in parts:
            stem = f"{name}.weight_quantizer{suffix}"
            delta, zero = quantizer.delta.cpu(), quantizer.zero_point.cpu()
            integers = quantizer.integers.cpu().float()
            alpha = Q.alpha_from_integers(part, integers, delta, zero)
            if not torch.equal(Q.hard_integers(part, alpha, delta, zero, quantizer.n_bits), integers):
                raise CheckpointError(f"{path}: {name}: its integers are not a rounding of the full-precision weights given")
            state[f"{stem}.alpha"] = alpha
            state[f"{stem}.delta"], state[f"{stem}.zero_point"] = delta, zero
    if activations:
        renamed = published_names(model, family)
        for name, quantizer in act_quantizers(model).items():
            stem = renamed.get(name, name)
            state[f"{stem}.delta"], state[f"{stem}.zero_point"] = quantizer.delta, quantizer.zero_point
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # a path would leave its name inside
        torch.save({PREFIX + name: tensor.cpu().contiguous() for name, tensor in state.items()}, file)


def midpoint_weights(model: nn.Module) -> dict[str, Tensor]:
    """Stand-ins for lost full-precision weights: the middle of each rounding interval, robust against its ends."""
    weights = {}
    for name, layer in quant_layers(model).items():
        parts = [(q.integers.float() - q.zero_point + 0.5) * q.delta for q in layer.weight_quantizers]
        weights[f"{name}.weight"] = torch.cat(parts, dim=1)
    return weights


def load_published(path: str | Path, build: dict, family: Family, config: QuantConfig) -> nn.Module:
    """A quantized network from a published file: no forward pass, no random data, no second copy.

    Args:
        build: the network's configuration, as `family.build` takes it.
        config: the options given; they are compared with what the file shows of itself.

    Raises:
        CheckpointError: another network, split or not, other widths or symmetry, damaged.
    """
    state = read_tensors(path)
    _check_split(path, state, config)
    activations = _has_acts(state)
    if config.quant_act and not activations:
        raise CheckpointError(f"{path}: --quant_act was given, but the file holds no activation step sizes (weights only)")
    with torch.device("meta"):
        model = quantize_model(family.build(build), family, config)
    check_keys(published_shapes(model, family, activations), state, path)
    _check_finite(path, state)
    _check_weight_bits(path, model, state, config.weight_bit)
    if config.quant_act:
        _check_activations(path, state, config)
    _fill_published(model, family, state, activations)
    enable_activations(model, config.quant_act)
    return model


def _fill_published(model: nn.Module, family: Family, state: Mapping[str, Tensor], activations: bool) -> None:
    parameters = {name: state[PREFIX + name].float().clone() for name, _ in model.named_parameters()}
    assign_parameters(model, parameters)
    for path, layer in quant_layers(model).items():
        integers = []
        weight = state[f"{PREFIX}{path}.weight"].float()
        for suffix, quantizer, part in zip(("", "_0"), layer.weight_quantizers, layer._parts(weight), strict=False):
            stem = f"{PREFIX}{path}.weight_quantizer{suffix}"
            delta, zero = state[f"{stem}.delta"].float().clone(), state[f"{stem}.zero_point"].float().clone()
            quantizer.delta, quantizer.zero_point = delta, zero
            integers.append(Q.hard_integers(part, state[f"{stem}.alpha"].float(), delta, zero, quantizer.n_bits))
        layer.set_integers(integers)
    renamed = published_names(model, family)
    for path, quantizer in act_quantizers(model).items():
        stem = PREFIX + renamed.get(path, path)
        quantizer.delta = state[f"{stem}.delta"].float().clone() if activations else torch.tensor(float("nan"))
        quantizer.zero_point = state[f"{stem}.zero_point"].float().clone() if activations else torch.tensor(0.0)


def assign_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replace the parameters of `model` (perhaps on the meta device) by `values`."""
    for name, value in values.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Parameter(value, requires_grad=False))


def _check_split(path: str | Path, state: Mapping[str, Tensor], config: QuantConfig) -> None:
    if _has_split(state) != config.split and any(".weight_quantizer." in key for key in state):
        given, file = ("with", "without") if config.split else ("without", "with")
        raise CheckpointError(f"{path}: --split mismatch: called {given} --split, but the file was made {file} it; {look_of(state)}")


def _check_finite(path: str | Path, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: damaged: {name} holds values that are not finite numbers")
        if name.endswith(".delta") and (tensor == 0).any():
            raise CheckpointError(f"{path}: damaged: {name} holds a step size of zero")


def infer_weight_bits(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The width whose grid the step sizes were made for, or None where they tell nothing.

    Per channel (max w - min w) / delta is (2^b - 1) / f with a shrink factor f in [0.21, 1] that is near
    1 for some channel of most tensors; the least ratio of each tensor votes.
    """
    votes: list[int] = []
    for name, layer in quant_layers(model).items():
        weight = state[f"{PREFIX}{name}.weight"].float()
        for suffix, part in zip(("", "_0"), layer._parts(weight), strict=False):
            rows, delta = part.flatten(1), state[f"{PREFIX}{name}.weight_quantizer{suffix}.delta"].flatten()
            ratio = ((rows.amax(1) - rows.amin(1)) / delta)[delta > 10 * Q.MIN_DELTA]
            if len(ratio) == 0 or ratio.min() <= 0:
                continue
            n_bits = round(torch.log2(ratio.min() + 1).item())
            # the shrink that gives this ratio must be one that the search can choose, and not a rare one
            if 0.98 <= ratio.min().item() / (2**n_bits - 1) <= 1.4:
                votes.append(n_bits)
    total = sum(len(layer.weight_quantizers) for layer in quant_layers(model).values())
    if not votes:
        return None
    winner = max(set(votes), key=votes.count)
    return winner if votes.count(winner) > 0.8 * total else None


def _check_weight_bits(path: str | Path, model: nn.Module, state: Mapping[str, Tensor], weight_bit: int) -> None:
    found = infer_weight_bits(model, state)
    if found is not None and found != weight_bit:
        raise CheckpointError(
            f"{path}: --weight_bit {weight_bit} was given, but the step sizes of the file are those of {found}-bit weights"
        )


def _check_activations(path: str | Path, state: Mapping[str, Tensor], config: QuantConfig) -> None:
    zeros = [tensor for name, tensor in state.items() if ".act_quantizer" in name and name.endswith(".zero_point")]
    symmetric = all(bool((zero == 0).all()) for zero in zeros)
    if symmetric != config.a_sym:
        given, file = ("with", "asymmetric") if config.a_sym else ("without", "symmetric")
        raise CheckpointError(f"{path}: --a_sym mismatch: called {given} --a_sym, but the activations of the file are {file}")
    levels, found = 2**config.act_bit - 1, torch.cat([zero.flatten().float() for zero in zeros])
    # that of x_t lies in the middle of the range; some may lie outside it; symmetric activations do not tell their width
    if not symmetric and ((found > levels).float().mean() > 0.25 or found.max() < levels / 16):
        words = f"--act_bit {config.act_bit} was given, but activation zero points like {found.median():.0f} are those of another width"
        raise CheckpointError(f"{path}: {words}")
    steps = [float(t) for name, t in state.items() if name.endswith(".act_quantizer_w.delta")]
    # a probability is at most 1: at 16 bits no step exceeds 1 / 32767; at 8 bits all of them below that would
    # mean that no attention weight ever exceeds 0.008
    if steps and config.sm_abit == 16 and max(steps) > 2 / 32767:
        raise CheckpointError(f"{path}: --sm_abit 16 was given, but a softmax step size of {max(steps):.2g} is too coarse for 16 bits")
    if steps and config.sm_abit <= 8 and max(steps) <= 1 / 32767:
        raise CheckpointError(
            f"{path}: --sm_abit {config.sm_abit} was given, but softmax step sizes of {max(steps):.2g} are those of 16 bits"
        )


# --- the packed format ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedInfo:
    """The header of a packed file.

    family, build: rebuild the network. config: the number formats. calibration: how it was made.
    source_sha256: hash of the full-precision weights (`state_hash`). stages: for a latent model, the
    file beside this one that holds the rest of it (autoencoder, text tower): {"file", "sha256"}.
    """

    family: str
    build: dict
    config: QuantConfig
    calibration: dict
    source_sha256: str
    stages: dict | None = None


def state_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of a state dict, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(tensor_hash(state[name]).encode())
    return digest.hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """sha256 of a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def pack_integers(values: Tensor, n_bits: int) -> Tensor:
    """Integers of up to 16 bits as a dense little-endian bit stream: uint8 [ceil(N * n_bits / 8)]."""
    flat = values.reshape(-1).to(torch.int32)
    if n_bits == 8:
        return flat.to(torch.uint8)
    if n_bits == 4:
        padded = torch.nn.functional.pad(flat, (0, len(flat) % 2)).to(torch.uint8)
        return padded[0::2] | (padded[1::2] << 4)
    if n_bits == 16:
        return torch.stack([flat & 255, flat >> 8], dim=1).reshape(-1).to(torch.uint8)
    bits = (flat[:, None] >> torch.arange(n_bits)) & 1
    bits = torch.nn.functional.pad(bits.reshape(-1), (0, -bits.numel() % 8)).reshape(-1, 8)
    return (bits << torch.arange(8)).sum(1).to(torch.uint8)


def unpack_integers(packed: Tensor, n_bits: int, shape: Iterable[int]) -> Tensor:
    """Inverse of `pack_integers`: uint8 up to 8 bits, else int32, of `shape`."""
    shape = tuple(shape)
    count = torch.Size(shape).numel()
    if n_bits == 8:
        flat = packed.clone()
    elif n_bits == 4:
        flat = torch.stack([packed & 15, packed >> 4], dim=1).reshape(-1)[:count]
    elif n_bits == 16:
        pairs = packed.to(torch.int32).reshape(-1, 2)
        flat = pairs[:, 0] | (pairs[:, 1] << 8)
    else:
        bits = ((packed.to(torch.int32)[:, None] >> torch.arange(8)) & 1).reshape(-1)[: count * n_bits]
        flat = (bits.reshape(count, n_bits) << torch.arange(n_bits)).sum(1)
    return flat.reshape(shape).to(torch.uint8 if n_bits <= 8 else torch.int32)


def save_packed(path: str | Path, model: nn.Module, info: PackedInfo) -> None:
    """Write the packed format: integers at their true width, scales, and the rest in float32."""
    tensors = {name: p.detach().float() for name, p in model.named_parameters()}
    for name, layer in quant_layers(model).items():
        for suffix, quantizer in zip(("", "_0"), layer.weight_quantizers, strict=False):
            stem = f"{name}.weight_quantizer{suffix}"
            tensors[f"{stem}.integers"] = pack_integers(quantizer.integers.cpu(), quantizer.n_bits)
            tensors[f"{stem}.delta"] = quantizer.delta.flatten()
            tensors[f"{stem}.zero_point"] = _small_integers(quantizer.zero_point.flatten())
    if info.config.quant_act:
        for name, quantizer in act_quantizers(model).items():
            tensors[f"{name}.delta"], tensors[f"{name}.zero_point"] = quantizer.delta, quantizer.zero_point
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "format": "qdiff-packed",
        "version": PACKED_VERSION,
        "family": info.family,
        "unet": info.build,
        "quantization": info.config.to_dict(),
        "split_layers": {name: layer.split for name, layer in quant_layers(model).items() if layer.split},
        "calibration": info.calibration,
        "source_sha256": info.source_sha256,
        "stages": info.stages,
        "sha256": {name: tensor_hash(tensor)[:32] for name, tensor in tensors.items()},
    }
    header["header_sha256"] = _header_hash(header)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"qdiff": json.dumps(header, separators=(",", ":"))})


def _header_hash(header: dict) -> str:
    content = {key: value for key, value in header.items() if key != "header_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _small_integers(values: Tensor) -> Tensor:
    """Zero points as int16 where they fit (they are whole numbers), else as they are."""
    return values.to(torch.int16) if values.abs().max() < 2**15 else values


def is_packed(path: str | Path) -> bool:
    """Whether a safetensors file carries our header."""
    path = _existing(path)
    if not is_safetensors(path):
        return False
    with _open_safetensors(path) as file:
        return "qdiff" in (file.metadata() or {})


def read_packed_info(path: str | Path) -> PackedInfo:
    """The header of a packed file alone; CheckpointError as `load_packed`."""
    header = _read_header(_existing(path))
    return PackedInfo(
        family=header["family"],
        build=header["unet"],
        config=QuantConfig.from_dict(header["quantization"]),
        calibration=header["calibration"],
        source_sha256=header["source_sha256"],
        stages=header.get("stages"),
    )


def stages_file(path: str | Path) -> Path:
    """The file that a packed checkpoint names for the rest of its model, checked against its sha256.

    Raises:
        CheckpointError: none is named, or it is missing or another one.
    """
    stages = read_packed_info(path).stages
    if not stages:
        raise CheckpointError(f"{path}: holds the UNet alone and names no file for the autoencoder; give the full model")
    file = Path(path).parent / stages["file"]
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; {path} needs it (autoencoder, text tower)")
    if file_hash(file) != stages["sha256"]:
        raise CheckpointError(f"{file}: not the file that {path} was written with (its sha256 differs)")
    return file


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_header(path: Path) -> dict:
    with _open_safetensors(path) as file:
        text = (file.metadata() or {}).get("qdiff")
    if text is None:
        raise CheckpointError(f"{path}: a safetensors file without our header: not a packed quantized checkpoint")
    try:
        header = json.loads(text)
        if header["format"] != "qdiff-packed" or header["version"] != PACKED_VERSION:
            raise CheckpointError(
                f"{path}: format {header['format']} version {header['version']}: expected qdiff-packed version {PACKED_VERSION}"
            )
        if header["header_sha256"] != _header_hash(header):
            raise CheckpointError(f"{path}: damaged: the header does not match its sha256")
        QuantConfig.from_dict(header["quantization"])
    except (KeyError, TypeError, json.JSONDecodeError, ConfigError) as error:
        raise CheckpointError(f"{path}: damaged header ({_first_line(error)})") from None
    if header["family"] not in FAMILIES:
        if not FAMILIES:
            raise CheckpointError(f"{path}: no family is registered: ddim.family and ldm.family do so when they are imported")
        raise CheckpointError(f"{path}: another network: of the {header['family']} family, expected {' or '.join(sorted(FAMILIES))}")
    return header


def load_packed(path: str | Path, activations: bool | None = None) -> tuple[nn.Module, PackedInfo]:
    """A quantized network from a packed file alone; every tensor is checked against its sha256.

    Args:
        activations: quantize activations (None: as the file was calibrated). A file with activation
            step sizes serves weights-only too.

    Raises:
        CheckpointError: damaged, of another version, or activations asked of a weights-only file.
    """
    path = _existing(path)
    info = read_packed_info(path)
    hashes = _read_header(path)["sha256"]
    with _open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if set(tensors) != set(hashes):
        raise CheckpointError(f"{path}: damaged: its tensors are not those listed in its header")
    for name, tensor in tensors.items():
        if tensor_hash(tensor)[:32] != hashes[name]:
            raise CheckpointError(f"{path}: damaged: {name} does not match its sha256")
    activations = info.config.quant_act if activations is None else activations
    if activations and not info.config.quant_act:
        raise CheckpointError(f"{path}: activations were asked for, but the file holds no activation step sizes (weights only)")
    family = FAMILIES[info.family]
    with torch.device("meta"):
        model = quantize_model(family.build(info.build), family, info.config)
    _fill_packed(model, tensors, info)
    enable_activations(model, activations)
    return model, replace(info, config=replace(info.config, quant_act=activations))


def _fill_packed(model: nn.Module, tensors: Mapping[str, Tensor], info: PackedInfo) -> None:
    assign_parameters(model, {name: tensors[name] for name, _ in model.named_parameters()})
    for name, layer in quant_layers(model).items():
        integers = []
        for suffix, quantizer in zip(("", "_0"), layer.weight_quantizers, strict=False):
            stem, shape = f"{name}.weight_quantizer{suffix}", quantizer.delta.shape
            integers.append(unpack_integers(tensors[f"{stem}.integers"], quantizer.n_bits, quantizer.integers.shape))
            quantizer.delta = tensors[f"{stem}.delta"].reshape(shape)
            quantizer.zero_point = tensors[f"{stem}.zero_point"].float().reshape(shape)
        layer.set_integers(integers)
    for name, quantizer in act_quantizers(model).items():
        stored = info.config.quant_act
        quantizer.delta = tensors[f"{name}.delta"] if stored else torch.full(quantizer.delta.shape, float("nan"))
        quantizer.zero_point = tensors[f"{name}.zero_point"] if stored else torch.zeros(quantizer.zero_point.shape)
