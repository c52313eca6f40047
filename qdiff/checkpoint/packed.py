"""The packed format: a safetensors file with the integers at their true bit width and a sha256 of every tensor.

Its header holds all settings that are needed to rebuild the network.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qdiff.architecture import CUSTOM, family_names, find_architecture
from qdiff.checkpoint.hashes import tensor_hash
from qdiff.checkpoint.reading import (
    existing_file,
    first_line,
    is_safetensors,
    open_safetensors,
    validate_finite,
)
from qdiff.config import QuantConfig
from qdiff.errors import CheckpointError, ConfigError
from qdiff.layers import Quantizer
from qdiff.model import (
    QuantPlan,
    act_quantizers,
    apply_plan,
    enable_activations,
    mode_parameters,
    quant_layers,
    quantize_model,
    set_mode_parameters,
    wrap,
)
from qdiff.utils.files import atomic_write, file_hash

PACKED_VERSION = 1
WEIGHTS_ONLY = "weights_only."  # begins the names of parameters that serve while activations are not quantized


@dataclass(frozen=True)
class PackedInfo:
    """The header of a packed file.

    Attributes:
        family: the family of the network (`qdiff.architecture`); `custom` for networks of `qdiff.quantize`.
        unet_config: the configuration of the network, for `make_unet` of its family; for a custom network its
            `QuantPlan`.
        config: the number formats.
        calibration: how the network was calibrated.
        source_sha256: the hash of the full-precision weights (`state_hash`).
        model_parts: for a latent model, the name ("file") and the hash ("sha256") of the file beside this one that
            holds the first stage and the conditioner; None: the model has no such parts.
    """

    family: str
    unet_config: dict[str, Any]
    config: QuantConfig
    calibration: dict[str, Any]
    source_sha256: str
    model_parts: dict[str, str] | None = None


def pack_integers(values: Tensor, n_bits: int) -> Tensor:
    """Pack integers densely.

    Args:
        values: whole numbers of 0 to 2^n_bits - 1, of any shape with N elements.
        n_bits: their width, 2 to 16.

    Returns:
        A little-endian bit stream, uint8 [ceil(N * n_bits / 8)].
    """
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
    """Undo `pack_integers`.

    Args:
        packed: the bit stream.
        n_bits: the width of the integers.
        shape: their shape.

    Returns:
        The integers, as uint8 up to 8 bits and as int32 above.
    """
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
    """Write the packed format: integers at their true width, scales and zero points, and the parameters in float32.

    Args:
        path: the file to write.
        model: the quantized network; no engine was applied to it.
        info: its header.

    Raises:
        WriteError: the file cannot be written.
    """
    tensors, metadata = pack(model, info)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def pack(model: nn.Module, info: PackedInfo) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of the packed file of a network; see `save_packed`."""
    activations = info.config.quant_act
    parameters = dict(model.named_parameters()) | mode_parameters(model, activations)
    tensors = {name: parameter.detach().float() for name, parameter in parameters.items()}
    if activations:
        others = mode_parameters(model, False)
        differing = {name: value for name, value in others.items() if not torch.equal(value, parameters[name])}
        tensors |= {f"{WEIGHTS_ONLY}{name}": value.detach().float() for name, value in differing.items()}
    tensors |= _other_buffers(model)
    for layer_path, layer in quant_layers(model).items():
        for name, quantizer in layer.named_weight_quantizers():
            stem = f"{layer_path}.{name}"
            tensors[f"{stem}.integers"] = pack_integers(quantizer.integers.cpu(), quantizer.n_bits)
            tensors[f"{stem}.delta"] = quantizer.scale.flatten()
            tensors[f"{stem}.zero_point"] = _small_integers(quantizer.zero_point.flatten())
    if activations:
        for stem, act_quantizer in act_quantizers(model).items():
            tensors[f"{stem}.delta"], tensors[f"{stem}.zero_point"] = act_quantizer.scale, act_quantizer.zero_point
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "format": "qdiff-packed",
        "version": PACKED_VERSION,
        "family": info.family,
        "unet": info.unet_config,
        "quantization": info.config.to_dict(),
        "split_layers": {name: layer.split for name, layer in quant_layers(model).items() if layer.split},
        "calibration": info.calibration,
        "source_sha256": info.source_sha256,
        "stages": info.model_parts,
        "sha256": {name: tensor_hash(tensor)[:32] for name, tensor in tensors.items()},
    }
    header["header_sha256"] = _header_hash(header)
    return tensors, {"qdiff": json.dumps(header, separators=(",", ":"))}


def _other_buffers(model: nn.Module, every_path: bool = False) -> dict[str, Tensor]:
    """The persistent buffers of a network except those of quantizers, such as the statistics of batch norms.

    Args:
        model: the network.
        every_path: list a buffer that stands at several paths under each of them, not only under the first.
    """
    modules = model.named_modules(remove_duplicate=False)
    quantizers = tuple(f"{path}." for path, module in modules if isinstance(module, Quantizer))
    buffers = model.named_buffers(remove_duplicate=not every_path)
    persistent = set(model.state_dict())
    return {name: buffer for name, buffer in buffers if name in persistent and not name.startswith(quantizers)}


def _header_hash(header: Mapping[str, Any]) -> str:
    """The sha256 of the header without the hash itself."""
    content = {key: value for key, value in header.items() if key != "header_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _small_integers(values: Tensor) -> Tensor:
    """Convert zero points, which are whole numbers, to int16 if they fit."""
    return values.to(torch.int16) if values.abs().max() < 2**15 else values


@dataclass(frozen=True)
class PackedFile:
    """A packed file whose header has been read and checked.

    Attributes:
        path: the file.
        info: its header.
        hashes: the sha256 of every tensor, by name.
        metadata: what the file says beside its header.
    """

    path: Path
    info: PackedInfo
    hashes: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls, path: str | Path) -> "PackedFile | None":
        """Open a packed file; None for a file of another format.

        Raises:
            CheckpointError: the file is missing or damaged, or it is a packed file of another version or of an unknown
                family.
        """
        path = existing_file(path)
        if not is_safetensors(path):
            return None
        with open_safetensors(path) as file:
            metadata = dict(file.metadata() or {})
        header = metadata.pop("qdiff", None)
        return None if header is None else replace(cls._from_header(path, header), metadata=metadata)

    @classmethod
    def open(cls, path: str | Path) -> "PackedFile":
        """Open a packed file.

        Raises:
            CheckpointError: see `find`; also if the file has another format.
        """
        if (packed := cls.find(path)) is not None:
            return packed
        kind = "a safetensors file without our header: " if is_safetensors(Path(path)) else ""
        raise CheckpointError(
            f"{path}: {kind}not a packed quantized checkpoint (the export command converts a published .pth)"
        )

    @classmethod
    def _from_header(cls, path: Path, header_json: str) -> "PackedFile":
        """Parse and check the header of the file at `path`."""
        try:
            header = json.loads(header_json)
            if header["format"] != "qdiff-packed" or header["version"] != PACKED_VERSION:
                raise CheckpointError(
                    f"{path}: format {header['format']} version {header['version']}: "
                    f"expected qdiff-packed version {PACKED_VERSION}"
                )
            if header["header_sha256"] != _header_hash(header):
                raise CheckpointError(f"{path}: damaged: the header does not match its sha256")
            info = PackedInfo(
                family=header["family"],
                unet_config=header["unet"],
                config=QuantConfig.from_dict(header["quantization"]),
                calibration=header["calibration"],
                source_sha256=header["source_sha256"],
                model_parts=header.get("stages"),
            )
            packed = cls(path, info, header["sha256"])
        except (KeyError, TypeError, json.JSONDecodeError, ConfigError) as error:
            raise CheckpointError(f"{path}: damaged header ({first_line(error)})") from None
        if info.family not in (known := [*family_names(), CUSTOM]):
            raise CheckpointError(
                f"{path}: another network: of the {info.family} family, expected {' or '.join(known)}"
            )
        return packed

    def check(self, family: str, unet_config: Mapping[str, Any], quant: QuantConfig) -> None:
        """Compare the header with the expected network and number formats.

        Args:
            family: the family of the network.
            unet_config: the configuration of the network.
            quant: the number formats.

        Raises:
            CheckpointError: the file holds another network, or has other formats. The message has both values.
        """
        info, path = self.info, self.path
        if info.family != family:
            raise CheckpointError(f"{path}: another network: a network of the {info.family} family, expected {family}")
        stored, expected = _comparable(info.unet_config), _comparable(unet_config)
        for key in sorted({*stored, *expected}):
            if stored.get(key) != expected.get(key):
                raise CheckpointError(
                    f"{path}: another network: {key} is {stored.get(key)}, the configuration says {expected.get(key)}"
                )
        if quant.quant_mode == "linear" != info.config.quant_mode:
            raise CheckpointError(" linear: its rounding was learned", field="quant_mode", where=f"{path}: ")
        for name in ["weight_bit", "split"] + (["act_bit", "a_sym", "sm_abit"] if quant.quant_act else []):
            in_file, given = getattr(info.config, name), getattr(quant, name)
            if in_file != given:
                message = f": the file has {in_file}, called with {given}"
                raise CheckpointError(message, field=name, where=f"{path}: ")

    def network(self, activations: bool | None = None, model: nn.Module | None = None) -> nn.Module:
        """Load the quantized network. Every tensor is checked against its sha256.

        Args:
            activations: quantize activations; None: as the network was calibrated. False is possible for a file with
                activation scales too.
            model: the full-precision network of a custom file. Its structure is used, its parameters are not.

        Raises:
            CheckpointError: the file is damaged, `activations` is True and the file has weights only, or `model` is
                another network.
            ConfigError: `model` is missing, or is given for a file that does not need it.
        """
        activations = self.info.config.quant_act if activations is None else activations
        if activations and not self.info.config.quant_act:
            raise CheckpointError(
                f"{self.path}: activations were asked for, but the file holds no activation scales (weights only)"
            )
        wrapped = self._wrapped(model)
        with open_safetensors(self.path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._fill(wrapped, tensors)
        enable_activations(wrapped, activations)
        remember_info(wrapped, replace(self.info, config=replace(self.info.config, quant_act=activations)))
        return wrapped

    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Make of `model` the quantized network of a custom file, in place.

        Args:
            model: a network of the same structure; its parameters may be on the meta device.
            tensors: the tensors of the file. Each is checked against its sha256.

        Raises:
            CheckpointError: a tensor is damaged, or `model` is another network.
        """
        self._apply_plan(model, wrap)
        self._fill(model, tensors)
        enable_activations(model, self.info.config.quant_act)
        remember_info(model, self.info)

    def _fill(self, network: nn.Module, given: Mapping[str, Tensor]) -> None:
        """Check the tensors of the file, and give them to the quantized form of the network."""
        tensors, activations = dict(given), self.info.config.quant_act
        _validate_hashes(tensors, self.hashes, self.path)
        others = {name: tensors.pop(name) for name in list(tensors) if name.startswith(WEIGHTS_ONLY)}
        for path, layer in quant_layers(network).items():
            if f"{path}.smoothing" in tensors:
                layer.smoothing = torch.empty(layer.shape[layer.channels], device="meta")
        _validate_tensors(network, tensors, activations, self.path)
        _assign_tensors(network, tensors, activations)
        _set_weights_only(network, others, self.path)

    def _wrapped(self, model: nn.Module | None) -> nn.Module:
        """The quantized form of the network, without the values of the file."""
        info = self.info
        if info.family != CUSTOM:
            if model is not None:
                raise ConfigError(f": {self.path} holds the structure of its network; expected none", field="model")
            architecture = find_architecture(info.family)
            with torch.device("meta"):
                return quantize_model(architecture.make_unet(info.unet_config), architecture, info.config)
        if model is None:
            message = f": {self.path} was made by qdiff.quantize; expected its full-precision network"
            raise ConfigError(message, field="model")
        return self._apply_plan(model, apply_plan)

    def _apply_plan(
        self, model: nn.Module, apply: Callable[[nn.Module, QuantPlan, QuantConfig], nn.Module]
    ) -> nn.Module:
        """Give `model`, the network of a custom file, its quantized form by `apply`."""
        try:
            plan = QuantPlan.from_dict(self.info.unet_config)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: damaged header ({first_line(error)})") from None
        try:
            plan.validate(model)
            return apply(model, plan, self.info.config)
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path}: model is another network ({first_line(error)})") from None

    def model_parts_file(self) -> Path:
        """The file that holds the first stage and the conditioner, checked against its sha256.

        Raises:
            CheckpointError: the header names no file, or the file is missing or has another hash.
        """
        parts = self.info.model_parts
        if not parts:
            raise CheckpointError(
                f"{self.path}: holds the UNet alone and names no file for the autoencoder; give the full model"
            )
        file = self.path.parent / parts["file"]
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; {self.path} needs it (autoencoder, text tower)")
        if file_hash(file) != parts["sha256"]:
            raise CheckpointError(f"{file}: not the file that {self.path} was written with (its sha256 differs)")
        return file


def remember_info(network: nn.Module, info: PackedInfo) -> None:
    """Attach the header to a quantized network, so that `qdiff.save` can write it."""
    network.packed_info = info  # type: ignore[assignment]  # a plain attribute; copies of the network share it


def remembered_info(network: nn.Module) -> PackedInfo | None:
    """The header that `remember_info` attached, if any."""
    return getattr(network, "packed_info", None)


def _comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert lists to tuples, so that a configuration from JSON can be compared with one from code.

    The probability of dropout is left out: it does nothing in eval mode, and the same network has different ones in
    the published YAML files and in folders of diffusers.
    """
    items = values.items()
    return {key: tuple(value) if isinstance(value, list) else value for key, value in items if key != "dropout"}


def load_packed(path: str | Path, activations: bool | None = None) -> tuple[nn.Module, PackedInfo]:
    """Load a quantized network and its header from a packed file; see `PackedFile.network`."""
    network = PackedFile.open(path).network(activations)
    info = remembered_info(network)
    assert info is not None  # attached by `PackedFile.network`
    return network, info


def _validate_hashes(tensors: Mapping[str, Tensor], hashes: Mapping[str, str], path: Path) -> None:
    """Check the tensors of a file against their hashes, and for finite values."""
    if set(tensors) != set(hashes):
        raise CheckpointError(f"{path}: damaged: its tensors are not those listed in its header")
    for name, tensor in tensors.items():
        if tensor_hash(tensor)[:32] != hashes[name]:
            raise CheckpointError(f"{path}: damaged: {name} does not match its sha256")
    validate_finite(path, tensors)


def _set_weights_only(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give the network the parameters of a file that serve while activations are not quantized."""
    values = {name.removeprefix(WEIGHTS_ONLY): tensor for name, tensor in tensors.items()}
    own = dict(network.named_parameters())
    for name, tensor in values.items():
        if name not in own or own[name].shape != tensor.shape:
            expected = f"the shape {tuple(own[name].shape)}" if name in own else "no such tensor"
            found = f"{WEIGHTS_ONLY}{name} has the shape {tuple(tensor.shape)}"
            raise CheckpointError(f"{path}: another network: {found}, expected {expected}")
    if values:
        # in the order of the network, so that `save` writes the same bytes again
        set_mode_parameters(network, {name: values[name].to(own[name].dtype) for name in own if name in values})


def _names_in_file(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The name in the file of each parameter and of each buffer that no quantizer has, by its name in `model`.

    A file holds a tensor that stands at several paths once, under the first of them.
    """
    names: dict[str, str] = {}
    first_names: dict[int, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in [*parameters, *_other_buffers(model, every_path=True).items()]:
        first_name = first_names.setdefault(id(tensor), name)
        names[name] = name if name in tensors else first_name
    return names


def _validate_tensors(model: nn.Module, tensors: Mapping[str, Tensor], activations: bool, path: Path) -> None:
    """Check that the file holds exactly the tensors of the network, in their shapes.

    Args:
        model: the network.
        tensors: the tensors of the file.
        activations: the file holds activation scales.
        path: the file, for messages.

    Raises:
        CheckpointError: a tensor is missing or unknown, or has another shape.
    """
    own = dict(model.named_parameters(remove_duplicate=False)) | _other_buffers(model, every_path=True)
    names = _names_in_file(model, tensors)
    expected: dict[str, tuple[int, ...]] = {names[name]: tuple(tensor.shape) for name, tensor in own.items()}
    for stem, layer in quant_layers(model).items():
        for name, quantizer in layer.named_weight_quantizers():
            expected[f"{stem}.{name}.integers"] = (-(-quantizer.integers.numel() * quantizer.n_bits // 8),)
            expected |= dict.fromkeys(_qparam_names(f"{stem}.{name}"), (quantizer.scale.numel(),))
    if activations:
        for stem, act_quantizer in act_quantizers(model).items():
            expected |= dict.fromkeys(_qparam_names(stem), tuple(act_quantizer.scale.shape))
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: another network: it holds no {name}")
        if (found := tuple(tensors[name].shape)) != shape:
            raise CheckpointError(f"{path}: another network: {name} has the shape {found}, expected {shape}")
    if unknown := sorted(set(tensors) - set(expected)):
        raise CheckpointError(f"{path}: another network: it holds {unknown[0]}, which the network does not have")


def _qparam_names(stem: str) -> tuple[str, str]:
    """The names in a file of the scale and the zero point of a quantizer."""
    return f"{stem}.delta", f"{stem}.zero_point"


def _assign_tensors(model: nn.Module, tensors: Mapping[str, Tensor], activations: bool) -> None:
    """Assign the tensors of a packed file to the network, in its precision. Missing activation scales become NaN."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = parameters | _other_buffers(model, every_path=True)
    values: dict[str, Tensor] = {}
    for name, name_in_file in _names_in_file(model, tensors).items():
        if name_in_file not in values:
            tensor = tensors[name_in_file]
            if tensor.is_floating_point():
                tensor = tensor.to(own[name].dtype)
            values[name_in_file] = nn.Parameter(tensor, requires_grad=False) if name in parameters else tensor
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, values[name_in_file])
    for path, layer in quant_layers(model).items():
        integers = []
        for name, quantizer in layer.named_weight_quantizers():
            stem, shape = f"{path}.{name}", quantizer.scale.shape
            packed = tensors[f"{stem}.integers"]
            integers.append(unpack_integers(packed, quantizer.n_bits, quantizer.integers.shape))
            quantizer.scale = tensors[f"{stem}.delta"].reshape(shape)
            quantizer.zero_point = tensors[f"{stem}.zero_point"].float().reshape(shape)
        layer.set_integers(integers)
    for path, act_quantizer in act_quantizers(model).items():
        shape = act_quantizer.scale.shape
        act_quantizer.scale = tensors[f"{path}.delta"] if activations else torch.full(shape, float("nan"))
        act_quantizer.zero_point = tensors[f"{path}.zero_point"] if activations else torch.zeros(shape)
