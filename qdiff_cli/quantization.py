"""From options to a network: full precision, loaded from a calibrated checkpoint, or calibrated now."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import nn

from qdiff.architecture import Architecture
from qdiff.calibration.data import CalibrationData, CalibrationSet, load_set, save_set
from qdiff.calibration.ranges import timestep_group_bounds
from qdiff.calibration.report import try_report
from qdiff.calibration.run import CalibrationDir, calibrate
from qdiff.checkpoint import (
    PackedInfo,
    check_packed,
    is_packed,
    load_packed,
    load_published,
    read_packed_info,
    save_packed,
    save_published,
    state_hash,
)
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines.select import apply_engine
from qdiff.errors import CheckpointError, ConfigError
from qdiff.model import copy_weights, quantize_model
from qdiff.prediction import Prediction
from qdiff.utils.files import file_hash
from qdiff_cli.options import RULES, calibration_config, check_typed, quant_config
from qdiff_cli.running import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationTask:
    """What a family's script knows and the shared steps need.

    build: the network's configuration for `family.build`. input_shape: (C, H, W) of x_t. evaluations: calls
    of the network for one image. load: the full-precision network on the CPU. generate: draws a calibration set from it (network,
    steps, samples). prediction: what the network predicts.
    weight_method, act_method: the family's published scale rules. save_stages: writes the rest of a
    latent model (autoencoder, text tower) to the file it is given.
    """

    family: Architecture
    build: dict
    input_shape: tuple[int, ...]
    evaluations: int
    load: Callable[[], nn.Module]
    generate: Callable[[nn.Module, CalibrationConfig], CalibrationSet]
    prediction: Prediction
    weight_method: str = "max"
    act_method: str = "max"
    save_model_parts: Callable[[Path], None] | None = None


def check(args: argparse.Namespace, task: QuantizationTask) -> None:
    """Everything about the quantization options that can be checked before work starts."""
    check_typed(args, RULES)
    if args.ptq:
        quant_config(args, task.weight_method, task.act_method)
        config = calibration_config(args, task.evaluations)
        if args.timestep_groups > config.steps:
            raise ConfigError(
                f"--timestep_groups {args.timestep_groups}: the calibration set has {config.steps} time steps (--cali_st)"
            )


def prepare_network(
    args: argparse.Namespace, task: QuantizationTask, device: torch.device, folder: Path, ranks: Ranks
) -> nn.Module:
    """The network that is to sample, in eval mode on `device`, on the engine chosen; a calibration's results go to `folder`.

    Several processes calibrate together: each takes its share of every batch, the first one writes.
    """
    network = _prepare(args, task, device, folder, ranks)
    return apply_engine(network, args.engine)


def _prepare(
    args: argparse.Namespace, task: QuantizationTask, device: torch.device, folder: Path, ranks: Ranks
) -> nn.Module:
    if not args.ptq:
        return task.load().to(device).eval()
    quant = quant_config(args, task.weight_method, task.act_method)
    calibrated = folder / "ckpt.safetensors"
    if args.continue_run and ranks.from_first(calibrated.is_file):
        return load_packed(calibrated)[0].to(device)
    if args.cali_ckpt and not args.resume_w:
        return load_calibrated(args.cali_ckpt, task, quant)[0].to(device)
    return _calibrate(args, task, quant, device, folder, ranks)


def load_calibrated(path: str, task: QuantizationTask, quant: QuantConfig) -> tuple[nn.Module, PackedInfo]:
    """A calibrated checkpoint of either format, compared with the options given; CheckpointError if they differ."""
    if not is_packed(path):
        network = load_published(path, task.build, task.family, quant)
        return network, PackedInfo(task.family.name, task.build, quant, {"published": Path(path).name}, "")
    check_packed(path, read_packed_info(path), task.family.name, task.build, quant)
    return load_packed(path, activations=quant.quant_act)


def _calibrate(
    args: argparse.Namespace,
    task: QuantizationTask,
    quant: QuantConfig,
    device: torch.device,
    folder: Path,
    ranks: Ranks,
) -> nn.Module:
    config = calibration_config(args, task.evaluations)
    finished, info = (
        load_calibrated(args.cali_ckpt, task, replace(quant, quant_act=False)) if args.resume_w else (None, None)
    )
    context_dim = task.build.get("context_dim")
    data = load_set(args.cali_data_path, task.input_shape, context_dim) if args.cali_data_path else None
    model = task.load().to(device).eval()
    if info is not None and info.source_sha256 not in ("", state_hash(model.state_dict())):
        raise CheckpointError(
            f"{args.cali_ckpt}: its weights were made from another full-precision checkpoint than the one given"
        )
    if data is None:
        drawn = folder / "calibration_set.pt"
        if ranks.rank == 0 and not drawn.is_file():
            save_set(drawn, task.generate(model, config))
        ranks.barrier()
        data = load_set(drawn, task.input_shape, context_dim)
    if config.samples > len(data.xs[0]):
        if args.cali_n:
            log.warning(
                "--cali_n %d: the calibration set holds %d samples of each time step, all are used",
                args.cali_n,
                len(data.xs[0]),
            )
        config = replace(config, samples=len(data.xs[0]))
    rows = data.select(config.steps, config.samples)
    if args.timestep_groups > 1:
        quant = replace(quant, time_bounds=timestep_group_bounds(rows, args.timestep_groups)).validate()
    weights_from = None
    if finished is not None:
        weights_from = quantize_model(model, task.family, quant).requires_grad_(False)
        copy_weights(finished.to(device), weights_from)
    cache_bytes = None if args.cali_cache_gb is None else int(args.cali_cache_gb * 1e9)
    workplace = CalibrationDir(folder / "calibration", cache_bytes)
    wrapped = calibrate(model, task.family, quant, config, rows, weights_from, workplace, task.prediction)
    if ranks.rank == 0:
        _write_results(task, quant, config, rows, model, wrapped, folder)
    ranks.barrier()
    return wrapped


def _write_results(
    task: QuantizationTask,
    quant: QuantConfig,
    config: CalibrationConfig,
    rows: CalibrationData,
    model: nn.Module,
    wrapped: nn.Module,
    folder: Path,
) -> None:
    """Both checkpoints, and the report with its pictures."""
    state = model.state_dict()
    model_parts = write_model_parts(task, folder)
    info = PackedInfo(
        task.family.name,
        task.build,
        quant,
        config.to_dict() | {"rows_sha256": rows.hash()},
        state_hash(state),
        model_parts,
    )
    if not quant.time_bounds:
        save_published(folder / "ckpt.pth", wrapped, task.family, state, activations=quant.quant_act)
    try_report(folder / "calibration", model, task.family, wrapped, quant, config, rows)
    save_packed(folder / "ckpt.safetensors", wrapped, info)
    log.info(
        "calibrated checkpoints in %s: ckpt.safetensors (packed)%s",
        folder,
        "" if quant.time_bounds else ", ckpt.pth (published)",
    )


def write_model_parts(task: QuantizationTask, folder: Path) -> dict | None:
    """The rest of a latent model beside its packed checkpoint; what the checkpoint's header says of it."""
    if task.save_model_parts is None:
        return None
    file = folder / "stages.safetensors"
    task.save_model_parts(file)
    return {"file": file.name, "sha256": file_hash(file)}


def is_latent(path: str) -> bool:
    """Whether a YAML file describes a latent model (its sections have targets)."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({str(error).splitlines()[0]})") from None
    return isinstance(content, dict) and isinstance(content.get("model"), dict) and "target" in content["model"]
