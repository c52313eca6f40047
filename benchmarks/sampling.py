"""Whole sampling (50 steps and decoding) of the bundled models, integer products against float32: one thread, CPU time, paired.

python benchmarks/sampling.py
"""

import argparse
import statistics
import time

import torch

from qdiff.checkpoint import load_packed
from qdiff.engines.cpu import to_integer
from qdiff_cli.bundled import NAMES, load_bundled

CPU = torch.device("cpu")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in NAMES:
        model = load_bundled(name, args.images, CPU)
        networks = {"float32": model.model}
        for kind in ("w8a8", "w4a8"):
            networks[f"{kind.upper()} integer"] = to_integer(load_packed(model.folder / f"{kind}.safetensors")[0])
        model.job.draw(networks["W8A8 integer"], range(1))
        times: dict[str, list[float]] = {label: [] for label in networks}
        for _ in range(args.pairs):
            for label, network in networks.items():
                start = time.process_time()
                model.sample(network)
                times[label].append(time.process_time() - start)
        base = times["float32"]
        print(f"{name}: float32 {statistics.median(base) / args.images * 1e3:.0f} ms an image", end="")
        for label, values in times.items():
            if label != "float32":
                print(f"; {label} {statistics.median(v / b for v, b in zip(values, base, strict=True)):.3f}", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
