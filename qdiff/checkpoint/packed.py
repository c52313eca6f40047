"""The packed format: safetensors with the integers at their true width and a sha256 of every tensor.

The header has everything that is needed to rebuild the network.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qdiff.architecture import FAMILIES
from qdiff.checkpoint.hashes import tensor_hash
from qdiff.checkpoint.reading import (
    assign_parameters,
    check_finite,
    existing,
    first_line,
    is_safetensors,
    open_safetensors,
)
from qdiff.config import QuantConfig
from qdiff.errors import CheckpointError, ConfigError
from qdiff.model import act_quantizers, enable_activations, quant_layers, quantize_model
from qdiff.utils.files import atomic_write, file_hash

PACKED_VERSION = 1


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
    model_parts: dict | None = None


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
            tensors[f"{stem}.delta"] = quantizer.scale.flatten()
            tensors[f"{stem}.zero_point"] = _small_integers(quantizer.zero_point.flatten())
    if info.config.quant_act:
        for name, act_quantizer in act_quantizers(model).items():
            tensors[f"{name}.delta"], tensors[f"{name}.zero_point"] = act_quantizer.scale, act_quantizer.zero_point
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
        "stages": info.model_parts,
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
    path = existing(path)
    if not is_safetensors(path):
        return False
    with open_safetensors(path) as file:
        return "qdiff" in (file.metadata() or {})


def read_packed_info(path: str | Path) -> PackedInfo:
    """The header of a packed file alone; CheckpointError as `load_packed`."""
    header = _read_header(existing(path))
    return PackedInfo(
        family=header["family"],
        build=header["unet"],
        config=QuantConfig.from_dict(header["quantization"]),
        calibration=header["calibration"],
        source_sha256=header["source_sha256"],
        model_parts=header.get("stages"),
    )


def check_packed(path: str | Path, info: PackedInfo, family: str, build: dict, quant: QuantConfig) -> None:
    """Compare the header of a packed file with the network and the number formats that are wanted.

    Raises:
        CheckpointError: another family or network, other formats; both values are named.
    """
    if info.family != family:
        raise CheckpointError(f"{path}: another network: a network of the {info.family} family, expected {family}")
    stored, expected = _comparable(info.build), _comparable(build)
    for key in sorted({*stored, *expected}):
        if stored.get(key) != expected.get(key):
            raise CheckpointError(
                f"{path}: another network: {key} is {stored.get(key)}, the configuration says {expected.get(key)}"
            )
    if quant.quant_mode == "linear" != info.config.quant_mode:
        raise CheckpointError(f"{path}: --quant_mode linear: its rounding was learned")
    names = ["weight_bit", "split"] + (["act_bit", "a_sym", "sm_abit"] if quant.quant_act else [])
    for name in names:
        stored, given = getattr(info.config, name), getattr(quant, name)
        if stored != given:
            raise CheckpointError(f"{path}: --{name}: the file has {stored}, called with {given}")


def _comparable(values: dict) -> dict:
    """Lists as tuples, so that a configuration read from JSON compares with one from code."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def model_parts_file(path: str | Path) -> Path:
    """The file that a packed checkpoint names for the rest of its model, checked against its sha256.

    Raises:
        CheckpointError: none is named, or it is missing or another one.
    """
    model_parts = read_packed_info(path).model_parts
    if not model_parts:
        raise CheckpointError(
            f"{path}: holds the UNet alone and names no file for the autoencoder; give the full model"
        )
    file = Path(path).parent / model_parts["file"]
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; {path} needs it (autoencoder, text tower)")
    if file_hash(file) != model_parts["sha256"]:
        raise CheckpointError(f"{file}: not the file that {path} was written with (its sha256 differs)")
    return file


def _read_header(path: Path) -> dict:
    with open_safetensors(path) as file:
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
        raise CheckpointError(f"{path}: damaged header ({first_line(error)})") from None
    if header["family"] not in FAMILIES:
        if not FAMILIES:
            raise CheckpointError(
                f"{path}: no family is registered: ddim.family and ldm.family do so when they are imported"
            )
        raise CheckpointError(
            f"{path}: another network: of the {header['family']} family, expected {' or '.join(sorted(FAMILIES))}"
        )
    return header


def load_packed(path: str | Path, activations: bool | None = None) -> tuple[nn.Module, PackedInfo]:
    """A quantized network from a packed file alone; every tensor is checked against its sha256.

    Args:
        activations: quantize activations (None: as the file was calibrated). A file with activation
            step sizes serves weights-only too.

    Raises:
        CheckpointError: damaged, of another version, or activations asked of a weights-only file.
    """
    path = existing(path)
    info = read_packed_info(path)
    hashes = _read_header(path)["sha256"]
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if set(tensors) != set(hashes):
        raise CheckpointError(f"{path}: damaged: its tensors are not those listed in its header")
    for name, tensor in tensors.items():
        if tensor_hash(tensor)[:32] != hashes[name]:
            raise CheckpointError(f"{path}: damaged: {name} does not match its sha256")
    check_finite(path, tensors)
    activations = info.config.quant_act if activations is None else activations
    if activations and not info.config.quant_act:
        raise CheckpointError(
            f"{path}: activations were asked for, but the file holds no activation step sizes (weights only)"
        )
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
            stem, shape = f"{name}.weight_quantizer{suffix}", quantizer.scale.shape
            integers.append(unpack_integers(tensors[f"{stem}.integers"], quantizer.n_bits, quantizer.integers.shape))
            quantizer.scale = tensors[f"{stem}.delta"].reshape(shape)
            quantizer.zero_point = tensors[f"{stem}.zero_point"].float().reshape(shape)
        layer.set_integers(integers)
    for name, act_quantizer in act_quantizers(model).items():
        stored = info.config.quant_act
        act_quantizer.scale = (
            tensors[f"{name}.delta"] if stored else torch.full(act_quantizer.scale.shape, float("nan"))
        )
        act_quantizer.zero_point = (
            tensors[f"{name}.zero_point"] if stored else torch.zeros(act_quantizer.zero_point.shape)
        )
