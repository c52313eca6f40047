"""The steps of a calibration: each is done once, or taken from the resume log, and moves the progress bar."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qdiff.calibration.directory import CalibrationCheckpoint
from qdiff.calibration.reconstruct import OnIteration, UnitResult
from qdiff.model import act_quantizers, quant_layers
from qdiff.utils import distributed
from qdiff.utils.memory import peak_memory

log = logging.getLogger(__name__)

CURVE_POINTS = 100  # of the loss curve that is recorded for each step
READ_EVERY = 20  # iterations: the CPU waits for the GPU to read losses


class Steps:
    """Does the steps of a calibration in order.

    Args:
        checkpoint: the resume log.
        iterations: of all steps, for the progress bar.
        device: the device of the network.
    """

    def __init__(self, checkpoint: CalibrationCheckpoint, iterations: int, device: torch.device) -> None:
        self.checkpoint, self.device = checkpoint, device
        silent = distributed.rank() > 0
        self.progress = tqdm(total=iterations, desc="calibration", unit="it", smoothing=0.02, disable=silent)
        self.next_step = 0
        self.began = time.perf_counter(), time.process_time()

    def has(self, count: int) -> bool:
        """Whether the next `count` steps are in the resume log."""
        return self.next_step + count <= len(self.checkpoint)

    def do(
        self,
        name: str,
        iterations: int,
        module: nn.Module,
        work: Callable[[OnIteration], UnitResult | None] | None,
    ) -> None:
        """Do a step and keep it, or take it from the resume log.

        Args:
            name: what the log and the progress bar call it.
            iterations: its share of the progress bar.
            module: what it may change.
            work: does it; None: the step is known to be in the log.
        """
        number, self.next_step = self.next_step, self.next_step + 1
        ends_at = self.progress.n + iterations
        if number < len(self.checkpoint):
            self._restore(module, self.checkpoint.load(number))
        else:
            assert work is not None  # steps without work are in the log
            losses = _Losses()
            started, began = time.perf_counter(), time.process_time()
            result = work(self._on_iteration(name, losses))
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - began
            record: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "losses": _thin(losses.read())}
            if result is not None:
                record |= asdict(result)
                log.info("%s: validation loss %.4g -> %.4g, %.1f s", name, result.before, result.after, seconds)
            self.checkpoint.commit(name, module.state_dict(), record)
        self.progress.update(ends_at - self.progress.n)

    def _on_iteration(self, name: str, losses: "_Losses") -> OnIteration:
        def on_iteration(loss: Tensor | float) -> None:
            losses.unread.append(loss)
            self.progress.update()
            if len(losses.unread) == READ_EVERY or not losses.values:
                self.progress.set_postfix_str(f"{name} loss {losses.read()[-1]:.3g}", refresh=False)

        return on_iteration

    def _restore(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Bring `module` to a state that was kept."""
        for path, tensor in state.items():
            parent, _, name = path.rpartition(".")
            owner, tensor = module.get_submodule(parent), tensor.to(self.device)
            is_parameter = name in owner._parameters
            setattr(owner, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        for quantizer in act_quantizers(module).values():
            quantizer.enabled = quantizer.enabled or bool(torch.isfinite(quantizer.scale).all())
        for layer in quant_layers(module).values():
            if bool(torch.isfinite(layer.weight_quantizer.scale).all()):
                layer.freeze()

    def log_cost(self) -> None:
        """Log time and memory."""
        wall, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        memory = peak_memory() / 1e9
        log.info("calibration: %.0f s, %.0f s of CPU time, peak memory of the process %.2f GB", wall, cpu, memory)


class _Losses:
    """The losses of a step. A GPU runs on while they are not read."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.unread: list[Tensor | float] = []

    def read(self) -> list[float]:
        """All losses so far."""
        if self.unread:
            self.values += torch.stack([torch.as_tensor(loss) for loss in self.unread]).tolist()
            self.unread = []
        return self.values


def _thin(losses: list[float]) -> list[float]:
    """At most CURVE_POINTS means over equal stretches of the losses."""
    stretch = max(1, -(-len(losses) // CURVE_POINTS))
    return [sum(part) / len(part) for part in (losses[i : i + stretch] for i in range(0, len(losses), stretch))]
