"""What goes into a unit and what comes out of it, over all calibration rows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qdiff.calibration.dataset import Rows


class _Reached(Exception):
    """The unit has run: the rest of the forward pass is not needed."""


@torch.no_grad()
def capture(model: nn.Module, unit: str, rows: Rows, batch_size: int, device: torch.device, inputs: bool) -> tuple[Tensor, ...]:
    """The positional inputs (or, with `inputs` false, the output) of `unit` for all rows, on the CPU.

    The forward pass ends at the unit.
    """
    chunks: list[tuple[Tensor, ...]] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        chunks.append(tuple(a.detach().cpu() for a in args))
        raise _Reached

    def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        chunks.append((output.detach().cpu(),))
        raise _Reached

    module = model.get_submodule(unit)
    handle = module.register_forward_pre_hook(before) if inputs else module.register_forward_hook(after)
    try:
        for start in range(0, len(rows), batch_size):
            try:
                model(*(part.to(device) for part in rows[start : start + batch_size]))
            except _Reached:
                continue
            raise RuntimeError(f"{unit}: never reached by a forward pass of the network")
    finally:
        handle.remove()
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


@torch.no_grad()
def execution_order(model: nn.Module, units: Sequence[str], rows: Rows, device: torch.device) -> list[str]:
    """`units` in the order in which they complete in a forward pass.

    Raises:
        RuntimeError: a unit is not reached, by name.
    """
    order: list[str] = []
    handles = [
        model.get_submodule(unit).register_forward_hook(lambda *_, unit=unit: order.append(unit) if unit not in order else None)
        for unit in units
    ]
    try:
        model(*(part.to(device) for part in rows[:1]))
    finally:
        for handle in handles:
            handle.remove()
    if missing := [unit for unit in units if unit not in order]:
        raise RuntimeError(f"units never reached by a forward pass: {', '.join(missing[:3])}")
    return order
