"""The network that samples: in full precision, loaded from a calibrated checkpoint, or calibrated now."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from qdiff.calibration.data import CalibrationData, CalibrationSet, load_set, save_set
from qdiff.calibration.directory import CalibrationDir
from qdiff.calibration.ranges import timestep_group_bounds
from qdiff.calibration.run import Calibration
from qdiff.checkpoint import PackedFile, PackedInfo, load_published, save_packed, save_published, state_hash
from qdiff.checkpoint.packed import remember_info, remembered_info
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines.select import apply_engine
from qdiff.errors import CheckpointError
from qdiff.model import copy_weights, quantize_model
from qdiff.task import QuantizationTask
from qdiff.utils import distributed
from qdiff.utils.files import file_hash
from qdiff_cli.quantization_options import QuantizationConfig

log = logging.getLogger(__name__)

PACKED, PUBLISHED, DRAWN_SET = "ckpt.safetensors", "ckpt.pth", "calibration_set.pt"


def prepare_network(
    config: QuantizationConfig | None,
    task: QuantizationTask,
    device: torch.device,
    folder: Path,
    engine: str,
    continue_run: bool,
) -> nn.Module:
    """The network that samples, in eval mode on `device` and on the engine asked for.

    Several processes calibrate together: each takes its share of every batch, and the first one writes.

    Args:
        config: how it is quantized; None: full precision.
        task: the model.
        device: where it works.
        folder: the run's folder; a calibration's results go there.
        engine: auto | integer | simulated.
        continue_run: a calibration that the folder holds is loaded.
    """
    return apply_engine(_network(config, task, device, folder, continue_run), engine)


def _network(
    config: QuantizationConfig | None, task: QuantizationTask, device: torch.device, folder: Path, continue_run: bool
) -> nn.Module:
    if config is None:
        return task.load_unet().to(device).eval()
    calibrated = folder / PACKED
    if continue_run and distributed.run_on_first(calibrated.is_file):
        return PackedFile.open(calibrated).network().to(device)
    if config.checkpoint is not None and not config.weights_only:
        return load_calibrated(config.checkpoint, task, config.formats).to(device)
    return _calibrate(config, task, device, folder)


def load_calibrated(path: Path, task: QuantizationTask, formats: QuantConfig) -> nn.Module:
    """A calibrated checkpoint of either format, compared with the number formats given.

    Raises:
        CheckpointError: they differ, or the file cannot be used.
    """
    packed = PackedFile.find(path)
    if packed is not None:
        packed.check(task.architecture.name, task.unet_config, formats)
        return packed.network(activations=formats.quant_act)
    network = load_published(path, task.unet_config, task.architecture, formats)
    remember_info(network, PackedInfo(task.architecture.name, task.unet_config, formats, {"published": path.name}, ""))
    return network


def _calibrate(config: QuantizationConfig, task: QuantizationTask, device: torch.device, folder: Path) -> nn.Module:
    finished = None
    if config.weights_only and config.checkpoint is not None:
        finished = load_calibrated(config.checkpoint, task, replace(config.formats, quant_act=False))
    data = None if config.data_file is None else load_set(config.data_file, task.input_shape, task.context_dim)
    model = task.load_unet().to(device).eval()
    _validate_source(finished, model, config)
    if data is None:
        data = _drawn_set(model, config.recipe, task, folder)
    recipe, formats = _fitting_recipe(config, data), config.formats
    samples = data.select(recipe.num_timesteps, recipe.samples)
    if config.timestep_groups > 1:
        formats = replace(formats, time_bounds=timestep_group_bounds(samples, config.timestep_groups)).validate()
    weights_from = None
    if finished is not None:
        weights_from = quantize_model(model, task.architecture, formats).requires_grad_(False)
        copy_weights(finished.to(device), weights_from)
    directory = CalibrationDir(folder / "calibration", config.cache_bytes)
    calibration = Calibration(
        model, task.architecture, formats, recipe, samples, weights_from, directory, task.prediction
    )
    quantized = calibration.run()
    if distributed.rank() == 0:
        _write_results(calibration, quantized, samples, task, folder)
    distributed.barrier()
    return quantized


def _validate_source(finished: nn.Module | None, model: nn.Module, config: QuantizationConfig) -> None:
    """Raise CheckpointError if quantized weights were made from other full-precision weights."""
    info = None if finished is None else remembered_info(finished)
    if info is not None and info.source_sha256 not in ("", state_hash(model.state_dict())):
        raise CheckpointError(
            f"{config.checkpoint}: its weights were made from another full-precision checkpoint than the one given"
        )


def _drawn_set(model: nn.Module, recipe: CalibrationConfig, task: QuantizationTask, folder: Path) -> CalibrationSet:
    """The calibration set from the model's own trajectory, kept in the run's folder."""
    file = folder / DRAWN_SET
    if distributed.rank() == 0 and not file.is_file():
        save_set(file, task.make_calibration_set(model, recipe))
    distributed.barrier()
    return load_set(file, task.input_shape, task.context_dim)


def _fitting_recipe(config: QuantizationConfig, data: CalibrationSet) -> CalibrationConfig:
    """The recipe with no more samples than the set holds."""
    held = len(data.xs[0])
    if config.recipe.samples <= held:
        return config.recipe
    if config.samples_given:
        message = "--cali_n %d: the calibration set holds %d samples of each time step, all are used"
        log.warning(message, config.recipe.samples, held)
    return replace(config.recipe, samples=held)


def _write_results(
    calibration: Calibration, quantized: nn.Module, samples: CalibrationData, task: QuantizationTask, folder: Path
) -> None:
    """Write both checkpoints and the report with its pictures."""
    state, formats = calibration.model.state_dict(), calibration.quant
    header = calibration.config.to_dict() | {"rows_sha256": samples.hash()}
    parts = write_model_parts(task, folder)
    info = PackedInfo(task.architecture.name, task.unet_config, formats, header, state_hash(state), parts)
    if not formats.time_bounds:
        save_published(folder / PUBLISHED, quantized, task.architecture, state, activations=formats.quant_act)
    calibration.report(folder / "calibration", quantized)
    save_packed(folder / PACKED, quantized, info)
    published = "" if formats.time_bounds else f", {PUBLISHED} (published)"
    log.info("calibrated checkpoints in %s: %s (packed)%s", folder, PACKED, published)


def write_model_parts(task: QuantizationTask, folder: Path) -> dict[str, str] | None:
    """Write the rest of a latent model beside its packed checkpoint.

    Returns:
        What the checkpoint's header says of the file; None for models of one part.
    """
    if task.save_model_parts is None:
        return None
    file = folder / "stages.safetensors"
    task.save_model_parts(file)
    return {"file": file.name, "sha256": file_hash(file)}
