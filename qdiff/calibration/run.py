"""The calibration of a whole network: ranges, then reconstruction unit by unit, then end-to-end fine-tuning."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm

from qdiff.architecture import Architecture
from qdiff.calibration.blockwise import BlockwiseRunner, UnitCall, UnitOutput
from qdiff.calibration.cache import Cache, CachedTensor, remove_leftovers
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.directory import CalibrationCheckpoint, CalibrationDir
from qdiff.calibration.finetune import FineTuner, affine_names
from qdiff.calibration.ranges import init_activation_ranges
from qdiff.calibration.reconstruct import (
    OnIteration,
    UnitData,
    UnitResult,
    correct_bias,
    reconstruct_activations,
    reconstruct_weights,
)
from qdiff.calibration.report import report_quality
from qdiff.calibration.rounding import UnitPair, compensate_unit
from qdiff.calibration.sensitivity import choose_policy, measure_sensitivity
from qdiff.calibration.steps import Steps
from qdiff.calibration.trace import ExecutionOrder, trace_execution
from qdiff.checkpoint import state_hash
from qdiff.checkpoint.reading import first_line
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.errors import ConfigError
from qdiff.layers import QuantLayer, QuantMatMul, to_float32
from qdiff.model import (
    find_timestep_groups,
    init_weights,
    quant_layers,
    quantize_model,
    set_mode_parameters,
    unit_modules,
    units,
)
from qdiff.policy import Policy, make_policy
from qdiff.prediction import Prediction
from qdiff.utils import distributed
from qdiff.utils.devices import float32_products
from qdiff.utils.files import write_text

log = logging.getLogger(__name__)

# Raise it with every change that gives a calibration other numbers: a folder of another version is not continued.
RECIPE_VERSION = 6
POLICY_FILE = "policy.json"


@dataclass(frozen=True)
class Calibration:
    """A network to calibrate, and everything that its result depends on.

    Attributes:
        model: the full-precision network. Its weights are not changed; `run` puts it into eval mode, without gradients.
        architecture: what quantization must know of it.
        quant: the number formats.
        config: the recipe.
        data: the samples; None if nothing is learned from data (`linear` weights without activations).
        weights_from: a quantized network whose weights are taken as they are; None: weights are quantized here.
        directory: where finished steps are kept. The same calibration then continues after an interruption, with the
            same result bit for bit.
        prediction: what the network predicts: fine-tuning compares eps. None: it compares the network's output.
    """

    model: nn.Module
    architecture: Architecture
    quant: QuantConfig
    config: CalibrationConfig
    data: CalibrationData | None
    weights_from: nn.Module | None = None
    directory: CalibrationDir = field(default_factory=CalibrationDir)
    prediction: Prediction | None = None

    def run(self) -> nn.Module:
        """Quantize and calibrate.

        Returns:
            The quantized network, in eval mode.

        Raises:
            ConfigError: settings that cannot work, or that differ from those of the calibration in the folder; no
                room for activations; too few samples.
            NonFiniteError: a value that is not finite, by the path of the unit or quantizer.
            TypeError: a layer that has no quantized form, by path.
            RuntimeError: a unit that cannot be one, by path.
        """
        self.quant.validate()
        self.config.validate()
        self.model.eval().requires_grad_(False)
        quantized = self.weights_from
        if quantized is None:
            quantized = quantize_model(self.model, self.architecture, self.quant).requires_grad_(False)
        with float32_products(self.device, tf32=True):
            if self.quant.quant_mode == "linear":
                self._round_to_nearest(quantized)
            else:
                self._reconstruct(quantized)
        return quantized.eval()

    def with_policy(self) -> "Calibration":
        """The same calibration with the policy that the network's sensitivity gives within the recipe's budget.

        A calibration that continues in a folder takes the policy that it began with.

        Raises:
            NonFiniteError: a layer whose sensitivity is not finite.
        """
        if not self.config.policy_budget or self.quant.quant_mode == "linear" or self.weights_from is not None:
            return self
        self.model.eval().requires_grad_(False)
        found = distributed.run_on_first(self._find_policy)
        return replace(self, quant=replace(self.quant, policy=make_policy([*found, *self.quant.policy])).validate())

    def _find_policy(self) -> Policy:
        folder = self.directory.folder
        file = None if folder is None else folder / POLICY_FILE
        if file is not None and file.is_file():
            return make_policy(json.loads(file.read_text(encoding="utf-8")))
        data = self._samples()
        smoothing = self.config.smoothing and self.config.rounding == "compensated"
        found = measure_sensitivity(self.model, self.architecture, self.quant, data, self.device, smoothing)
        policy = choose_policy(found, self.quant, self.config.policy_budget)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(policy, indent=1))
        return policy

    def nearest(self) -> nn.Module:
        """The baseline: the same widths and scale rules by nearest rounding, with nothing fitted."""
        quant = replace(self.quant, quant_mode="linear")
        return replace(self, quant=quant, weights_from=None, directory=CalibrationDir()).run()

    def report(self, folder: Path | None, quantized: nn.Module) -> None:
        """Log how good the finished calibration is, and write tables and pictures of it into `folder`, if any.

        A failure, whatever it is, goes to the log, because it must not cost the calibration.
        """
        try:
            data = self._samples().split(self.config.validation_fraction, self.config.seed)
            nearest = self.nearest if self._is_learned() else None
            report_quality(folder, self.model, quantized, nearest, data)
        except Exception as error:
            where = "" if folder is None else f"{folder}: "
            log.warning("%sthe report could not be made (%s: %s)", where, type(error).__name__, first_line(error))
            log.debug("", exc_info=True)

    def _is_learned(self) -> bool:
        """Whether anything is fitted beyond nearest rounding and first ranges."""
        config = self.config
        fitted = config.rounding != "nearest" or config.iters_a > 0 or config.iters_tune > 0
        return self.quant.quant_mode != "linear" and fitted

    @property
    def device(self) -> torch.device:
        """The device of the network, on which all work is done."""
        return next(self.model.parameters()).device

    def _samples(self) -> CalibrationData:
        if self.data is None:
            raise ConfigError(": None, expected calibration samples", field="data")
        return self.data

    def _round_to_nearest(self, quantized: nn.Module) -> None:
        if self.weights_from is None:
            init_weights(quantized, self.quant.weight_scale_method)
        if self.quant.quant_act:
            method = self.quant.act_scale_method
            init_activation_ranges(quantized, self._samples(), method, self.config, self.device)

    def _reconstruct(self, quantized: nn.Module) -> None:
        samples = self._samples()
        if len(samples) < 2:
            raise ConfigError(f"a calibration set of {len(samples)} samples: expected 2 or more, for both splits")
        data = samples.split(self.config.validation_fraction, self.config.seed)
        order = trace_execution(quantized, units(quantized, self.architecture), data, self.device)
        with _resume_log(self.directory.folder, self._settings(quantized, order, data)) as checkpoint:
            run = _Run(self, quantized, data, order, checkpoint)
            with logging_redirect_tqdm(), torch.enable_grad(), closing(run.steps.progress):
                run.all_steps()
            run.steps.log_cost()

    def _settings(self, quantized: nn.Module, order: ExecutionOrder, data: CalibrationData) -> dict[str, Any]:
        """Everything that the result depends on, by the names of the manifest."""
        weights = None if self.weights_from is None else state_hash(self.weights_from.state_dict())
        return {
            "recipe_version": RECIPE_VERSION,
            "family": self.architecture.name,
            "units": order.units,
            "splits": {path: layer.split for path, layer in quant_layers(quantized).items() if layer.split},
            "products": [path for path, module in quantized.named_modules() if isinstance(module, QuantMatMul)],
            **{f"quantization.{name}": value for name, value in self.quant.to_dict().items()},
            **{f"recipe.{name}": value for name, value in self.config.to_dict().items()},
            "weights_sha256": state_hash(self.model.state_dict()),
            "quantized_weights_sha256": weights,
            "rows_sha256": data.hash(),
            "prediction": None if self.prediction is None else self.prediction.kind,
            "torch": torch.__version__,
        }


@contextmanager
def _resume_log(folder: Path | None, settings: dict[str, Any]) -> Iterator[CalibrationCheckpoint]:
    """The resume log, opened on every process before the first one writes."""
    if folder is not None and distributed.rank() == 0:
        remove_leftovers(folder)
    distributed.barrier()
    checkpoint = CalibrationCheckpoint.open(folder, settings, writes=distributed.rank() == 0)
    distributed.barrier()
    yield checkpoint


class _Run:
    """The steps of one reconstruction: weights of all units, ranges, activations of all units, fine-tuning."""

    def __init__(
        self,
        calibration: Calibration,
        quantized: nn.Module,
        data: CalibrationData,
        order: ExecutionOrder,
        checkpoint: CalibrationCheckpoint,
    ) -> None:
        self.calibration, self.config, self.quant = calibration, calibration.config, calibration.quant
        self.quantized, self.data, self.order = quantized, data, order
        self.device, self.groups = calibration.device, find_timestep_groups(quantized)
        few = self.config.unit_samples if self.config.rounding == "compensated" else 0
        self.unit_data = data.fewer(few) if few else data
        self.cache = self._make_cache()
        of_unit = self.config.iters if self.config.rounding == "adaround" else 1
        of_unit += self.config.iters_a if self.quant.quant_act else 0
        total = len(order.units) * of_unit + self.config.iters_tune + self.config.iters_tune_a * self.quant.quant_act
        self.steps = Steps(checkpoint, total, self.device)

    def _make_cache(self) -> Cache:
        directory = self.calibration.directory
        cache = Cache(directory.cache_bytes, directory.folder)
        written = 0
        if directory.folder is not None:
            # a file for each unit, the whole network after the ranges and after fine-tuning, and both checkpoints
            parameters = sum(p.numel() for p in self.calibration.model.parameters())
            written = 5 * sum(tensor.nbytes for tensor in self.quantized.state_dict().values()) + 8 * parameters
        count = len(self.data if self.config.iters_a and self.quant.quant_act else self.unit_data)
        cache.check_space(self.order.peak_elements * count * torch.float32.itemsize, written)
        return cache

    def all_steps(self) -> None:
        """Do every step, or take it from the resume log."""
        if self.calibration.weights_from is None:
            self._weights()
            if self.config.iters_tune:
                self._whole("tune weights", self.config.iters_tune, partial(self._finetune, weights=True))
        if not self.quant.quant_act:
            return
        self._whole("ranges", 0, self._init_ranges)
        if self.config.iters_a:
            self._over_units("activations", self.config.iters_a, self._reconstruct_activations)
        if self.config.iters_tune_a:
            weights_only = self._affine_parameters()
            self._whole("tune activations", self.config.iters_tune_a, partial(self._finetune, weights=False))
            set_mode_parameters(self.quantized, weights_only)

    def _weights(self) -> None:
        """Round the weights of all units."""
        if self.config.rounding == "nearest":
            self._whole("weights", 0, lambda _: init_weights(self.quantized, self.quant.weight_scale_method))
            return
        self._round_left_out()
        if self.config.rounding == "compensated":
            self._compensate()
        else:
            self._over_units("weights", self.config.iters, self._reconstruct_weights)

    def _affine_parameters(self) -> dict[str, Tensor]:
        """Copies of the biases and norm affines, by name."""
        names = [f"{path}.{name}".lstrip(".") for path, name in affine_names(self.quantized)]
        return {name: self.quantized.get_parameter(name).detach().clone() for name in names}

    def _whole(self, name: str, iterations: int, work: Callable[[OnIteration], UnitResult | None]) -> None:
        """A step over the whole network."""
        self.steps.do(name, iterations, self.quantized, work)

    def _over_units(
        self,
        phase: str,
        iterations: int,
        work: Callable[[str, UnitData, int, OnIteration], UnitResult | None],
    ) -> None:
        """One phase over all units, in order; inputs come from the quantized prefix, targets from full precision."""
        paths = self.order.units
        if self.steps.has(len(paths)):
            for path in paths:
                self.steps.do(f"{phase} {path}", iterations, self.quantized.get_submodule(path), None)
            return
        full, quantized = self._runners(self.data, self.calibration.model)
        for index, path in enumerate(paths):
            target = full.finish(path)
            call, arguments = quantized.arguments(path)
            unit, data = self.quantized.get_submodule(path), self._unit_data(call, arguments, target)
            seed = self.config.seed * 100_003 + index
            self.steps.do(f"{phase} {index + 1}/{len(paths)} {path}", iterations, unit, partial(work, path, data, seed))
            quantized.finish(path, call, arguments)
            for stored in arguments:
                stored.release()
        full.release()
        quantized.release()

    def _runners(self, data: CalibrationData, full: nn.Module) -> tuple[BlockwiseRunner, BlockwiseRunner]:
        """What runs both networks unit by unit over all samples of `data`."""
        size, before = self.config.batch_size, partial(self._before_samples, data)
        first, second = (
            BlockwiseRunner(network, self.order, data, size, self.device, self.cache, before)
            for network in (full, self.quantized)
        )
        return first, second

    def _compensate(self) -> None:
        """Round the weights of all units in closed form, in order, on `unit_data`."""
        calibration, data, paths = self.calibration, self.unit_data, self.order.units
        if self.steps.has(len(paths)):
            for path in paths:
                self.steps.do(f"weights {path}", 1, self.quantized.get_submodule(path), None)
            return
        wrapped = quantize_model(calibration.model, calibration.architecture, self.quant).requires_grad_(False)
        full, quantized = self._runners(data, wrapped)
        for index, path in enumerate(paths):
            calls = full.arguments(path), quantized.arguments(path)
            modules = wrapped.get_submodule(path), self.quantized.get_submodule(path)
            pair = UnitPair.of(modules, calls, data, self.config.batch_size, partial(self._before_samples, data))
            layers = [
                (name, module)
                for name, module in unit_modules(pair.quantized, calibration.architecture)
                if isinstance(module, QuantLayer)
            ]
            seed = self.config.seed * 100_003 + index
            work = partial(self._compensate_unit, pair, layers, seed)
            self.steps.do(f"weights {index + 1}/{len(paths)} {path}", 1, pair.quantized, work)
            for runner, (call, arguments) in zip((full, quantized), calls, strict=True):
                runner.finish(path, call, arguments)
                for stored in arguments:
                    stored.release()
        full.release()
        quantized.release()

    def _compensate_unit(
        self, pair: UnitPair, layers: Sequence[tuple[str, QuantLayer]], seed: int, on_iteration: OnIteration
    ) -> UnitResult | None:
        if not layers:
            return None
        result = compensate_unit(pair, layers, self.config.smoothing and self.quant.quant_act, seed)
        on_iteration(result.after)
        return result

    def _round_left_out(self) -> None:
        """Round the layers to nearest that cannot be fitted as units."""
        for path, reason in self.order.left_out.items():
            log.info("%s: %s: it is rounded to nearest", path, reason)
            layer = self.quantized.get_submodule(path)
            assert isinstance(layer, QuantLayer)  # the trace leaves out no others
            rounded = partial(layer.init_weight_scales, self.quant.weight_scale_method)
            self.steps.do(f"weights {path}", 0, layer, lambda _, rounded=rounded: rounded())  # type: ignore[misc]  # a default binds it

    def _before_samples(self, data: CalibrationData, index: Tensor | slice) -> None:
        """Tell the quantized network's timestep groups which samples come next."""
        if self.groups is not None:
            self.groups.set(data.timesteps(index))

    def _unit_data(self, call: UnitCall, arguments: Sequence[CachedTensor], target: UnitOutput) -> UnitData:
        def read(index: Tensor | slice) -> tuple[tuple[Tensor, ...], Tensor]:
            self._before_samples(self.data, index)
            # losses are in float32 also in a network in half precision, which is computed as it is
            return tuple(x.read(index, self.device) for x in arguments), to_float32(target.read(index, self.device))

        return UnitData(read, self.data.train, self.data.validation, self.config.batch_size, call)

    def _reconstruct_weights(
        self, path: str, data: UnitData, seed: int, on_iteration: OnIteration
    ) -> UnitResult | None:
        unit = self.quantized.get_submodule(path)
        architecture, method = self.calibration.architecture, self.quant.weight_scale_method
        layers = [module for _, module in unit_modules(unit, architecture) if isinstance(module, QuantLayer)]
        if not layers:
            return None
        result = reconstruct_weights(unit, layers, data, method, self.config, seed, on_iteration)
        output_layer = architecture.output_layer(path, unit)
        if output_layer is None:
            return result
        return UnitResult(result.before, correct_bias(unit, output_layer, data).after)

    def _reconstruct_activations(self, path: str, data: UnitData, seed: int, on_iteration: OnIteration) -> UnitResult:
        unit = self.quantized.get_submodule(path)
        modules = [module for _, module in unit_modules(unit, self.calibration.architecture)]
        quantizers = [quantizer for module in modules for quantizer in module.act_quantizers]
        return reconstruct_activations(unit, quantizers, data, self.config, seed, on_iteration)

    def _init_ranges(self, _: OnIteration) -> None:
        method = self.quant.act_scale_method
        init_activation_ranges(self.quantized, self.data.training_data(), method, self.config, self.device)

    def _finetune(self, on_iteration: OnIteration, weights: bool) -> UnitResult:
        calibration = self.calibration
        blocks = [self.quantized.get_submodule(path) for path in self.order.units]
        tuner = FineTuner(
            calibration.model, self.quantized, self.data, self.config, calibration.prediction, weights, blocks
        )
        return tuner.run(on_iteration)
