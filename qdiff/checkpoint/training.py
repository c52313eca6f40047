"""The weights inside a training checkpoint: which of its states they are, and what wrappers added to their names."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# under what names training scripts keep the weights, and their moving average, which comes first
EMA_NAMES = ("ema", "ema_state_dict", "ema_model", "model_ema", "state_dict_ema", "ema_model_state_dict")
MODEL_NAMES = ("state_dict", "model_state_dict", "model", "unet", "net", "network")
INNER_NAMES = ("shadow", "state_dict", "module")  # of averages that keep more than the weights
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
EMA_COPY = "ema_model."  # of modules that hold a network and its average
DDIM_EMA = 4  # ddim saves the list [model, optimizer, epoch, step, EMA]


def weights_of(content: Any) -> tuple[dict[str, Tensor] | None, str]:
    """The state dict in what a file holds, and in words what was taken of a training checkpoint (nothing where it is
    a plain one).

    The state dict is None where there is none.
    """
    if (state := _state(content)) is not None:
        return without_prefix(state), ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        states = {number: state for number, part in enumerate(content) if (state := _state(part)) is not None}
        if DDIM_EMA in states:
            return without_prefix(states[DDIM_EMA]), f"the EMA weights, entry {DDIM_EMA} of a list of {len(content)}"
        if 0 in states:
            return without_prefix(
                states[0]
            ), f"the weights, entry 0 of a list of {len(content)} (it has no EMA weights)"
        return None, ""
    if not isinstance(content, Mapping):
        return None, ""
    lost = ""
    for names, words in ((EMA_NAMES, "the EMA weights"), (MODEL_NAMES, "the weights")):
        for name in names:
            value = content.get(name)
            nested = [value.get(inner) for inner in INNER_NAMES] if isinstance(value, Mapping) else []
            for state in filter(None, map(_state, [value, *nested])):
                return (
                    without_prefix(state),
                    ""
                    if name == "state_dict"
                    else f"{words}, {name!r} of {', '.join(map(str, list(content)[:6]))}{lost}",
                )
            if value is not None and names is EMA_NAMES:
                lost = f"; its {name!r} has another form than a state dict, and was left"
    return None, ""


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the prefixes that wrappers put before every name; of a network and its average, the average."""
    found = dict(state)
    if any(name.startswith(EMA_COPY) for name in found):
        found = {name.removeprefix(EMA_COPY): tensor for name, tensor in found.items() if name.startswith(EMA_COPY)}
    while found and (prefix := next((one for one in WRAPPERS if all(name.startswith(one) for name in found)), None)):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _state(value: Any) -> dict[str, Tensor] | None:
    """`value` if it is a dict of tensors by name (of numbers beside them: without these)."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        return None
    tensors = {name: tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
    return (
        tensors if tensors and all(isinstance(part, Tensor | int | float | bool) for part in value.values()) else None
    )
