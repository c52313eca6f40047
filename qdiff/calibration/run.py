"""The calibration of a whole network: ranges, then reconstruction unit by unit."""

import logging
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from qdiff.calibration.capture import capture, execution_order
from qdiff.calibration.dataset import Rows
from qdiff.calibration.ranges import init_activation_ranges
from qdiff.calibration.reconstruct import UnitData, UnitResult, correct_bias, reconstruct_activations, reconstruct_weights
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.layers import ActQuantizer, QuantLayer
from qdiff.model import Family, init_weights, quantize_model, unit_modules, units

log = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    family: Family,
    quant: QuantConfig,
    config: CalibrationConfig,
    rows: Rows | None,
    weights_from: nn.Module | None = None,
) -> nn.Module:
    """Quantize `model` and calibrate it on `rows`.

    Args:
        model: the full-precision network; not changed.
        rows: may be None where nothing is learned from data: `linear` weights without activations.
        weights_from: a quantized network whose weights are taken as they are (`--resume_w`).

    Returns:
        The quantized network, in eval mode.
    """
    quant.validate()
    config.validate()
    model = model.eval().requires_grad_(False)
    device = next(model.parameters()).device
    wrapped = weights_from if weights_from is not None else quantize_model(model, family, quant).requires_grad_(False)
    linear = quant.quant_mode == "linear"
    if linear and weights_from is None:
        init_weights(wrapped, quant.weight_scale_method)
    if not linear:
        rows = Rows(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))])
        order = execution_order(wrapped, units(wrapped, family), rows, device)
        iterations = (0 if weights_from is not None else config.iters) + (config.iters_a if quant.quant_act else 0)
        progress = tqdm(total=len(order) * iterations, desc="calibration", unit="it", smoothing=0.02)
        run = _Run(model, wrapped, family, rows, config, device, progress)
        if weights_from is None:
            run.over(order, "weights", lambda unit, data, seed: run.weights(unit, data, quant, seed))
    if quant.quant_act:
        init_activation_ranges(wrapped, rows, quant, config, device)
        if not linear:
            run.over(order, "activations", run.activations)
    if not linear:
        progress.close()
    return wrapped.eval()


class _Run:
    """What the two passes over the units share."""

    def __init__(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        family: Family,
        rows: Rows,
        config: CalibrationConfig,
        device: torch.device,
        progress: tqdm,
    ) -> None:
        self.model, self.wrapped, self.family, self.rows = model, wrapped, family, rows
        self.config, self.device, self.progress = config, device, progress

    def over(self, order: list[str], phase: str, step: Callable[[str, UnitData, int], UnitResult | None]) -> None:
        for index, unit in enumerate(order):
            self.progress.set_postfix_str(f"{phase}: {unit}")
            result = step(unit, self.data(unit), self.config.seed * 100_003 + index)
            if result is not None:
                log.info("%s %d/%d %s: held-out error %.4g -> %.4g", phase, index + 1, len(order), unit, result.before, result.after)

    def data(self, unit: str) -> UnitData:
        """Inputs of the unit from the quantized prefix, its output in full precision."""
        held_out = max(1, int(len(self.rows) * self.config.held_out)) if len(self.rows) > 1 else 0
        batch = self.config.batch_size
        inputs = capture(self.wrapped, unit, self.rows, batch, self.device, inputs=True)
        (target,) = capture(self.model, unit, self.rows, batch, self.device, inputs=False)
        split = len(self.rows) - held_out
        return UnitData(inputs, target, self.device, batch, split)

    def weights(self, unit: str, data: UnitData, quant: QuantConfig, seed: int) -> UnitResult | None:
        module = self.wrapped.get_submodule(unit)
        layers = [m for _, m in unit_modules(module, self.family) if isinstance(m, QuantLayer)]
        if not layers:
            return None
        rounded = reconstruct_weights(module, layers, data, quant.weight_scale_method, self.config, seed, self.progress.update)
        return UnitResult(rounded.before, correct_bias(module, self.family.output_layer(module), data).after)

    def activations(self, unit: str, data: UnitData, seed: int) -> UnitResult:
        module = self.wrapped.get_submodule(unit)
        quantizers: list[ActQuantizer] = [q for _, m in unit_modules(module, self.family) for q in m.act_quantizers]
        return reconstruct_activations(module, quantizers, data, self.config, seed, self.progress.update)
