"""What a calibration costs, projected from a few iterations of every unit.

    python benchmarks/calibration.py --config configs/cifar10.yml
    python benchmarks/calibration.py --config models/ldm/lsun_beds256/config.yaml --batch 4 --samples 4
    python benchmarks/calibration.py --capture

Random weights. After a warm-up every unit runs 1 and then 3 iterations of each phase on the same samples. The
difference gives the time of an iteration; the rest is done once for each unit. Error-compensating rounding and the
fine-tuning are measured in the same way, and so is the sensitivity of the layers, whose cost does not depend on the
recipe. The totals of all presets follow for the number of samples that the paper takes. A `--batch` smaller than the
preset's batch is scaled up linearly. A pass of validation or of the bias correction is counted at a third of an
iteration's time for each sample. `--csv` writes the time of every unit. `--capture` shows how the cost of
getting each unit's inputs and outputs grows with the number of units, of a UNet and of a transformer of single layers.
"""

import argparse
import csv
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from ddim.config import load_config as load_pixel
from ddim.family import PIXEL
from ddim.unet import UNet
from ldm.config import load_config as load_latent
from ldm.family import LATENT
from ldm.unet import UNetModel
from qdiff.architecture import Architecture
from qdiff.calibration.blockwise import BlockwiseRunner
from qdiff.calibration.cache import Cache
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.directory import MANIFEST, CalibrationDir, read_records
from qdiff.calibration.finetune import VALIDATION_SAMPLES
from qdiff.calibration.finetune import VALIDATIONS as FINETUNING_VALIDATIONS
from qdiff.calibration.reconstruct import VALIDATIONS
from qdiff.calibration.run import Calibration
from qdiff.calibration.sensitivity import SAMPLES
from qdiff.calibration.trace import trace_execution
from qdiff.config import PRESETS, CalibrationConfig, QuantConfig
from qdiff.model import quantize_model, units
from qdiff.utils.memory import peak_memory

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
QUANT = QuantConfig(
    weight_bit=4, quant_act=True, a_sym=True, split=True, weight_scale_method="mse", act_scale_method="mse"
)
PUBLISHED_SAMPLES = {"pixel": 20 * 256, "latent": 20 * 256, "text": 25 * 128 * 2}
PUBLISHED_BATCH = {"pixel": 32, "latent": 32, "text": 8}


def load(path: Path) -> tuple:
    """(network with random weights, architecture, inputs of one sample, kind)."""
    if "target" not in yaml.safe_load(path.read_text())["model"]:
        config = load_pixel(path)
        size = config.model.image_size
        return UNet(config.model), PIXEL, (torch.randn(1, config.model.in_channels, size, size), torch.ones(1)), "pixel"
    config = load_latent(path)
    unet = config.unet
    inputs = [torch.randn(1, unet.in_channels, config.image_size, config.image_size), torch.ones(1)]
    if unet.context_dim:
        inputs.append(torch.randn(1, 77, unet.context_dim))
    return UNetModel(unet), LATENT, tuple(inputs), "text" if unet.context_dim else "latent"


def random_data(sample: tuple, count: int) -> CalibrationData:
    """Random inputs with the shapes of `sample`, at time steps from 0 to 999."""
    torch.manual_seed(0)
    inputs = (
        torch.randn(count, *part.shape[1:]) if part.dim() > 1 else torch.linspace(0, 999, count) for part in sample
    )
    return CalibrationData(tuple(inputs))


def seconds_of(
    model: torch.nn.Module, architecture: Architecture, data: CalibrationData, config: CalibrationConfig
) -> tuple[dict[str, float], float]:
    """CPU seconds of each step of a calibration, and of the captures between the steps."""
    config = replace(config, validation_fraction=1 / len(data))
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        Calibration(model, architecture, QUANT, config, data, directory=CalibrationDir(Path(folder))).run()
        total = time.process_time() - began
        records = read_records(Path(folder) / MANIFEST)
    steps = {record["step"]: record["cpu_seconds"] for record in records}
    return steps, total - sum(steps.values())


@dataclass(frozen=True)
class Costs:
    """CPU seconds of the parts of a calibration, summed over the units.

    Attributes:
        weights: one iteration of AdaRound.
        activations: one iteration of the activation scales.
        captures: the captures of both phases, for each sample.
        policy: the sensitivity of all layers.
        layers: what error-compensating rounding takes once.
        rows: what it takes for each sample, captures included.
        ranges: the ranges, for each sample.
        tuning: one iteration of both rounds of the fine-tuning, for each sample of the batch.
    """

    weights: float
    activations: float
    captures: float
    policy: float
    layers: float
    rows: float
    ranges: float
    tuning: float


def sum_of(steps: dict[str, float], phase: str) -> float:
    """The time of the steps of a phase."""
    return sum(seconds for step, seconds in steps.items() if step.startswith(phase))


def measure(
    model: torch.nn.Module, architecture: Architecture, sample: tuple, args: argparse.Namespace
) -> tuple[Costs, dict[str, float]]:
    """The costs, and the time of an iteration of every unit."""
    data, more = (random_data(sample, count) for count in (args.samples, 2 * args.samples))
    learned = [CalibrationConfig(batch_size=args.batch, iters=count, iters_a=count) for count in (1, 3)]
    fitted = [
        replace(PRESETS["fast"], batch_size=args.batch, batch_tune=args.batch, unit_samples=0, iters_tune=count)
        for count in (1, 3)
    ]
    seconds_of(model, architecture, data, learned[0])  # warm-up: oneDNN compiles its kernels for every shape
    once, captures = seconds_of(model, architecture, data, learned[0])
    thrice, _ = seconds_of(model, architecture, data, learned[1])
    iteration = {step: (thrice[step] - once[step]) / 2 for step in once if step != "ranges"}
    few, few_captures = seconds_of(model, architecture, data, fitted[0])
    many, many_captures = seconds_of(model, architecture, more, fitted[0])
    tuned, _ = seconds_of(model, architecture, data, fitted[1])
    rows = (sum_of(many, "weights") + many_captures - sum_of(few, "weights") - few_captures) / args.samples
    began = time.process_time()
    Calibration(model, architecture, QUANT, fitted[0], data).with_policy()
    policy = (time.process_time() - began) * SAMPLES / min(SAMPLES, len(data))
    return Costs(
        weights=sum_of(iteration, "weights"),
        activations=sum_of(iteration, "activations"),
        captures=captures / args.samples,
        policy=policy,
        layers=max(0.0, sum_of(few, "weights") + few_captures - rows * args.samples),
        rows=rows,
        ranges=few["ranges"] / args.samples,
        tuning=(sum_of(tuned, "tune") - sum_of(few, "tune")) / 2 / args.batch,
    ), iteration


def project_preset(
    preset: CalibrationConfig, costs: Costs, num_samples: int, batch: tuple[int, int]
) -> dict[str, float]:
    """The CPU seconds of the parts of a calibration.

    Args:
        preset: the recipe.
        costs: what its parts take.
        num_samples: the samples of the calibration set.
        batch: the published batch size, and the one that iterations were measured with.
    """
    num_validation = preset.validation_fraction * num_samples
    # an iteration is one pass forward, two back, and one of the full-precision network; validation has two passes
    tuning = preset.iters_tune * preset.batch_tune + FINETUNING_VALIDATIONS * VALIDATION_SAMPLES / 2
    parts = {"ranges": costs.ranges * num_samples, "fine-tuning": costs.tuning * tuning if preset.iters_tune else 0.0}
    if preset.rounding == "compensated":
        rounded = min(preset.unit_samples or num_samples, num_samples)
        return parts | {"policy": costs.policy, "rounding": costs.layers + costs.rows * rounded}
    scale = batch[0] / batch[1]
    passes = costs.weights * (3 * num_validation + num_samples) + costs.activations * num_validation * (2 + VALIDATIONS)
    return parts | {
        "fitting": scale * (preset.iters * costs.weights + preset.iters_a * costs.activations),
        "validation": passes / (3 * batch[1]),
        "captures": costs.captures * num_samples,
    }


def project(args: argparse.Namespace) -> None:
    model, architecture, sample, kind = load(args.config)
    model = model.eval().requires_grad_(False)
    costs, iteration = measure(model, architecture, sample, args)
    count = sum(step.startswith("weights") for step in iteration)
    print(f"{args.config}: {count} units, CPU seconds of an iteration at batch {args.batch}, summed over the units:")
    print(
        f"  weights {costs.weights:.2f}, activations {costs.activations:.2f}; captures {costs.captures:.3f} a sample; "
        f"rounding {costs.layers:.2f} and {costs.rows:.3f} a sample; fine-tuning {costs.tuning:.3f} a sample of a batch"
    )
    slowest = sorted(iteration, key=iteration.get, reverse=True)[:3]
    print("  slowest: " + ", ".join(f"{step} {iteration[step]:.3f}" for step in slowest))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            rows = [(step, f"{value:.4f}") for step, value in iteration.items()]
            csv.writer(file).writerows([("step", "CPU seconds of an iteration"), *rows])
    wrapped = quantize_model(model, architecture, QUANT)
    order = trace_execution(wrapped, units(wrapped, architecture), random_data(sample, 2), CPU)
    for name, preset in PRESETS.items():
        num_samples = PUBLISHED_SAMPLES[kind] * min(preset.samples, 256) // 256
        parts = project_preset(preset, costs, num_samples, (PUBLISHED_BATCH[kind], args.batch))
        listed = ", ".join(f"{part} {seconds / 3600:.2f}" for part, seconds in parts.items())
        print(f"  {name}: {sum(parts.values()) / 3600:.1f} h: {listed}")
        cached = min(preset.unit_samples or num_samples, num_samples)
        print(
            f"    activations of {cached} samples: {order.peak_elements * cached * 4 / 1e9:.1f} GB (memory and files)"
        )
    print(f"  peak memory of this run: {peak_memory() / 1e9:.1f} GB")


class JointBlock(nn.Module):
    """A block of two streams as in Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206): 14 linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))

    def forward(self, image: Tensor, text: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        streams = [image, text]
        factors = [layer(F.silu(emb))[:, None].chunk(6, dim=-1) for layer in self.modulation]
        inputs = [self.norm(x) * (1 + f[0]) + f[1] for x, f in zip(streams, factors, strict=True)]
        q, k, v = (
            torch.cat([layer(x) for layer, x in zip(layers, inputs, strict=True)], dim=1)
            .unflatten(-1, (self.heads, -1))
            .transpose(1, 2)
            for layers in (self.q, self.k, self.v)
        )
        joint = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        parts = joint.split([image.shape[1], text.shape[1]], dim=1)
        for i, part in enumerate(parts):
            f = factors[i]
            streams[i] = streams[i] + f[2] * self.out[i](part)
            streams[i] = streams[i] + f[5] * self.down[i](F.gelu(self.up[i](self.norm(streams[i]) * (1 + f[3]) + f[4])))
        return streams[0], streams[1]


class JointTransformer(nn.Module):
    """A transformer of `depth` such blocks, with 5 layers around them, on latents of 16x16."""

    def __init__(self, depth: int, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.patch, self.context = nn.Conv2d(4, width, 2, stride=2), nn.Linear(64, width)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(JointBlock(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        emb = self.time(torch.cos(t[:, None] * torch.arange(1, 33) / 500))
        image, text = self.patch(x).flatten(2).transpose(1, 2), self.context(context)
        for block in self.blocks:
            image, text = block(image, text, emb)
        return F.pixel_shuffle(self.head(image).transpose(1, 2).unflatten(2, (8, 8)), 2)


def capture(model: nn.Module, architecture: Architecture, data: CalibrationData) -> tuple[int, float, float]:
    """Capture all units of one phase.

    Returns:
        the number of units, and the CPU seconds of the trace and of the captures.
    """
    model = model.eval().requires_grad_(False)
    wrapped = quantize_model(model, architecture, QUANT)
    began = time.process_time()
    order = trace_execution(wrapped, units(wrapped, architecture), data, CPU)
    traced = time.process_time()
    full, quantized = (BlockwiseRunner(network, order, data, 8, CPU, Cache()) for network in (model, wrapped))
    for unit in order.units:
        full.finish(unit)
        call, arguments = quantized.arguments(unit)
        quantized.finish(unit, call, arguments)
        for stored in arguments:
            stored.release()
    return len(order.units), traced - began, time.process_time() - traced


@torch.no_grad()
def capture_growth() -> None:
    print("captures of every unit's inputs and outputs, 16 samples, one phase, both networks\n")
    print("| network | units | CPU s of the trace | of the captures | for each unit, of the first line |")
    print("|---|---|---|---|---|")
    layers = Architecture("layers", make_unet=JointTransformer, blocks={})
    for name in ("UNet, blocks", "transformer of two streams, layers"):
        first = None
        for depth in (1, 2, 3, 4) if name.startswith("UNet") else (4, 16):
            torch.manual_seed(0)
            if name.startswith("UNet"):
                config = load_pixel(ROOT / "configs/cifar10.yml").model
                config = replace(config, ch=32, norm_groups=8, num_res_blocks=depth, dropout=0.0)
                model, architecture, sample = UNet(config), PIXEL, (torch.randn(1, 3, 32, 32), torch.ones(1))
            else:
                model, architecture = JointTransformer(depth), layers
                sample = (torch.randn(1, 4, 16, 16), torch.ones(1), torch.randn(1, 16, 64))
            count, traced, captured = capture(model, architecture, random_data(sample, 16))
            first = first or captured / count
            print(f"| {name} | {count} | {traced:.2f} | {captured:.2f} | {captured / count / first:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/cifar10.yml")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--csv", type=Path, help="also write the time of every unit")
    parser.add_argument("--capture", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.capture:
        capture_growth()
    else:
        project(args)


if __name__ == "__main__":
    main()
