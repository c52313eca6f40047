"""From Python: quantize any network, save the result, load a quantized network."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from fnmatch import fnmatchcase
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdiff.architecture import CUSTOM, Architecture, AttentionMatMulSpec
from qdiff.blocks import find_blocks, find_output_layers
from qdiff.calibration.collate import collate
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.directory import CalibrationDir
from qdiff.calibration.ranges import timestep_group_bounds
from qdiff.calibration.run import Calibration
from qdiff.checkpoint.hashes import state_hash
from qdiff.checkpoint.packed import PackedFile, PackedInfo, remember_info, remembered_info, save_packed
from qdiff.config import PRESETS, QuantConfig
from qdiff.engines.proxy import has_engine
from qdiff.engines.select import apply_engine
from qdiff.errors import ConfigError, NonFiniteError
from qdiff.layers import HALF, LAYER_TYPES
from qdiff.model import QuantPlan
from qdiff.policy import make_policy
from qdiff.refusals import keep_unused, log_own_parameters
from qdiff.scale_rules import FITTED_RULE
from qdiff.structure import Structure, find_structure, remember_summary, summarize
from qdiff.utils import distributed
from qdiff.utils.devices import select_device
from qdiff.utils.finite import first_not_finite
from qdiff.utils.memory import retain_freed_memory


def load(
    path: str | Path, model: nn.Module | None = None, *, device: str | torch.device = "auto", engine: str = "auto"
) -> nn.Module:
    """Load a quantized network from a packed checkpoint.

    Args:
        path: the packed checkpoint (`.safetensors`). Every tensor is checked against its sha256.
        model: only for files that `save` wrote of a network of `quantize`: the full-precision network, whose
            structure is used. Its parameters are neither used nor changed.
        device: `auto` (the best one present), `cpu`, `cuda`, `mps`, or a torch.device.
        engine: `simulated` (fake quantization), `integer` (products on integers), `integer_packed` (the same on CUDA,
            4-bit weights stay packed), or `auto`, which chooses by device, number formats and processor and says so in
            the log.

    Returns:
        The network, in eval mode: called with (x_t [N, C, H, W], t [N]) and, for text models, contexts [N, L, D].

    Raises:
        CheckpointError: no such file, damaged, of another format, or not of this `model`.
        ConfigError: a device or an engine that cannot be used; `model` is missing or not needed.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise ConfigError(f": expected an nn.Module, found {type(model).__name__}", field="model")
    network = PackedFile.open(path).network(model=model)
    return apply_engine(network.to(select_device(device)), engine)


def save(path: str | Path, network: nn.Module) -> None:
    """Write a quantized network as a packed checkpoint, which `load` reads.

    Args:
        path: the file to write, atomically.
        network: what `quantize` returned, or what `load` returned with `engine="simulated"`.

    Raises:
        ConfigError: another network, or one that runs on an engine.
        WriteError: the file cannot be written.
    """
    info = remembered_info(network)
    if info is None:
        raise ConfigError(": expected what qdiff.quantize or qdiff.load returned", field="network")
    if has_engine(network):
        raise ConfigError(": runs on an engine; expected one loaded with engine='simulated'", field="network")
    save_packed(path, network, info)


def quantize(
    model: nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any],
    *,
    shared: Sequence[str | int] = (),
    weight_bit: int = 8,
    act_bit: int | None = 8,
    symmetric: bool = False,
    blocks: Sequence[type[nn.Module]] | Mapping[type[nn.Module], str | None] | None = None,
    separate: Sequence[str] = (),
    keep: Sequence[type[nn.Module] | str] = (),
    attention_matmuls: Mapping[type[nn.Module], Mapping[str, AttentionMatMulSpec]] | None = None,
    splits: Mapping[str, int] | None = None,
    timestep_groups: int = 1,
    policy: Mapping[str, str] | None = None,
    preset: str = "fast",
    folder: str | Path | None = None,
    **recipe: object,
) -> nn.Module:
    """Quantize and calibrate a copy of a denoiser that knows nothing of this package.

    Every `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.ConvTranspose1d` and `nn.ConvTranspose2d` is replaced.
    Normalizations, embeddings and layers that never run stay as they are. Attention matmuls
    (`F.scaled_dot_product_attention`, `torch.einsum`, `matmul`, `bmm`, `baddbmm`) and concatenated shortcuts are found
    in a forward pass of two samples. The log lists what is quantized and what stays in full precision.

    Args:
        model: any network in float32, bfloat16 or float16. It is not changed. Its device is where the work is done.
        inputs: its inputs while sampling, from all time steps, 500 samples or more: tensors by position (x_t, t, ...),
            a dict of inputs by keyword, or a list of calls as a hook records them (`qdiff.calibration.collate`).
        shared: keywords or positions of inputs without samples, if their first dimension looks like them.
        weight_bit: the width of weights, 2 to 16 bits.
        act_bit: the width of activations, 2 to 16 bits; None leaves activations in full precision.
        symmetric: signed activations without zero point.
        blocks: module types that are reconstructed as a whole (residual blocks, attention blocks). Layers outside them
            are reconstructed alone. A dict names for each type the layer inside whose bias is added to the block's
            output: its mean error is then corrected. None: the blocks that are found; an empty list: none.
        separate: how the paths of layers inside blocks end that are reconstructed on their own (time projections).
        keep: what stays in full precision. The path of a module, a pattern (`head.*`), a type of modules or its name
            (`MultiheadAttention`) keeps everything inside; the path of a parameter keeps the parameter.
        attention_matmuls: module types with attention matmuls as attributes (`qdiff.layers.MatMul`), see
            `qdiff.architecture.AttentionMatMulSpec`. None: those that are found; an empty dict: none.
        splits: for layers whose input is a concatenation, by path: the channels of its first half (Q-Diffusion,
            section 4.3). None: those that are found; an empty dict: none.
        timestep_groups: the number of groups of time steps with activation scales of their own (arXiv 2311.16503).
        policy: {pattern of paths: widths}, for layers with other widths than the nominal ones: `W8A16`, `W8`, `A16`, or
            `keep` for full precision (`qdiff.policy`).
        preset: the recipe: `fast`, `best` or `published`.
        folder: keeps finished units, so that the same call continues after an interruption, and the files of a report.
        recipe: settings that replace those of the preset (`qdiff.config.CalibrationConfig`).

    Returns:
        The quantized network, in eval mode; `save` writes it.

    Raises:
        ConfigError: settings that cannot work, by name; names of what is not in the network.
        NonFiniteError: a weight, or a value inside the network, that is not finite, by name.
        TypeError: modules that cannot be quantized and are not kept, all of them, with what to add to `keep`; a block
            without an attention matmul that `attention_matmuls` names.
        RuntimeError: a block or layer that cannot be a unit, by path.
    """
    retain_freed_memory()
    _validate_model(model)
    _validate_recipe(preset, recipe, timestep_groups)
    _validate_splits(model, splits or {})
    data = collate(inputs, model, shared)
    network = deepcopy(model).eval()
    structure = find_structure(network, _two_samples(network, data))
    _validate_names(model, blocks or (), separate, keep, attention_matmuls or {}, structure.matmul_paths())
    architecture = _architecture(structure, blocks, separate, keep, attention_matmuls, splits)
    architecture = keep_unused(network, architecture, structure.order, _two_samples(network, data))
    bounds = timestep_group_bounds(data, timestep_groups) if timestep_groups > 1 else ()
    quant = _formats(weight_bit, act_bit, symmetric, bounds, policy or {}, preset)
    quant = replace(quant, split=bool(architecture.split_points(network)))
    plan = _plan(network, architecture, quant, splits or {})
    if blocks is None:
        architecture = replace(architecture, block_paths=_found_blocks(network, data, structure, plan))
    config = replace(PRESETS[preset], **recipe)  # type: ignore[arg-type]  # validated above
    directory = CalibrationDir(None if folder is None else Path(folder))
    return _calibrate(Calibration(network, architecture, quant, config, data, directory=directory), structure, plan)


def validate_settings(model: nn.Module, **settings: Any) -> None:
    """Check arguments of `quantize`, before work that gives its samples.

    Args:
        model: the network.
        settings: further arguments of `quantize`.

    Raises:
        ConfigError: see `quantize`. What depends on the samples is checked there.
    """
    bound = signature(quantize).bind(model, (), **settings)
    bound.apply_defaults()
    given, recipe = bound.arguments, bound.arguments["recipe"]
    _validate_model(model)
    _validate_recipe(given["preset"], recipe, given["timestep_groups"])
    _validate_splits(model, given["splits"] or {})
    weight_bit, act_bit, symmetric = (given[name] for name in ("weight_bit", "act_bit", "symmetric"))
    _formats(weight_bit, act_bit, symmetric, (), given["policy"] or {}, given["preset"])
    replace(PRESETS[given["preset"]], **recipe).validate()


def _architecture(
    structure: Structure,
    blocks: Sequence[type[nn.Module]] | Mapping[type[nn.Module], str | None] | None,
    separate: Sequence[str],
    keep: Sequence[type[nn.Module] | str],
    attention_matmuls: Mapping[type[nn.Module], Mapping[str, AttentionMatMulSpec]] | None,
    splits: Mapping[str, int] | None,
) -> Architecture:
    """What `quantize` was told of a network; what it was not told is taken from the structure that was found."""
    points = dict(structure.splits if splits is None else splits)
    return Architecture(
        CUSTOM,
        make_unet=_no_unet,
        blocks=dict(blocks) if isinstance(blocks, Mapping) else dict.fromkeys(blocks or ()),
        separate=tuple(separate),
        keep=tuple(keep),
        attention_matmuls=dict(attention_matmuls or {}),
        calls=structure.calls if attention_matmuls is None else {},
        split_points=lambda _: points,
    )


def _no_unet(_: dict[str, object]) -> nn.Module:
    raise NotImplementedError("a custom network is given to `load`, not made")


def _formats(
    weight_bit: int,
    act_bit: int | None,
    symmetric: bool,
    bounds: tuple[float, ...],
    policy: Mapping[str, str],
    preset: str,
) -> QuantConfig:
    """The number formats of a custom network."""
    rule = "mse" if preset == "published" else FITTED_RULE
    return QuantConfig(
        weight_bit=weight_bit,
        act_bit=8 if act_bit is None else act_bit,
        quant_act=act_bit is not None,
        sm_abit=8 if act_bit is None else act_bit,
        a_sym=symmetric,
        weight_scale_method=rule,
        act_scale_method=rule,
        time_bounds=bounds,
        policy=make_policy(policy),
    ).validate()


def _found_blocks(
    model: nn.Module, data: CalibrationData, structure: Structure, plan: QuantPlan
) -> Mapping[str, str | None]:
    """The blocks of a network, by path, with the layer whose bias is added to the output of each."""
    blocks = find_blocks(model, structure, plan.layers)
    layers = [layer for layer in structure.order if layer in plan.layers]
    return find_output_layers(model, _two_samples(model, data), blocks, layers)


def _two_samples(model: nn.Module, data: CalibrationData) -> Callable[[], object]:
    """What runs the network on two samples, in one call."""
    device = next(model.parameters()).device
    return lambda: data.run(model, data.alike(2), device)


def _calibrate(calibration: Calibration, structure: Structure, plan: QuantPlan) -> nn.Module:
    """Run a calibration of a custom network, write its report, and attach what `save` and `describe` need."""
    assert calibration.data is not None  # given by `quantize`
    architecture = calibration.architecture
    blocks = [path for path, module in calibration.model.named_modules() if architecture.is_block(path, module)]
    summary = summarize(structure, plan, blocks)
    summary.log(activations=calibration.quant.quant_act)
    log_own_parameters(calibration.model, architecture)
    rows = calibration.data.hash()
    calibration = calibration.with_policy()
    quantized = calibration.run()
    if distributed.rank() == 0:
        calibration.report(calibration.directory.folder, quantized)
    header = calibration.config.to_dict() | {"rows_sha256": rows}
    source = state_hash(calibration.model.state_dict())
    remember_info(quantized, PackedInfo(CUSTOM, plan.to_dict(), calibration.quant, header, source))
    remember_summary(quantized, summary)
    return quantized


def _plan(model: nn.Module, architecture: Architecture, quant: QuantConfig, splits: Mapping[str, int]) -> QuantPlan:
    """What is quantized; ConfigError if that is nothing, or not a layer that `splits` names."""
    plan = QuantPlan.of(model, architecture, quant)
    if not plan.layers:
        raise ConfigError("the network has no layer inside that can be quantized and is not kept")
    if lost := sorted(set(splits) - set(plan.layers)):
        raise ConfigError(f": {lost[0]} is kept in full precision", field="splits")
    return plan


def _validate_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f": expected an nn.Module, found {type(model).__name__}", field="model")
    if torch.is_inference_mode_enabled():
        raise ConfigError("inside torch.inference_mode(): expected to be called outside, gradients are needed")
    if not any(isinstance(module, tuple(LAYER_TYPES)) for module in model.modules()):
        raise ConfigError("the network has no layer that can be quantized")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in (torch.float32, *HALF):
            found = str(parameter.dtype).removeprefix("torch.")
            message = f": {name} is {found}: expected float32, bfloat16 or float16 (model.float())"
            raise ConfigError(message, field="model")
    if (name_of_bad := first_not_finite(model.state_dict())) is not None:
        raise NonFiniteError(f": {name_of_bad} holds values that are not finite numbers", field="model")


def _validate_recipe(preset: str, recipe: Mapping[str, object], timestep_groups: int) -> None:
    if preset not in PRESETS:
        raise ConfigError(f" {preset!r}: expected one of {', '.join(PRESETS)}", field="preset")
    known = {field.name for field in PRESETS[preset].__dataclass_fields__.values()} - {"num_timesteps", "samples"}
    if unknown := sorted(set(recipe) - known):  # all samples given are taken
        raise ConfigError(f"unknown settings of the recipe: {', '.join(unknown)}")
    if recipe.get("running_stat") and timestep_groups > 1:
        raise ConfigError(" and running_stat: expected one of them", field="timestep_groups")


def _validate_names(
    model: nn.Module,
    blocks: Iterable[type[nn.Module]] | Mapping[type[nn.Module], str | None],
    separate: Iterable[str],
    keep: Iterable[type[nn.Module] | str],
    attention_matmuls: Iterable[type[nn.Module]],
    found_matmuls: Iterable[str],
) -> None:
    if isinstance(keep, str):
        raise ConfigError(f" {keep!r}: expected a list, [{keep!r}]", field="keep")
    modules = dict(model.named_modules())
    types = {type(module) for module in modules.values()}
    paths = [*filter(None, modules), *dict(model.named_parameters()), *found_matmuls]
    for kept in keep:
        by_path = isinstance(kept, str) and any(fnmatchcase(path, kept) for path in paths)
        if not (by_path or kept in types or kept in {kind.__name__ for kind in types}):
            raise ConfigError(f": no {getattr(kept, '__name__', kept)} in the network", field="keep")
    for name, kinds in (("blocks", blocks), ("attention_matmuls", attention_matmuls)):
        for kind in kinds:
            if kind not in types:
                raise ConfigError(f": no {kind.__name__} in the network", field=name)
    if isinstance(blocks, Mapping):
        for path, module in modules.items():
            if (inside := blocks.get(type(module))) is not None and inside not in dict(module.named_modules()):
                raise ConfigError(f": {path} ({type(module).__name__}) has no layer {inside}", field="blocks")
    for name in separate:
        if not any(f".{path}".endswith(f".{name}") for path in modules):
            raise ConfigError(f": no layer whose path ends with {name}", field="separate")


def _validate_splits(model: nn.Module, splits: Mapping[str, int]) -> None:
    modules = dict(model.named_modules())
    for path, channels in splits.items():
        layer = modules.get(path)
        if layer is None or type(layer) not in LAYER_TYPES:
            raise ConfigError(f": no layer {path}", field="splits")
        total = LAYER_TYPES[type(layer)].weight_of(layer).shape[1]
        if not 0 < channels < total:
            message = f": {path} has {total} input channels: expected 1 or more in each half, found {channels}"
            raise ConfigError(message, field="splits")
