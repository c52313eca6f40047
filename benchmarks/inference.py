"""Simulated quantized inference against float32, paired: one thread, CPU time, warm-up, median of ratios.

    python benchmarks/inference.py --batch 8 --pairs 5

The network is the CIFAR-10 UNet with random weights. Each pair runs float32 and one setting in turn.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from ddim.config import load_config
from ddim.family import PIXEL
from ddim.unet import UNet
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig, QuantConfig

ROOT = Path(__file__).resolve().parents[1]


def cpu_time(network: torch.nn.Module, x: torch.Tensor, t: torch.Tensor) -> float:
    start = time.process_time()
    network(x, t)
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs/cifar10.yml"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = load_config(args.config).model
    unet = UNet(config).eval().requires_grad_(False)
    size = config.image_size
    x, t = torch.randn(args.batch, config.in_channels, size, size), torch.randint(0, 1000, (args.batch,)).float()
    settings = {
        "W4": QuantConfig(weight_bit=4, split=True, quant_mode="linear"),
        "W4A8 symmetric": QuantConfig(weight_bit=4, quant_act=True, a_sym=True, split=True, quant_mode="linear"),
        "W4A8 asymmetric": QuantConfig(weight_bit=4, quant_act=True, split=True, quant_mode="linear"),
    }
    print(
        f"float32 and quantized in turn, {args.pairs} pairs after a warm-up, batch {args.batch}, 1 thread, CPU seconds"
    )
    for name, setting in settings.items():
        network = Calibration(unet, PIXEL, setting, CalibrationConfig(), CalibrationData((x, t))).run()
        cpu_time(unet, x, t), cpu_time(network, x, t)
        pairs = [(cpu_time(unet, x, t), cpu_time(network, x, t)) for _ in range(args.pairs)]
        ratio = statistics.median(b / a for a, b in pairs)
        floats, quants = (statistics.median(part) for part in zip(*pairs, strict=True))
        print(f"{name:16} float32 {floats:.3f} s, quantized {quants:.3f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
