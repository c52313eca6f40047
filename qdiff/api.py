"""Quantizing any network from Python: `qdiff.quantize`."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from qdiff.architecture import Architecture, AttentionMatMulSpec
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.ranges import timestep_group_bounds
from qdiff.calibration.report import try_report
from qdiff.calibration.run import CalibrationDir, calibrate
from qdiff.config import PRESETS, QuantConfig
from qdiff.errors import ConfigError, NonFiniteError
from qdiff.layers import LAYER_TYPES
from qdiff.model import quant_layers, quantize_model, validate_layers
from qdiff.unquantized import find_unquantized, log_unquantized
from qdiff.utils import distributed
from qdiff.utils.finite import first_not_finite


def quantize(
    model: nn.Module,
    inputs: Sequence[Tensor],
    *,
    weight_bit: int = 8,
    act_bit: int | None = 8,
    symmetric: bool = False,
    blocks: Sequence[type[nn.Module]] | Mapping[type[nn.Module], str | None] = (),
    separate: Sequence[str] = (),
    keep: Sequence[type[nn.Module] | str] = (),
    products: Mapping[type[nn.Module], dict[str, AttentionMatMulSpec]] | None = None,
    splits: Mapping[str, int] | None = None,
    timestep_groups: int = 1,
    preset: str = "fast",
    folder: str | Path | None = None,
    **recipe: object,
) -> nn.Module:
    """A quantized and calibrated copy of a denoiser that knows nothing of this package.

    Every `nn.Conv1d`, `nn.Conv2d` and `nn.Linear` is replaced; normalizations and embeddings stay as
    they are; products made by functions (`F.scaled_dot_product_attention`) are not quantized unless they
    are modules named in `products`. The log lists products, concatenated shortcuts and layers that stay in full precision.

    Args:
        model: any network in float32 that returns one tensor; not changed. Its device is where the work is done.
        inputs: its positional inputs, all with the rows first: x_t [N, ...], t [N], contexts. They should be
            inputs that it meets while sampling, from all time steps; 500 rows and more.
        weight_bit, act_bit: 2 to 16; `act_bit` None leaves activations as they are.
        symmetric: signed activations without zero point.
        blocks: module types that are reconstructed as a whole (residual blocks, attention blocks). Each must return
            one tensor with the rows first and run once in a forward pass. Layers outside them are reconstructed alone.
            As a dict, with the path of the layer inside whose bias is added to the block's output: its mean error is then corrected.
        separate: how the paths of those layers inside blocks end that are reconstructed apart (projections of the time embedding).
        keep: what stays in full precision. The path of a module, or a pattern (`head.*`), keeps all inside it; that of a parameter
            keeps the parameter. A type keeps the modules' own parameters (position embeddings), or all inside where there are none.
        products: module types with attention products as attributes (`qdiff.layers.MatMul`), see `qdiff.model.AttentionMatMulSpec`.
        splits: for layers whose input is a concatenation, by path: the channels of its first half (Q-Diffusion, section 4.3).
        timestep_groups: sets of time steps with activation step sizes of their own.
        preset: the recipe: `fast` or `published`; `recipe` overrides its settings (`qdiff.config.CalibrationConfig`).
        folder: keeps every finished unit there; the same call continues after an interruption. At the end it has a report too:
            `layers.csv`, `layers.png`, `units.png`.

    Raises:
        ConfigError: settings that cannot work, by name; names of what is not in the network.
        NonFiniteError: a weight, or a value inside the network, that is not a finite number, by name.
        TypeError: a module with parameters that has no quantized form and is not kept, by path and type; a layer with hooks; a block
            without a product that `products` names.
        NotImplementedError: a convolution whose padding is not zeros, by path.
        RuntimeError: a block or layer that cannot be a unit, by path.
    """
    _check(model, inputs, blocks, separate, keep, products or {}, splits or {}, timestep_groups, preset, recipe)
    rows = CalibrationData(tuple(inputs))
    family = Architecture(
        "custom",
        build=lambda _: model,
        blocks=dict(blocks) if isinstance(blocks, Mapping) else dict.fromkeys(blocks),
        separate=tuple(separate),
        keep=tuple(keep),
        products=dict(products or {}),
        split_points=lambda _: dict(splits or {}),
    )
    quant = QuantConfig(
        weight_bit=weight_bit,
        act_bit=8 if act_bit is None else act_bit,
        quant_act=act_bit is not None,
        sm_abit=8 if act_bit is None else act_bit,
        a_sym=symmetric,
        split=bool(splits),
        weight_scale_method="mse",
        act_scale_method="mse",
        time_bounds=timestep_group_bounds(rows, timestep_groups) if timestep_groups > 1 else (),
    )
    config = replace(PRESETS[preset], **recipe)
    validate_layers(model, family)
    model = copy.deepcopy(model)
    _tell(model, family, quant, rows)
    quantized = calibrate(
        model, family, quant, config, rows, workplace=CalibrationDir(None if folder is None else Path(folder))
    )
    if folder is not None and distributed.rank() == 0:
        try_report(Path(folder), model, family, quantized, quant, config, rows)
    return quantized


def _tell(model: nn.Module, family: Architecture, quant: QuantConfig, rows: CalibrationData) -> None:
    """Say in the log what stays in full precision; ConfigError where nothing would be quantized."""
    wrapped = quantize_model(model, family, quant)
    if not quant_layers(wrapped):
        raise ConfigError("the network has no layer inside that can be quantized and is not kept")
    split = {path for path, layer in quant_layers(wrapped).items() if layer.split}
    if lost := sorted(set(family.split_points(model)) - split):
        raise ConfigError(f"splits: {lost[0]} is kept in full precision")
    device = next(model.parameters()).device
    log_unquantized(find_unquantized(wrapped, [part.to(device) for part in rows[:2]]), quant.quant_act)


def _check(
    model: nn.Module,
    inputs: Sequence[Tensor],
    blocks: Iterable[type[nn.Module]] | Mapping[type[nn.Module], str | None],
    separate: Sequence[str],
    keep: Iterable[type[nn.Module] | str],
    products: Iterable[type[nn.Module]],
    splits: Mapping[str, int],
    timestep_groups: int,
    preset: str,
    recipe: Mapping[str, object],
) -> None:
    """ConfigError for arguments of `quantize` that cannot be meant, by name."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected an nn.Module, found {type(model).__name__}")
    if isinstance(inputs, Tensor) or not all(isinstance(tensor, Tensor) for tensor in inputs):
        raise ConfigError("inputs: expected a tuple of tensors, (x_t, t) and contexts")
    if any(torch.isnan(tensor).any() for tensor in inputs) or any(torch.isinf(tensor).any() for tensor in inputs[:2]):
        raise ConfigError("inputs: values that are not finite numbers")  # masks among the contexts may hold -inf
    if torch.is_inference_mode_enabled():
        raise ConfigError("inside torch.inference_mode(): expected to be called outside, gradients are needed")
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    if unknown := set(recipe) - set(PRESETS[preset].to_dict()) | {"steps", "samples"} & set(
        recipe
    ):  # all rows given are taken
        raise ConfigError(f"unknown settings of the recipe: {', '.join(sorted(unknown))}")
    lengths = {len(tensor) for tensor in inputs}
    if len(lengths) != 1:
        raise ConfigError(f"inputs of {sorted(lengths)} rows: expected the same number in each")
    if timestep_groups > 1 and len(inputs) < 2:
        raise ConfigError(f"timestep_groups {timestep_groups}: expected the time steps as the second input")
    modules = dict(model.named_modules())
    for path, channels in splits.items():
        if type(modules.get(path)) not in LAYER_TYPES:
            raise ConfigError(f"splits: no layer {path}")
        if not 0 < channels < modules[path].weight.shape[1]:
            raise ConfigError(
                f"splits: {path} has {modules[path].weight.shape[1]} input channels: expected 1 or more in each half, found {channels}"
            )
    types = {type(module) for module in modules.values()}
    for name, wanted in (("blocks", blocks), ("keep", keep), ("products", products)):
        for kind in wanted:
            if isinstance(kind, str) and name == "keep":
                there = any(
                    fnmatchcase(path, kind) for path in [*filter(None, modules), *dict(model.named_parameters())]
                )
            else:
                there = kind in types
            if not there:
                raise ConfigError(f"{name}: no {getattr(kind, '__name__', kind)} in the network")
    if isinstance(blocks, Mapping):
        for path, module in modules.items():
            if (inside := blocks.get(type(module))) is not None and inside not in dict(module.named_modules()):
                raise ConfigError(f"blocks: {path} ({type(module).__name__}) has no layer {inside}")
    if not any(issubclass(kind, tuple(LAYER_TYPES)) for kind in types):
        raise ConfigError("the network has no layer that can be quantized")
    for name in separate:
        if not any(f".{path}".endswith(f".{name}") for path in modules):
            raise ConfigError(f"separate: no layer whose path ends with {name}")
    if other := [
        (name, p.dtype) for name, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32
    ]:
        raise ConfigError(
            f"{other[0][0]} is {str(other[0][1]).removeprefix('torch.')}: expected float32 (model.float())"
        )
    if (name := first_not_finite(model.state_dict())) is not None:
        raise NonFiniteError(f"model: {name} holds values that are not finite numbers")
    if recipe.get("running_stat") and timestep_groups > 1:
        raise ConfigError("timestep_groups and running_stat: expected one of them")
