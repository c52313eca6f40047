"""Integer inference against float32 eager, paired: one thread, CPU time, warm-up, medians of ratios.

    python benchmarks/engine.py --config configs/cifar10.yml --batch 8
    python benchmarks/engine.py --config models/ldm/lsun_beds256/config.yaml --batch 1
    python benchmarks/engine.py --config configs/stable-diffusion/v1-inference.yaml --size 32 --batch 2

    python benchmarks/engine.py --batch 8 --onnx

Random weights, nearest rounding. Each pair runs float32 and every setting in turn. With "rest bfloat16" all that lies
between the integer products runs in bfloat16 (`--precision autocast`). At 4 bits there are also 16-bit activations, and
8-bit ones with a smoothing of every input (whose values are of no use). The simulation, and bfloat16 autocast of the
full-precision network in channels_last memory, run beside them. `--onnx` adds the exported network in ONNX Runtime and
in OpenVINO (its rest in float32 and in bfloat16), if they are installed, and to each line of W4A8 and W8A8 the relative
difference of its output from the simulation in float64.
"""

import argparse
import copy
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from ddim.config import load_config as load_pixel
from ddim.family import PIXEL
from ddim.unet import UNet
from ldm.config import load_config as load_latent
from ldm.family import LATENT
from ldm.unet import UNetModel
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines import probe, speed
from qdiff.engines.cpu import to_integer
from qdiff.engines.onnx import export_onnx
from qdiff.model import quant_layers

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path, batch: int, size: int | None) -> tuple:
    """(network with random weights, architecture, inputs)."""
    if "target" not in yaml.safe_load(path.read_text())["model"]:
        config = load_pixel(path).model
        size = size or config.image_size
        return (
            UNet(config),
            PIXEL,
            (torch.randn(batch, config.in_channels, size, size), torch.randint(0, 1000, (batch,)).float()),
        )
    config = load_latent(path)
    size = size or config.image_size
    inputs = [torch.randn(batch, config.unet.in_channels, size, size), torch.randint(0, 1000, (batch,)).float()]
    if config.unet.context_dim:
        inputs.append(torch.randn(batch, 77, config.unet.context_dim))
    return UNetModel(config.unet), LATENT, tuple(inputs)


def exported(network: torch.nn.Module, inputs: tuple, file: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """The network in the ONNX engines that are installed, on one thread."""
    export_onnx(file, network, inputs)
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    names = ["x", "t", "context"][: len(inputs)]
    feeds = {name: part.numpy() for name, part in zip(names, inputs, strict=True)}
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        runs["ONNX Runtime"] = lambda: torch.from_numpy(session.run(None, feeds)[0])
    if importlib.util.find_spec("openvino"):
        import openvino

        for precision in ("f32", "bf16"):
            settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1}
            compiled = openvino.Core().compile_model(str(file), "CPU", settings)
            runs[f"OpenVINO, rest {precision}"] = lambda compiled=compiled: torch.from_numpy(
                compiled(list(feeds.values()))[0]
            )
    return runs


def smoothed(network: torch.nn.Module) -> torch.nn.Module:
    """A copy of a quantized network that smooths every input, with factors that are good for timing alone."""
    network = copy.deepcopy(network)
    for layer in quant_layers(network).values():
        layer.smoothing = torch.rand(layer.shape[layer.channels]) + 0.5
    return network


def cpu_time(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def in_bfloat16(network: torch.nn.Module, inputs: tuple) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return network(*inputs)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/cifar10.yml")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, help="height and width of the input (default: the configuration's)")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sm_abit", type=int, default=8)
    parser.add_argument("--onnx", action="store_true", help="ONNX Runtime and OpenVINO too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, architecture, inputs = load(args.config, args.batch, args.size)
    model = model.eval().requires_grad_(False)
    runs: dict[str, Callable[[], torch.Tensor]] = {"float32": lambda: model(*inputs)}
    exact: dict[int, torch.Tensor] = {}
    quant = QuantConfig(4, quant_act=True, a_sym=True, sm_abit=args.sm_abit, split=True, quant_mode="linear")

    def quantized(**widths: int) -> torch.nn.Module:
        formats = replace(quant, **widths)  # type: ignore[arg-type]  # widths alone
        return Calibration(model, architecture, formats, CalibrationConfig(), CalibrationData(inputs)).run()

    depth = speed.row().min_depth  # as the engine `auto` chooses
    for bits in (4, 8):
        simulated = quantized(weight_bit=bits)
        integer = to_integer(simulated, depth)
        runs[f"W{bits}A8 integer"] = lambda integer=integer: integer(*inputs)
        runs[f"W{bits}A8 integer, rest bfloat16"] = lambda integer=integer: in_bfloat16(integer, inputs)
        if bits == 4:
            runs["W4A8 simulated"] = lambda simulated=simulated: simulated(*inputs)
            variants = {"smoothed W4A8 integer": smoothed(simulated), "W4A16 integer": quantized(act_bit=16)}
            for name, network in variants.items():
                integer = to_integer(network, depth)
                runs[name] = lambda integer=integer: integer(*inputs)
        if args.onnx:
            exact[bits] = copy.deepcopy(simulated).double()(*(part.double() for part in inputs))
            with tempfile.TemporaryDirectory() as folder:
                for name, run in exported(simulated, inputs, Path(folder) / "network.onnx").items():
                    runs[f"W{bits}A8 {name}"] = run
    wide = copy.deepcopy(model).to(memory_format=torch.channels_last)

    channels_last = (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
    runs["bfloat16 autocast, channels_last"] = lambda: in_bfloat16(wide, channels_last)
    differences = {}
    for name, run in runs.items():
        output = run()
        if name.startswith(("W4A8", "W8A8")) and exact:
            reference = exact[int(name[1])]
            differences[name] = ((output.double() - reference).norm() / reference.norm()).item()
    times = {name: [] for name in runs}
    for _ in range(args.pairs):
        for name, run in runs.items():
            times[name].append(cpu_time(run))
    base = times["float32"]
    machine = f"{probe.processor()}, instructions of {probe.kind()}"
    print(f"{args.config}, batch {args.batch}, {machine}; float32 {statistics.median(base) * 1e3:.0f} ms")
    for name, values in times.items():
        ratio = statistics.median(value / first for value, first in zip(values, base, strict=True))
        print(
            f"  {name}: {ratio:.3f} x float32"
            + (f", {differences[name]:.1e} from the simulation" if name in differences else "")
        )


if __name__ == "__main__":
    main()
