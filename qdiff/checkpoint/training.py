"""Training checkpoints: finds the weights among the states in a file, and removes the prefixes of wrappers."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# The names under which training scripts store the weights and their moving average, which is preferred.
EMA_NAMES = ("ema", "ema_state_dict", "ema_model", "model_ema", "state_dict_ema", "ema_model_state_dict")
MODEL_NAMES = ("state_dict", "model_state_dict", "model", "unet", "net", "network")
INNER_NAMES = ("shadow", "state_dict", "module")  # the weights in the state of an average that has further entries
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
EMA_PREFIX = "ema_model."  # the average, in the state of a module that holds a network and its average
DDIM_EMA_INDEX = 4  # ddim saves the list [model, optimizer, epoch, step, EMA]


def find_weights(content: Any) -> tuple[dict[str, Tensor] | None, str]:
    """Find the weights in the content of a file.

    Args:
        content: a state dict, or a list or dict of states that a training script saved.

    Returns:
        The state dict, or None if there is none, and a description of what was taken from a training checkpoint. The
        description is empty for a plain state dict.
    """
    if (state := _as_state(content)) is not None:
        return strip_prefixes(state), ""
    if isinstance(content, Mapping):
        return _find_in_mapping(content)
    if isinstance(content, Sequence) and not isinstance(content, str):
        return _find_in_list(content)
    return None, ""


def _find_in_list(content: Sequence[Any]) -> tuple[dict[str, Tensor] | None, str]:
    """Find the weights in a list of states, as ddim saves them."""
    states = {index: state for index, item in enumerate(content) if (state := _as_state(item)) is not None}
    if DDIM_EMA_INDEX in states:
        description = f"the EMA weights, entry {DDIM_EMA_INDEX} of a list of {len(content)}"
        return strip_prefixes(states[DDIM_EMA_INDEX]), description
    if 0 in states:
        return strip_prefixes(states[0]), f"the weights, entry 0 of a list of {len(content)} (it has no EMA weights)"
    return None, ""


def _find_in_mapping(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor] | None, str]:
    """Find the weights in a dict of states. A plain `state_dict` entry needs no description."""
    entries = ", ".join(map(str, list(content)[:6]))
    skipped = ""
    for names, kind in ((EMA_NAMES, "the EMA weights"), (MODEL_NAMES, "the weights")):
        for name in names:
            value = content.get(name)
            nested = [value.get(inner) for inner in INNER_NAMES] if isinstance(value, Mapping) else []
            for state in filter(None, map(_as_state, [value, *nested])):
                description = "" if name == "state_dict" else f"{kind}, {name!r} of {entries}{skipped}"
                return strip_prefixes(state), description
            if value is not None and names is EMA_NAMES:
                skipped = f"; its {name!r} has another form than a state dict, and was left"
    return None, ""


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that wrappers put before every name. From a network and its average, take the average."""
    stripped = dict(state)
    if any(name.startswith(EMA_PREFIX) for name in stripped):
        stripped = {
            name.removeprefix(EMA_PREFIX): tensor for name, tensor in stripped.items() if name.startswith(EMA_PREFIX)
        }
    while stripped and (prefix := _common_prefix(stripped)):
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    return stripped


def _common_prefix(state: Mapping[str, Tensor]) -> str | None:
    """The prefix of a wrapper that all names begin with, if any."""
    return next((prefix for prefix in WRAPPER_PREFIXES if all(name.startswith(prefix) for name in state)), None)


def _as_state(value: Any) -> dict[str, Tensor] | None:
    """The tensors of `value` if it is a dict of tensors by name, perhaps with plain numbers among them; else None."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        return None
    if not all(isinstance(item, Tensor | int | float | bool) for item in value.values()):
        return None
    return {name: tensor for name, tensor in value.items() if isinstance(tensor, Tensor)} or None
