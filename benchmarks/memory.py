"""Memory, load time and size on disk of the CIFAR-10 network: float32, and a packed W4A8 checkpoint on both engines.

    python benchmarks/memory.py

Random weights. Each line is a process of its own that loads its file and evaluates a batch twice. Its peaks of
anonymous memory (pages that belong to no mapped file) and of resident memory are sampled every 10 ms, minus what it
holds before it loads.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from ddim.config import load_config
from ddim.family import PIXEL, unet_config_dict
from ddim.unet import UNet
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.run import Calibration
from qdiff.checkpoint import PackedInfo, save_packed
from qdiff.config import CalibrationConfig, QuantConfig

ROOT = Path(__file__).resolve().parents[1]
CHILD = """
import sys, time, torch
from safetensors.torch import load_file
from ddim.config import load_config
from ddim.unet import UNet
import qdiff
from ddim.weights import load_unet
torch.set_num_threads(1)
x, t = torch.randn({batch}, 3, 32, 32), torch.full(({batch},), 500.0)
torch.nn.functional.conv2d(x, torch.randn(8, 3, 3, 3))
print("ready", flush=True)
sys.stdin.readline()
start = time.perf_counter()
if {engine!r} == "float32":
    network = load_unet(load_config({config!r}), {file!r}).eval().requires_grad_(False)
else:
    network = qdiff.load({file!r}, device="cpu", engine={engine!r})
print(time.perf_counter() - start, flush=True)
with torch.no_grad():
    for _ in range(2):
        network(x, t)
"""


def memory(pid: int) -> tuple[int, int]:
    """Bytes of (anonymous, resident) memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = [re.search(rf"{name}:\s+(\d+) kB", status) for name in ("RssAnon", "VmRSS")]
    return tuple(int(match[1]) * 1024 if match else 0 for match in found)


def measure(engine: str, file: Path, batch: int) -> tuple[float, int, int]:
    """(seconds to load, peaks of anonymous and of resident memory above the start)."""
    code = CHILD.format(engine=engine, file=str(file), batch=batch, config=str(ROOT / "configs/cifar10.yml"))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "ready"
    before = peak = memory(process.pid)
    process.stdin.write("go\n")
    process.stdin.flush()
    while True:
        try:
            process.wait(0.01)
            break
        except subprocess.TimeoutExpired:
            peak = tuple(map(max, peak, memory(process.pid)))
    assert process.returncode == 0
    return float(process.stdout.readline()), peak[0] - before[0], peak[1] - before[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = load_config(ROOT / "configs/cifar10.yml").model
    network = UNet(config).eval().requires_grad_(False)
    data = CalibrationData((torch.randn(2, 3, 32, 32), torch.tensor([10.0, 900.0])))
    quant = QuantConfig(4, quant_act=True, a_sym=True, split=True, quant_mode="linear")
    with tempfile.TemporaryDirectory() as folder:
        full, packed = Path(folder) / "full.safetensors", Path(folder) / "w4a8.safetensors"
        save_file(network.state_dict(), full)
        quantized = Calibration(network, PIXEL, quant, CalibrationConfig(), data).run()
        save_packed(packed, quantized, PackedInfo(PIXEL.name, unet_config_dict(config), quant, {}, ""))
        for engine, file in (("float32", full), ("simulated", packed), ("integer", packed)):
            seconds, anonymous, resident = measure(engine, file, args.batch)
            size = file.stat().st_size / 1e6
            peaks = f"peak of anonymous memory {anonymous / 1e6:7.1f} MB, resident {resident / 1e6:7.1f} MB"
            print(f"{engine:10} file {size:7.2f} MB   load {seconds:5.2f} s   {peaks}", flush=True)


if __name__ == "__main__":
    main()
