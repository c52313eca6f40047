"""How far 8-bit activations can go on a bundled model: ranges, timestep groups, and the floor of static scales.

    python benchmarks/activation_floor.py
    python benchmarks/activation_floor.py --model emoji64-text

W8A8, weights by nearest rounding with `mse` ranges. It prints the trajectory errors (64 images, 50 steps of the
model's sampler) of

- min-max ranges, ranges of least error, and the same with timestep groups;
- the floor: activation scales, biases and norm affines fine-tuned on the evaluation trajectory itself, which no
  calibration with static scales can be expected to beat by much;
- calibrated checkpoints, whose weights are calibrated too: the bundled one and those of --checkpoints.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qdiff.calibration.data import CalibrationData
from qdiff.calibration.finetune import FineTuner
from qdiff.calibration.ranges import timestep_group_bounds
from qdiff.calibration.run import Calibration
from qdiff.checkpoint import load_packed
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff_cli.bundled import NAMES, folder_of, quantization_options, sampling_command
from qdiff_cli.sampling_run import SamplingRun

RECIPE = CalibrationConfig(num_timesteps=20, samples=32)
FINETUNING = CalibrationConfig(iters_tune=300, validation_fraction=0.02)


Evaluation = tuple[tuple[Tensor, ...], Tensor]  # inputs and output of the network


@torch.no_grad()
def trajectory_error(network: torch.nn.Module, trajectory: list[Evaluation]) -> float:
    """The mean relative error of the output over all evaluations."""
    errors = [((network(*inputs) - output).norm() / output.norm()).item() for inputs, output in trajectory]
    return sum(errors) / len(errors)


@torch.no_grad()
def record_trajectory(run: SamplingRun, model: torch.nn.Module) -> list[Evaluation]:
    """The inputs and outputs of all evaluations of the network while it samples the images of a run."""
    found: list[Evaluation] = []

    def hook(_: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((tuple(arg.clone() for arg in args), output.clone()))

    handle = model.register_forward_hook(hook)
    try:
        run.sample(model, range(run.total))
    finally:
        handle.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji32", choices=NAMES)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--timestep_groups", type=int, nargs="*", default=[2, 5, 10, 20])
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
    run = sampling_command(args.model, args.images).on("cpu", args.threads).make_run()
    model, architecture = run.load_full_precision(), run.task.architecture
    trajectory = record_trajectory(run, model)
    data = run.task.make_calibration_set(model, RECIPE).select(RECIPE.num_timesteps, RECIPE.samples)
    seen = CalibrationData(tuple(torch.cat(parts) for parts in zip(*(inputs for inputs, _ in trajectory), strict=True)))
    num_train = len(seen) - int(FINETUNING.validation_fraction * len(seen))
    sm_abit = quantization_options(args.model).sm_abit
    for symmetric in (True, False):
        min_max = QuantConfig(
            quant_act=True,
            sm_abit=sm_abit,
            a_sym=symmetric,
            split=True,
            weight_scale_method="mse",
            quant_mode="linear",
        )
        least_error = replace(min_max, act_scale_method="mse")
        settings = {"min-max": min_max, "least error": least_error}
        for groups in args.timestep_groups:
            bounds = timestep_group_bounds(data, groups)
            settings[f"least error, {groups} timestep groups"] = replace(least_error, time_bounds=bounds)
        print("symmetric" if symmetric else "asymmetric")
        for name, quant in settings.items():
            network = Calibration(model, architecture, quant, RECIPE, data).run()
            print(f"  {name}: {trajectory_error(network, trajectory):.4f}", flush=True)
        network = Calibration(model, architecture, least_error, RECIPE, data).run()
        split = replace(seen, num_train=num_train)
        FineTuner(model, network, split, FINETUNING, run.task.prediction).run(lambda _: None)
        error = trajectory_error(network, trajectory)
        print(f"  static scales, fine-tuned on this very trajectory: {error:.4f}", flush=True)
    for path in [folder_of(args.model) / "w8a8.safetensors", *args.checkpoints]:
        print(f"{path}: {trajectory_error(load_packed(path)[0], trajectory):.4f}")


if __name__ == "__main__":
    main()
