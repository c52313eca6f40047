"""Whole sampling of a network as large as CIFAR-10's, the engine that `auto` chooses against float32, paired.

    python benchmarks/whole_sampling.py
    python benchmarks/whole_sampling.py --threads 2

Random weights, W4A8 by nearest rounding, 20 steps of DDIM, 8 images. Each pair samples with both. With one thread the
CPU time is measured, with more the time that passes.
"""

import argparse
import logging
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from ddim.config import load_config
from ddim.family import PIXEL
from ddim.sampling import PixelSampler, PixelSamplerConfig
from ddim.unet import UNet
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines import probe
from qdiff.engines.select import apply_engine

ROOT = Path(__file__).resolve().parents[1]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--weight_bit", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = load_config(ROOT / "configs/cifar10.yml")
    sampler = PixelSampler(config, PixelSamplerConfig(skip_type="quad", timesteps=args.steps), torch.device("cpu"))
    network = UNet(config.model).eval().requires_grad_(False)
    data = CalibrationData((torch.randn(args.batch, *sampler.shape), torch.linspace(0, 999, args.batch)))
    quant = QuantConfig(args.weight_bit, quant_act=True, a_sym=True, split=True, quant_mode="linear")
    engine = apply_engine(Calibration(network, PIXEL, quant, CalibrationConfig(), data).run())
    clock = time.process_time if args.threads == 1 else time.perf_counter

    def seconds(network: nn.Module) -> float:
        start = clock()
        sampler(network, range(args.batch), 0)
        return clock() - start

    seconds(engine)  # the first forward pass prepares weights
    pairs = [(seconds(network), seconds(engine)) for _ in range(args.pairs)]
    ratio = statistics.median(integer / full for full, integer in pairs)
    base = statistics.median(full for full, _ in pairs)
    print(f"{probe.processor()}, instructions of {probe.kind()}, {args.threads} thread(s)")
    print(
        f"W{args.weight_bit}A8, {args.steps} steps, batch {args.batch}: {ratio:.3f} x float32, which takes {base:.2f} s"
    )


if __name__ == "__main__":
    main()
