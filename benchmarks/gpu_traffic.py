"""What one forward pass moves on a GPU, counted without one: launches, bytes, and an estimate of the time.

    python benchmarks/gpu_traffic.py                     # the three published networks
    python benchmarks/gpu_traffic.py --config configs/cifar10.yml --batch 64

Each network runs on the meta device in float16, with PyTorch's fused attention, and on the integer engine (W4A8), and
its operators are counted. Operators of PyTorch move each of their tensors once; those of the integer engine state
what they move (`qdiff.engines.gpu.traffic`). "GB" counts each byte that a launch touches once, as if the cache held
what the launch reads again; "GB with re-reads" counts every load. The times are a roofline, not a measurement: the
sum over all launches of the longer of two times, that for the bytes at 85 % of a card's bandwidth and that for the
products at half of its peak, and 3 microseconds a launch in eager mode, which CUDA graphs save.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ddim.config import load_config as load_pixel
from ddim.family import PIXEL
from ddim.unet import UNet
from ldm.config import load_config as load_latent
from ldm.family import LATENT
from ldm.unet import UNetModel
from qdiff.config import QuantConfig
from qdiff.engines.cuda import attentions, fuse_attention, keep_channels_last, set_core
from qdiff.engines.gpu.layers import to_integer
from qdiff.engines.gpu.traffic import TRAFFIC, Traffic
from qdiff.model import enable_activations, quantize_model

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = (
    ("configs/cifar10.yml", 64),
    ("models/ldm/lsun_beds256/config.yaml", 8),
    ("configs/stable-diffusion/v1-inference.yaml", 2),
)
# bandwidth in GB/s, dense products of float16 with float32 sums and of int8 in 10^12 operations a second
CARDS = {
    "A100": (2039, 312, 624),
    "RTX 4090": (1008, 165, 661),
    "RTX 3090": (936, 71, 284),
    "H100": (3350, 989, 1979),
}
BANDWIDTH, PEAK, LAUNCH = 0.85, 0.5, 3e-6
NO_LAUNCH = {"detach", "alias", "_unsafe_view", "empty", "empty_strided", "empty_like", "_reshape_alias"}


@torch.library.custom_op("counted::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused attention of [N, heads, T, d], as one launch; it only has a shape."""
    raise NotImplementedError


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float, operand_scale: float) -> Tensor:
    """What `qdiff.layers.fused_attention` launches."""
    q, k, v = (part.transpose(1, 2).contiguous() for part in (q, k, v))
    return attention(q, k, v).transpose(1, 2)


@dataclass
class Counted:
    """One operator: its name, traffic, and products (multiply-accumulates) with the bits of their operands."""

    name: str
    traffic: Traffic
    products: int = 0
    bits: int = 16


@dataclass
class Counter(TorchDispatchMode):
    """Runs operators on the meta device and counts them; tensors on the CPU stand for tensors on the card."""

    counted: list[Counted] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        named = {key: value for key, value in (kwargs or {}).items() if key != "device"}
        args, named = tree_map(_meta, (args, named))
        name = func._schema.name.split("::")[1]
        if "device" in (kwargs or {}):
            named["device"] = torch.device("meta")
        out = func(*args, **named)
        tensors = [leaf for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name in TRAFFIC:
            self.counted.append(Counted(name, TRAFFIC[name](*args, **named), _products(name, args, out), 8))
        elif not func.is_view and name not in NO_LAUNCH:
            size = sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, *results])
            read = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            traffic = Traffic(1, read, size - read, size)
            self.counted.append(Counted(name, traffic, _products(name, args, out)))
        return out

    def total(self) -> Traffic:
        """The sum over all operators."""
        return sum((one.traffic for one in self.counted), Traffic(0, 0, 0, 0))

    def seconds(self, card: str, graphs: bool) -> float:
        """The roofline of a pass."""
        bandwidth, half, byte = CARDS[card]
        total = 0.0
        for one in self.counted:
            peak = (byte if one.bits == 8 else half) * 1e12 * PEAK
            total += max(one.traffic.distinct / (bandwidth * 1e9 * BANDWIDTH), 2 * one.products / peak)
        return total if graphs else total + LAUNCH * self.total().launches


def _meta(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.device.type == "meta":
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _products(name: str, args: tuple, out: Any) -> int:
    """The multiply-accumulates of an operator."""
    if name == "convolution":
        return out.numel() * args[1][0].numel()
    if name == "int8_product":
        return out.numel() * args[1][0].numel()
    if name == "int8_attention":
        q, k = args[0], args[1]
        return 3 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2]  # the logits are computed twice
    if name == "attention":
        return 2 * args[0].numel() * args[1].shape[2]
    if name in ("bmm", "mm"):
        return out.numel() * args[0].shape[-1]
    if name == "addmm":
        return out.numel() * args[1].shape[-1]
    return 0


def build(path: Path, batch: int) -> tuple[Callable[[], nn.Module], Any, tuple[Tensor, ...]]:
    """(what makes the network, without values), architecture, inputs on the meta device)."""
    if "target" not in yaml.safe_load(path.read_text())["model"]:
        config = load_pixel(path).model
        shape = (batch, config.in_channels, config.image_size, config.image_size)
        return lambda: UNet(config), PIXEL, _inputs(shape)
    latent = load_latent(path)
    shape = (batch, latent.unet.in_channels, latent.image_size, latent.image_size)
    context = (batch, 77, latent.unet.context_dim) if latent.unet.context_dim else None
    return lambda: UNetModel(latent.unet), LATENT, _inputs(shape, context)


def _inputs(shape: tuple[int, ...], context: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
    x, t = torch.empty(shape, dtype=torch.float16, device="meta"), torch.empty(shape[:1], device="meta")
    return (x, t) if context is None else (x, t, torch.empty(context, dtype=torch.float16, device="meta"))


def full_precision(path: Path, batch: int) -> Counter:
    """Count a pass of the network in float16, in channels_last memory, with fused attention."""
    make, _, inputs = build(path, batch)
    with torch.device("meta"):
        network = keep_channels_last(make().half().eval())
    for _, module, _ in attentions(network):
        set_core(module, fused)
    return count(network, inputs)


def integer(path: Path, batch: int, **formats: Any) -> Counter:
    """Count a pass of the network on the integer engine; its weights are zeros."""
    make, architecture, inputs = build(path, batch)
    with torch.device("meta"):
        network = make()
    network = network.to_empty(device="cpu").eval().requires_grad_(False)
    quant = QuantConfig(**{"weight_bit": 4, "quant_act": True, "split": True} | formats)
    quantized = quantize_model(network, architecture, quant)
    for name, buffer in quantized.named_buffers():
        if name.endswith("delta"):
            buffer.fill_(1.0)
    for module in quantized.modules():
        if hasattr(module, "freeze") and hasattr(module, "weight_quantizers"):
            module.freeze()
    enable_activations(quantized, True)
    return count(fuse_attention(to_integer(quantized)), inputs)


@torch.no_grad()
def count(network: nn.Module, inputs: tuple[Tensor, ...]) -> Counter:
    """Count one pass."""
    with Counter() as counter:
        network(*inputs)
    return counter


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file of one network")
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    networks = [(args.config, args.batch)] if args.config else [(ROOT / name, batch) for name, batch in NETWORKS]
    for path, batch in networks:
        counters = {"float16": full_precision(path, batch), "W4A8 integer": integer(path, batch)}
        print(f"\n{path.name if path.name != 'config.yaml' else path.parent.name}, batch {batch}")
        for name, counter in counters.items():
            total = counter.total()
            re_read = (total.loads + total.stores) / 1e9
            times = ", ".join(
                f"{card} {1e3 * counter.seconds(card, graphs=name != 'float16'):.1f} ms" for card in CARDS
            )
            print(f"{name}: {total.launches} launches, {total.distinct / 1e9:.2f} GB, {re_read:.2f} GB with re-reads")
            print(f"  estimate: {times}")


if __name__ == "__main__":
    main()
