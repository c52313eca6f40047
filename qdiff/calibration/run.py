"""The calibration of a whole network: ranges, then reconstruction unit by unit."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qdiff.architecture import Architecture
from qdiff.calibration.blockwise import BlockwiseRunner, CallSpec, ExecutionOrder, trace_execution
from qdiff.calibration.cache import Cache, CachedTensor, remove_leftovers
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.directory import CalibrationCheckpoint
from qdiff.calibration.finetune import finetune
from qdiff.calibration.ranges import init_activation_ranges
from qdiff.calibration.reconstruct import (
    UnitData,
    UnitResult,
    correct_bias,
    reconstruct_activations,
    reconstruct_weights,
)
from qdiff.checkpoint import state_hash
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.errors import ConfigError
from qdiff.layers import QuantLayer, QuantMatMul
from qdiff.model import (
    act_quantizers,
    find_timestep_groups,
    init_weights,
    quant_layers,
    quantize_model,
    unit_modules,
    units,
)
from qdiff.prediction import Prediction
from qdiff.utils import distributed
from qdiff.utils.memory import peak_memory

log = logging.getLogger(__name__)

# Raise it with every change that gives a calibration other numbers: a folder of another version is not continued.
RECIPE_VERSION = 2


@dataclass(frozen=True)
class CalibrationDir:
    """Where a calibration keeps its state, and what it may use; nothing here changes its result.

    folder: for the journal and for activations that do not fit into memory; None: nothing is kept.
    cache_bytes: memory for activations (None: half of what is free).
    """

    folder: Path | None = None
    cache_bytes: int | None = None


def calibrate(
    model: nn.Module,
    family: Architecture,
    quant: QuantConfig,
    config: CalibrationConfig,
    rows: CalibrationData | None,
    weights_from: nn.Module | None = None,
    workplace: CalibrationDir | None = None,
    prediction: Prediction | None = None,
) -> nn.Module:
    """Quantize `model` and calibrate it on `rows`.

    Args:
        model: the full-precision network; not changed.
        rows: may be None where nothing is learned from data: `linear` weights without activations.
        weights_from: a quantized network whose weights are taken as they are (`--resume_w`).
        workplace: with a folder, every finished unit is kept there, and the same call after an
            interruption continues with the same result, bit for bit.
        prediction: what the network predicts: the final fit is to eps (None: to the network's output).

    Returns:
        The quantized network, in eval mode.

    Raises:
        ConfigError: settings that cannot work, or that differ from those of the calibration in the folder; no room for activations.
        TypeError: a layer that has no quantized form, by name.
        RuntimeError: a unit that cannot be one, by name (`qdiff.calibration.blockwise.trace_execution`).
    """
    quant.validate()
    config.validate()
    model = model.eval().requires_grad_(False)
    device = next(model.parameters()).device
    wrapped = weights_from if weights_from is not None else quantize_model(model, family, quant).requires_grad_(False)
    if quant.quant_mode == "linear":
        if weights_from is None:
            init_weights(wrapped, quant.weight_scale_method)
        if quant.quant_act:
            init_activation_ranges(wrapped, rows, quant, config, device)
        return wrapped.eval()
    if len(rows) < 2:
        raise ConfigError(f"a calibration set of {len(rows)} rows: expected 2 or more, of which some are held out")
    rows, held_out_from = rows.arranged(config.held_out, config.seed)
    workplace = workplace or CalibrationDir()
    source = None if weights_from is None else state_hash(weights_from.state_dict())
    plan = trace_execution(wrapped, units(wrapped, family), rows, device)
    settings = {
        "recipe_version": RECIPE_VERSION,
        "family": family.name,
        "units": plan.order,
        "splits": {path: layer.split for path, layer in quant_layers(wrapped).items() if layer.split},
        "products": [path for path, module in wrapped.named_modules() if isinstance(module, QuantMatMul)],
        **{f"quantization.{name}": value for name, value in quant.to_dict().items()},
        **{f"recipe.{name}": value for name, value in config.to_dict().items()},
        "weights_sha256": state_hash(model.state_dict()),
        "quantized_weights_sha256": source,
        "rows_sha256": rows.hash(),
        "prediction": None if prediction is None else prediction.kind,
        "torch": torch.__version__,
    }
    if workplace.folder is not None and distributed.rank() == 0:
        remove_leftovers(workplace.folder)
    distributed.barrier()  # all read the journal before one of them writes
    journal = CalibrationCheckpoint.open(workplace.folder, settings, writes=distributed.rank() == 0)
    distributed.barrier()
    with logging_redirect_tqdm(), torch.enable_grad():
        run = _Run(
            model, wrapped, family, rows, held_out_from, quant, config, device, journal, workplace, plan, prediction
        )
        with closing(run.progress):
            if weights_from is None:
                run.over("weights", config.iters, run.weights)
            if quant.quant_act:
                run.ranges()
                run.over("activations", config.iters_a, run.activations)
            run.finetune()
        run.log_cost()
    return wrapped.eval()


def nearest_rounding(
    model: nn.Module, family: Architecture, quant: QuantConfig, config: CalibrationConfig, rows: CalibrationData
) -> nn.Module:
    """The baseline: the widths of `quant` by nearest rounding and min-max ranges."""
    return calibrate(model, family, quant.linear(), config, rows)


class _Run:
    """What the passes over the units share."""

    def __init__(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        family: Architecture,
        rows: CalibrationData,
        held_out_from: int,
        quant: QuantConfig,
        config: CalibrationConfig,
        device: torch.device,
        journal: CalibrationCheckpoint,
        workplace: CalibrationDir,
        plan: ExecutionOrder,
        prediction: Prediction | None,
    ) -> None:
        self.model, self.wrapped, self.family, self.rows = model, wrapped, family, rows
        self.quant, self.config, self.device, self.journal = quant, config, device, journal
        self.held_out_from, self.plan, self.prediction = held_out_from, plan, prediction
        dtype = torch.bfloat16 if config.bfloat16 else torch.float32
        self.cache = Cache(workplace.cache_bytes, workplace.folder, dtype)
        written = 0
        if (
            workplace.folder is not None
        ):  # a file for each unit, the whole after the ranges and after the final fit, both checkpoints
            written = 5 * sum(tensor.nbytes for tensor in wrapped.state_dict().values()) + 8 * sum(
                p.numel() for p in model.parameters()
            )
        self.cache.check_space(self.plan.peak_elements * len(rows) * self.cache.item_size(torch.float32), written)
        iterations = config.iters + (config.iters_a if quant.quant_act else 0)
        total = len(self.plan.order) * iterations + config.iters_tune
        self.progress = tqdm(total=total, desc="calibration", unit="it", smoothing=0.02, disable=distributed.rank() > 0)
        self.next_step = 0
        self.began = time.perf_counter(), time.process_time()
        self.steps = find_timestep_groups(wrapped)

    def step(
        self,
        name: str,
        iterations: int,
        work: Callable[[list[float]], UnitResult | None],
        save: Callable,
        restore: Callable,
    ) -> None:
        """Do a step and keep it, or take it from the journal."""
        number, self.next_step = self.next_step, self.next_step + 1
        ends_at = self.progress.n + iterations
        if number < len(self.journal):
            restore(self.journal.load(number))
        else:
            losses: list[float] = []
            started, began = time.perf_counter(), time.process_time()
            result = work(losses)
            record = {
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - began,
                "losses": _thin(losses),
            }
            if result is not None:
                record |= asdict(result)
                log.info(
                    "%s: held-out error %.4g -> %.4g, %.1f s", name, result.before, result.after, record["seconds"]
                )
            self.journal.commit(name, save(), record)
        self.progress.update(ends_at - self.progress.n)

    def log_cost(self) -> None:
        wall, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        log.info(
            "calibration: %.0f s, %.0f s of CPU time, peak memory of the process %.2f GB",
            wall,
            cpu,
            peak_memory() / 1e9,
        )

    def ticker(self, name: str, losses: list[float]) -> Callable[[float], None]:
        def tick(loss: float) -> None:
            losses.append(loss)
            self.progress.update()
            if len(losses) % 20 == 1:
                self.progress.set_postfix_str(f"{name} loss {loss:.3g}", refresh=False)

        return tick

    def over(
        self, phase: str, iterations: int, work: Callable[[str, UnitData, int, Callable], UnitResult | None]
    ) -> None:
        """One phase over all units, in order; inputs from the quantized prefix, targets in full precision."""
        order = self.plan.order
        module = self.wrapped.get_submodule
        if self.next_step + len(order) <= len(self.journal):
            for unit in order:
                self.step(
                    f"{phase} {unit}",
                    iterations,
                    None,
                    None,
                    lambda tensors, unit=unit: self.restore(module(unit), tensors),
                )
            return
        full, quantized = (
            BlockwiseRunner(network, self.plan, self.rows, self.config.batch_size, self.device, self.cache, self.at)
            for network in (self.model, self.wrapped)
        )
        for index, unit in enumerate(order):
            target = full.finish(unit)
            call, arguments = quantized.arguments(unit)
            data = self.data(call, arguments, target)
            seed = self.config.seed * 100_003 + index
            name = f"{phase} {index + 1}/{len(order)} {unit}"
            self.step(
                name,
                iterations,
                lambda losses, unit=unit, data=data, seed=seed, name=name: work(
                    unit, data, seed, self.ticker(name, losses)
                ),
                lambda unit=unit: self.state(module(unit)),
                lambda tensors, unit=unit: self.restore(module(unit), tensors),
            )
            quantized.finish(unit, call, arguments)
            for stored in arguments:
                stored.release()
        full.release()
        quantized.release()

    def at(self, index: Tensor | slice) -> None:
        """Tell the quantized network's time-step sets which rows come next."""
        if self.steps is not None:
            self.steps.set(self.rows.inputs[1][index])

    def data(self, call: CallSpec, arguments: Sequence[CachedTensor], target: CachedTensor) -> UnitData:
        def read(index: Tensor | slice) -> tuple[tuple[Tensor, ...], Tensor]:
            self.at(index)
            return tuple(x.read(index, self.device) for x in arguments), target.read(index, self.device)

        return UnitData(
            read,
            len(self.rows),
            self.held_out_from,
            self.config.batch_size,
            call,
            lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bfloat16),
        )

    def weights(self, unit: str, data: UnitData, seed: int, tick: Callable) -> UnitResult | None:
        module = self.wrapped.get_submodule(unit)
        layers = [m for _, m in unit_modules(module, self.family) if isinstance(m, QuantLayer)]
        if not layers:
            return None
        result = reconstruct_weights(module, layers, data, self.quant.weight_scale_method, self.config, seed, tick)
        output_layer = self.family.output_layer(module)
        return (
            result
            if output_layer is None
            else UnitResult(result.before, correct_bias(module, output_layer, data).after)
        )

    def activations(self, unit: str, data: UnitData, seed: int, tick: Callable) -> UnitResult:
        module = self.wrapped.get_submodule(unit)
        quantizers = [q for _, m in unit_modules(module, self.family) for q in m.act_quantizers]
        return reconstruct_activations(module, quantizers, data, self.config, seed, tick)

    def ranges(self) -> None:
        def work(_: list[float]) -> None:
            fitted = CalibrationData(self.rows[: self.held_out_from])
            init_activation_ranges(self.wrapped, fitted, self.quant, self.config, self.device)

        self.step(
            "ranges", 0, work, lambda: self.state(self.wrapped), lambda tensors: self.restore(self.wrapped, tensors)
        )

    def finetune(self) -> None:
        if not self.config.iters_tune:
            return

        def work(losses: list[float]) -> UnitResult:
            tick = self.ticker("tune", losses)
            return finetune(
                self.model, self.wrapped, self.rows, self.held_out_from, self.config, self.device, tick, self.prediction
            )

        self.step(
            "tune",
            self.config.iters_tune,
            work,
            lambda: self.state(self.wrapped),
            lambda tensors: self.restore(self.wrapped, tensors),
        )

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """What a step may have changed inside `module`."""
        return module.state_dict()

    def restore(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Bring `module` to the state that `state` returned."""
        for path, tensor in tensors.items():
            parent, _, name = path.rpartition(".")
            owner, tensor = module.get_submodule(parent), tensor.to(self.device)
            setattr(owner, name, nn.Parameter(tensor, requires_grad=False) if name in owner._parameters else tensor)
        for quantizer in act_quantizers(module).values():
            quantizer.enabled = quantizer.enabled or bool(torch.isfinite(quantizer.scale).all())
        for layer in quant_layers(module).values():
            if bool(torch.isfinite(layer.weight_quantizer.scale).all()):
                layer.freeze()


def _thin(losses: list[float], points: int = 100) -> list[float]:
    """At most `points` means over equal stretches of the losses."""
    stretch = max(1, -(-len(losses) // points))
    return [sum(part) / len(part) for part in (losses[i : i + stretch] for i in range(0, len(losses), stretch))]
