"""The levers of the preset `fast`, one by one, on a bundled model: the trajectory error with one of them changed.

    python benchmarks/levers.py --model emoji64
    python benchmarks/levers.py --model emoji64-text --levers fast no_smoothing no_policy --widths W8A8

One seed, 16 images, the formats of the bundled checkpoints, 20 time steps with 32 samples each. Every network is
measured with quantized activations and without them. `nearest` is nearest rounding with the scale rules of `fast` and
nothing else. The seconds are CPU time.
"""

import argparse
import time
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qdiff.calibration.data import CalibrationData
from qdiff.calibration.ranges import timestep_group_bounds
from qdiff.calibration.run import Calibration
from qdiff.evaluation.page import markdown_table
from qdiff.evaluation.trajectory import Trajectories
from qdiff.model import enable_activations
from qdiff_cli.bundled import NAMES, quantization_options, sampling_command
from qdiff_cli.sampling_run import SamplingRun

GROUPS, NEAREST = "6_timestep_groups", "nearest"
LEVERS: dict[str, dict[str, Any]] = {  # what replaces settings of `fast`
    "fast": {},
    "no_smoothing": {"smoothing": False},
    "no_policy": {"policy_budget": 0.0},
    "nearest_rounding": {"rounding": "nearest"},  # smoothing is a part of compensated rounding, and goes with it
    "fine_tuning": {"iters_tune": 200},
    GROUPS: {},
    NEAREST: {},
}
SAMPLES = 32  # of each time step
HEADER = ["widths", "lever", "A8", "A32", "CPU s"]


@torch.no_grad()
def trajectory_errors(run: SamplingRun, model: nn.Module, quantized: nn.Module) -> list[float]:
    """The trajectory errors of a network with quantized activations and without them."""
    networks = {activations: deepcopy(quantized) for activations in (True, False)}
    for activations, network in networks.items():
        enable_activations(network, activations)
    trajectories = Trajectories()
    for batch in run.batches(run.total):
        denoisers = {str(activations): run.denoiser(network, batch) for activations, network in networks.items()}
        run.sample(model, batch, trajectories.watch(denoisers))
    found = trajectories.eps_errors()
    return [found[str(activations)].mean for activations in networks]


def calibrate(calibration: Calibration, lever: str) -> nn.Module:
    """The network that `fast` makes with one lever changed."""
    if lever == NEAREST:
        return calibration.nearest()
    if lever == GROUPS:
        assert isinstance(calibration.data, CalibrationData)  # `main` gives it
        bounds = timestep_group_bounds(calibration.data, int(GROUPS[0]))
        calibration = replace(calibration, quant=replace(calibration.quant, time_bounds=bounds))
    return replace(calibration, config=replace(calibration.config, **LEVERS[lever])).with_policy().run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=NAMES, default=NAMES[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--widths", nargs="+", choices=["W8A8", "W4A8"], default=["W8A8", "W4A8"])
    parser.add_argument("--levers", nargs="+", choices=[*LEVERS], default=[*LEVERS])
    parser.add_argument("--seed", type=int, default=40, help="seed of the calibration")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = sampling_command(args.model, args.images).on("cpu", 1).make_run()
    model, task = run.load_full_precision().requires_grad_(False), run.task
    options = replace(quantization_options(args.model), preset="fast", cali_n=SAMPLES)
    samples = None
    rows = []
    for widths in args.widths:
        settings = replace(options, weight_bit=int(widths[1])).resolve(task, args.seed)
        assert settings is not None  # the options ask for a quantized network
        recipe = settings.recipe
        if samples is None:
            samples = task.make_calibration_set(model, recipe).select(recipe.num_timesteps, recipe.samples)
        calibration = Calibration(
            model, task.architecture, settings.formats, recipe, samples, prediction=task.prediction
        )
        for lever in args.levers:
            began = time.process_time()
            network = calibrate(calibration, lever)
            seconds = time.process_time() - began
            errors = [f"{error:.4f}" for error in trajectory_errors(run, model, network)]
            rows.append([widths, lever, *errors, f"{seconds:.0f}"])
            print(rows[-1], flush=True)
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main()
