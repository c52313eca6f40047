"""Whole sampling of the bundled models, integer products against float32: one thread, CPU time, paired.

    python benchmarks/sampling.py

Each model samples 50 steps and decodes. Each pair runs float32 and every checkpoint in turn.
"""

import argparse
import statistics
import time

import torch

from qdiff.checkpoint import load_packed
from qdiff.engines.cpu import to_integer
from qdiff_cli.bundled import NAMES, folder_of, sampling_command
from qdiff_cli.sampling_run import SamplingRun


def sample_all(run: SamplingRun, network: torch.nn.Module) -> None:
    """Sample every image of the run once."""
    for batch in run.batches(run.total):
        run.sample(network, batch)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in NAMES:
        run = sampling_command(name, args.images).on("cpu", 1).make_run()
        networks = {"float32": run.load_full_precision()}
        for kind in ("w8a8", "w4a8"):
            networks[f"{kind.upper()} integer"] = to_integer(load_packed(folder_of(name) / f"{kind}.safetensors")[0])
        run.sample(networks["W8A8 integer"], range(1))
        times: dict[str, list[float]] = {label: [] for label in networks}
        for _ in range(args.pairs):
            for label, network in networks.items():
                start = time.process_time()
                sample_all(run, network)
                times[label].append(time.process_time() - start)
        base = times["float32"]
        print(f"{name}: float32 {statistics.median(base) / run.total * 1e3:.0f} ms an image", end="")
        for label, values in times.items():
            if label != "float32":
                print(f"; {label} {statistics.median(v / b for v, b in zip(values, base, strict=True)):.3f}", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
