"""Time of one forward pass on a card: float16 eager, float16 compiled, and W4A8 on the integer engines.

    python benchmarks/gpu.py            # CIFAR-10 batch 64, LSUN bedrooms batch 8, Stable Diffusion batch 2

It prints a row for the table of docs/engines.md. Random weights; CUDA events, medians of passes after a warm-up; all
of them in channels_last memory under autocast in float16, and in one run.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from engine import load
from torch import nn

from qdiff.calibration.data import CalibrationData
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines.cuda import fuse_attention, halve_weights, keep_channels_last
from qdiff.engines.gpu import card
from qdiff.engines.select import INTEGER_ENGINES, apply_engine

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = (
    ("CIFAR-10, batch 64", "configs/cifar10.yml", 64),
    ("bedrooms, batch 8", "models/ldm/lsun_beds256/config.yaml", 8),
    ("Stable Diffusion, batch 2", "configs/stable-diffusion/v1-inference.yaml", 2),
)


def milliseconds(network: Callable, inputs: tuple, passes: int) -> float:
    """The median time of a pass."""
    times = []
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        for step in range(passes + 5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            network(*inputs)
            end.record()
            torch.cuda.synchronize()
            if step >= 5:
                times.append(start.elapsed_time(end))
    return statistics.median(times)


def prepared(path: Path, batch: int, device: torch.device) -> tuple[dict[str, nn.Module], tuple]:
    """The networks that are compared, by name, and inputs."""
    model, architecture, inputs = load(path, batch, None)
    quant = QuantConfig(weight_bit=4, quant_act=True, split=True, quant_mode="linear")
    few = CalibrationData(tuple(part[:1] for part in inputs))
    quantized = Calibration(model.eval().requires_grad_(False), architecture, quant, CalibrationConfig(), few).run()
    quantized = quantized.to(device)
    integer = {f"W4A8 {engine}": apply_engine(quantized, engine) for engine in INTEGER_ENGINES}
    full = keep_channels_last(fuse_attention(copy.deepcopy(model).to(device)))
    halve_weights(full, torch.float16)
    return (
        {"float16 eager": full, "float16 compiled": torch.compile(full)} | integer,
        tuple(part.to(device) for part in inputs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=30)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: no CUDA device")
    device = torch.device("cuda")
    if (reason := card.why_unavailable(device)) is not None:
        sys.exit(f"benchmarks/gpu.py: {reason}")
    cells = []
    for name, config, batch in NETWORKS:
        networks, inputs = prepared(ROOT / config, batch, device)
        times = {label: milliseconds(network, inputs, args.passes) for label, network in networks.items()}
        print(name, ", ".join(f"{label} {time:.2f} ms" for label, time in times.items()), flush=True)
        cells.append(" / ".join(f"{time:.1f}" for time in times.values()))
    print(f"\n| {torch.cuda.get_device_name(device)}, torch {torch.__version__} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
