"""How far 8-bit activations can go on the bundled pixel model: ranges, time-step sets, and the floor of static scales.

    python benchmarks/activation_floor.py

W8A8, weights by nearest rounding with `mse` ranges. Trajectory errors (64 images, DDIM 50 quad steps) of: min-max ranges; ranges of
least error; the same in time-step sets; and the floor: step sizes, biases and normalizations fitted on the evaluation
trajectory itself, which no calibration with static scales can be expected to beat by much. Then calibrated checkpoints (whose weights
are calibrated too): the bundled one and those given by --checkpoints.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qdiff.calibration.data import CalibrationData
from qdiff.calibration.finetune import finetune
from qdiff.calibration.ranges import timestep_group_bounds
from qdiff.calibration.run import Calibration
from qdiff.checkpoint import load_packed
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff_cli.bundled import load_bundled

CPU = torch.device("cpu")
RECIPE = CalibrationConfig(num_timesteps=20, samples=32)
FIT = CalibrationConfig(iters_tune=300, held_out=0.02)


@torch.no_grad()
def trajectory_error(network: torch.nn.Module, trajectory: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    return sum(((network(x, t) - eps).norm() / eps.norm()).item() for x, t, eps in trajectory) / len(trajectory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--sets", type=int, nargs="*", default=[2, 5, 10, 20])
    parser.add_argument(
        "--checkpoints",
        type=Path,
        nargs="*",
        default=[],
        help="calibrated packed checkpoints, measured beside the bundled one",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_bundled("emoji32", args.images, CPU)
    trajectory: list[tuple[Tensor, Tensor, Tensor]] = []
    model.sample(model.model, lambda x, t, eps: trajectory.append((x.clone(), t.clone(), eps.clone())))
    rows = model.rows(RECIPE)
    seen = CalibrationData(tuple(torch.cat(parts) for parts in zip(*((x, t) for x, t, _ in trajectory), strict=True)))
    for symmetric in (True, False):
        base = QuantConfig(
            8, quant_act=True, a_sym=symmetric, split=True, weight_scale_method="mse", quant_mode="linear"
        )
        settings = {"min-max": base, "least error": replace(base, act_scale_method="mse")}
        settings |= {
            f"least error, {sets} time-step sets": replace(
                base, act_scale_method="mse", time_bounds=timestep_group_bounds(rows, sets)
            )
            for sets in args.sets
        }
        print("symmetric" if symmetric else "asymmetric")
        for name, quant in settings.items():
            network = Calibration(model.model, model.job.task.family, quant, RECIPE, rows).run()
            print(f"  {name}: {trajectory_error(network, trajectory):.4f}", flush=True)
        network = Calibration(model.model, model.job.task.family, settings["least error"], RECIPE, rows).run()
        held_out_from = len(seen) - int(FIT.held_out * len(seen))
        finetune(model.model, network, seen, held_out_from, FIT, CPU, lambda _: None)
        print(
            f"  static scales, fitted on this very trajectory: {trajectory_error(network, trajectory):.4f}", flush=True
        )
    for path in [model.folder / "w8a8.safetensors", *args.checkpoints]:
        print(f"{path}: {trajectory_error(load_packed(path)[0], trajectory):.4f}")


if __name__ == "__main__":
    main()
