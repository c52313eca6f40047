"""The network of a run: in full precision, loaded from a calibrated checkpoint, or calibrated now."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qdiff.calibration.data import CalibrationData, CalibrationSet, load_set, save_set
from qdiff.calibration.directory import CalibrationDir
from qdiff.calibration.ranges import timestep_group_bounds
from qdiff.calibration.run import Calibration
from qdiff.checkpoint import PackedFile, PackedInfo, load_published, save_packed, save_published, state_hash
from qdiff.checkpoint.packed import remember_info, remembered_info
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.errors import CheckpointError
from qdiff.model import copy_weights, quantize_model
from qdiff.scale_rules import PUBLISHED_RULES
from qdiff.task import QuantizationTask
from qdiff.utils import distributed
from qdiff.utils.files import file_hash
from qdiff.utils.memory import retain_freed_memory
from qdiff_cli.quantization_options import QuantizationConfig

log = logging.getLogger(__name__)

PACKED, PUBLISHED, GENERATED_SET = "ckpt.safetensors", "ckpt.pth", "calibration_set.pt"


def load_calibrated(path: Path, task: QuantizationTask, formats: QuantConfig) -> nn.Module:
    """Load a calibrated checkpoint of either file format.

    Args:
        path: the checkpoint.
        task: the model.
        formats: the expected number formats.

    Raises:
        CheckpointError: the file has other number formats, or cannot be used.
    """
    packed = PackedFile.find(path)
    if packed is not None:
        packed.check(task.architecture.name, task.unet_config, formats)
        return packed.network(activations=formats.quant_act)
    network = load_published(path, task.unet_config, task.architecture, formats)
    remember_info(network, PackedInfo(task.architecture.name, task.unet_config, formats, {"published": path.name}, ""))
    return network


def formats_of(network: nn.Module) -> QuantConfig:
    """The number formats of a network that `load_calibrated` returned, with its widths per layer."""
    info = remembered_info(network)
    assert info is not None  # `load_calibrated` attaches it
    return info.config


def beyond_published_format(config: QuantizationConfig) -> list[str]:
    """What the published format cannot hold of a calibration, by name. If there is anything, no such file is written.

    It holds one scale for all time steps and one width for all layers, which its scales show for the published rules.
    Its integers are one of the two neighbors of each full-precision weight, which error-compensating rounding and
    fine-tuning leave.
    """
    formats, recipe = config.formats, config.recipe
    fits_weights = formats.quant_mode != "linear" and not config.weights_only
    compensates = fits_weights and recipe.rounding == "compensated"
    found = {
        "timestep groups": config.timestep_groups > 1,
        "widths per layer": bool(formats.policy) or (fits_weights and recipe.policy_budget > 0),
        "error-compensating rounding": compensates,
        "smoothing": compensates and recipe.smoothing and formats.quant_act,
        "fine-tuned weights": fits_weights and recipe.iters_tune > 0,
        f"the scale rule {formats.weight_scale_method}": formats.weight_scale_method not in PUBLISHED_RULES,
    }
    return [name for name, present in found.items() if present]


class NetworkSource:
    """Provides the network of a run.

    Several processes calibrate together. Each takes its share of every batch, and the first process writes the files.

    Args:
        config: how the network is quantized; None: full precision.
        task: the model.
        device: the device of the network.
        folder: the folder of the run. The results of a calibration go there.
    """

    def __init__(
        self, config: QuantizationConfig | None, task: QuantizationTask, device: torch.device, folder: Path
    ) -> None:
        self.config, self.task, self.device, self.folder = config, task, device, folder

    def network(self, continue_run: bool) -> nn.Module:
        """The simulated network on the device, in eval mode.

        Args:
            continue_run: load the result of a calibration if the folder holds one.
        """
        if self.config is None:
            return self.task.load_unet().to(self.device).eval()
        calibrated = self.folder / PACKED
        if continue_run and distributed.run_on_first(calibrated.is_file):
            return PackedFile.open(calibrated).network().to(self.device)
        if self.config.checkpoint is not None and not self.config.weights_only:
            return load_calibrated(self.config.checkpoint, self.task, self.config.formats).to(self.device)
        return self._calibrated()

    @property
    def _settings(self) -> QuantizationConfig:
        assert self.config is not None  # `network` returns before for full precision
        return self.config

    def _calibrated(self) -> nn.Module:
        """Calibrate the network, and write the results."""
        config, task = self._settings, self.task
        lost = beyond_published_format(config)
        if lost and distributed.rank() == 0:
            log.warning("no %s will be written: the published format cannot hold %s", PUBLISHED, " and ".join(lost))
        reused_weights = self._load_reused_weights()
        data = None if config.data_file is None else load_set(config.data_file, task.input_shape, task.context_dim)
        retain_freed_memory()
        model = task.load_unet().to(self.device).eval()
        self._validate_source(reused_weights, model)
        data = self._generated_set(model) if data is None else data
        recipe, formats = self._limited_recipe(data), config.formats
        samples = data.select(recipe.num_timesteps, recipe.samples)
        if config.timestep_groups > 1:
            bounds = timestep_group_bounds(samples, config.timestep_groups)
            formats = replace(formats, time_bounds=bounds).validate()
        weights_from = None
        if reused_weights is not None:
            weights_from = quantize_model(model, task.architecture, formats).requires_grad_(False)
            copy_weights(reused_weights.to(self.device), weights_from)
        directory = CalibrationDir(self.folder / "calibration", config.cache_bytes)
        calibration = Calibration(
            model, task.architecture, formats, recipe, samples, weights_from, directory, task.prediction
        ).with_policy()
        quantized = calibration.run()
        if distributed.rank() == 0:
            self._write_results(calibration, quantized, samples)
        distributed.barrier()
        return quantized

    def _load_reused_weights(self) -> nn.Module | None:
        """Load the network whose quantized weights are reused, without activation scales; None: there is none."""
        config = self._settings
        if not config.weights_only or config.checkpoint is None:
            return None
        return load_calibrated(config.checkpoint, self.task, replace(config.formats, quant_act=False))

    def _validate_source(self, quantized: nn.Module | None, model: nn.Module) -> None:
        """Raise CheckpointError if the reused weights come from other full-precision weights than those of `model`."""
        info = None if quantized is None else remembered_info(quantized)
        if info is not None and info.source_sha256 not in ("", state_hash(model.state_dict())):
            raise CheckpointError(
                f"{self._settings.checkpoint}: its weights were made from another full-precision checkpoint "
                "than the one given"
            )

    def _generated_set(self, model: nn.Module) -> CalibrationSet:
        """The calibration set in the folder of the run. It is generated with `model` if the folder has none."""
        file, task = self.folder / GENERATED_SET, self.task
        if distributed.rank() == 0 and not file.is_file():
            save_set(file, task.make_calibration_set(model, self._settings.recipe))
        distributed.barrier()
        return load_set(file, task.input_shape, task.context_dim)

    def _limited_recipe(self, data: CalibrationSet) -> CalibrationConfig:
        """The recipe with at most as many samples as the calibration set holds."""
        config, available = self._settings, len(data.xs[0])
        if config.recipe.samples <= available:
            return config.recipe
        if config.samples_given:
            message = "--cali_n %d: the calibration set holds %d samples of each time step, all are used"
            log.warning(message, config.recipe.samples, available)
        return replace(config.recipe, samples=available)

    def _write_results(self, calibration: Calibration, quantized: nn.Module, samples: CalibrationData) -> None:
        """Write the checkpoints in both file formats, and the report with its pictures."""
        task, folder = self.task, self.folder
        state, formats = calibration.model.state_dict(), calibration.quant
        header = calibration.config.to_dict() | {"rows_sha256": samples.hash()}
        parts = write_model_parts(task, folder)
        info = PackedInfo(task.architecture.name, task.unet_config, formats, header, state_hash(state), parts)
        publishable = not beyond_published_format(self._settings)
        publishable = publishable and self._write_published(quantized, state)
        calibration.report(folder / "calibration", quantized)
        save_packed(folder / PACKED, quantized, info)
        published = f", {PUBLISHED} (published)" if publishable else ""
        log.info("calibrated checkpoints in %s: %s (packed)%s", folder, PACKED, published)

    def _write_published(self, quantized: nn.Module, state: dict[str, Tensor]) -> bool:
        """Write the published format; False if it cannot hold reused weights, which may come from any preset."""
        activations = self._settings.formats.quant_act
        try:
            save_published(self.folder / PUBLISHED, quantized, self.task.architecture, state, activations)
        except CheckpointError as error:
            log.warning("no %s is written: %s", PUBLISHED, error)
            return False
        return True


def write_model_parts(task: QuantizationTask, folder: Path) -> dict[str, str] | None:
    """Write the first stage and the conditioner of a latent model into a folder, beside its packed checkpoint.

    Returns:
        The name and the hash of the file, for the header of the checkpoint; None: the model has no such parts.
    """
    if task.save_model_parts is None:
        return None
    file = folder / "stages.safetensors"
    task.save_model_parts(file)
    return {"file": file.name, "sha256": file_hash(file)}
