"""The names of networks in reports: their nominal widths, and how many layers have others."""

import torch

from qdiff.config import QuantConfig
from qdiff.model import QuantPlan
from qdiff.policy import widths_of
from qdiff.task import QuantizationTask


def width_name(formats: QuantConfig, task: QuantizationTask) -> str:
    """The name of a network in a report, such as `W4A8` or `W4A8 (12 of 116 layers at other widths)`."""
    name = f"W{formats.weight_bit}A{formats.act_bit if formats.quant_act else 32}"
    own = own_widths(formats, task)
    return f"{name} ({own})" if own else name


def own_widths(formats: QuantConfig, task: QuantizationTask) -> str:
    """How many layers differ from the nominal widths, such as `12 of 116 layers at other widths`; empty if none does.

    Attention matmuls are counted as layers if activations are quantized. A layer in full precision has another width.
    """
    if not formats.policy:
        return ""
    with torch.device("meta"):
        network = task.architecture.make_unet(task.unet_config)
    plan = QuantPlan.of(network, task.architecture, QuantConfig(split=formats.split))
    differ = [formats.keeps(path) or _differs(formats, path) for path in plan.layers]
    if formats.quant_act:
        for path, spec in plan.matmuls.items():
            nominal = {formats.act_bit, formats.sm_abit} if spec.softmax else {formats.act_bit}
            own = widths_of(formats.policy, path)[1]
            differ.append(formats.keeps(path) or (own is not None and {own} != nominal))
    return f"{sum(differ)} of {len(differ)} layers at other widths" if any(differ) else ""


def _differs(formats: QuantConfig, path: str) -> bool:
    """Whether the layer at `path` has another width than the nominal one. Without activations, weights alone count."""
    weight, act = formats.widths(path)
    return weight != formats.weight_bit or (formats.quant_act and act != formats.act_bit)
