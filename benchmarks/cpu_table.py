"""Products on integers against their simulation, by class of shape: a row of the table in `qdiff/engines/speed.py`.

    python benchmarks/cpu_table.py
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python benchmarks/cpu_table.py
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/cpu_table.py

The second and the third emulate a processor with VNNI and one with neither. One thread, CPU time, W4A8; each line is
the median over runs in turn. Quantizing the input and correcting the result count. Networks are the bundled pixel
network in several widths. The last lines take 8-bit weights and attention operands in two halves of at most 64, which
are exact on every processor, and compare them with float32.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ddim.config import load_config
from ddim.family import PIXEL
from ddim.unet import UNet
from qdiff.architecture import AttentionMatMulSpec
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines import probe
from qdiff.engines.cpu import integer_form, to_integer
from qdiff.layers import QuantConv2d, QuantLinear, QuantMatMul
from qdiff.model import quant_layers
from qdiff.scale_rules import choose_qparams

Runs = Sequence[Callable[[], object]]
QUANT = QuantConfig(4, quant_act=True, a_sym=True, split=True, quant_mode="linear")
ROOT = Path(__file__).resolve().parents[1]
CONVOLUTIONS = ((8, 96, 16, 96), (8, 128, 32, 128), (8, 256, 16, 256), (8, 512, 8, 256), (2, 640, 16, 640))
MAPS = ((512, 256, 256), (2048, 256, 256), (2048, 512, 256), (2048, 320, 1280), (512, 1280, 1280))  # rows, channels
ATTENTIONS = ((16, 1024, 40, 1024), (8, 1024, 32, 1024), (8, 64, 64, 64), (8, 256, 256, 256), (16, 1024, 1024, 40))


def ratios(runs: Runs, repeats: int = 9) -> list[float]:
    """The CPU time of each run relative to that of the first, as the median of runs in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(-2, repeats):
        for values, run in zip(times, runs, strict=True):
            start = time.process_time()
            run()
            if repeat >= 0:
                values.append(time.process_time() - start)
    return [statistics.median(v / first for v, first in zip(values, times[0], strict=True)) for values in times[1:]]


def quantized(layer: nn.Module, kind: type[QuantConv2d] | type[QuantLinear], x: torch.Tensor) -> nn.Module:
    result = kind(layer, 4, 8, True).requires_grad_(False)
    result.init_weight_scales("max")
    result.act_quantizer.set_qparams(*choose_qparams(x, 8, symmetric=True, method="max"))
    result.act_quantizer.enabled = True
    return result


def layers() -> Iterator[tuple[str, Runs]]:
    """(what it is, simulation and integers) of convolutions and linear maps."""
    for n, c, size, out in CONVOLUTIONS:
        x = torch.randn(n, c, size, size)
        layer = quantized(nn.Conv2d(c, out, 3, padding=1), QuantConv2d, x)
        integer = integer_form(layer)
        yield (
            f"convolution {n} x {c} x {size} x {size} to {out}",
            [
                lambda layer=layer, x=x: layer(x),
                lambda integer=integer, x=x: integer(x) + 0,
            ],
        )
    for rows, c, out in MAPS:
        x = torch.randn(rows, c)
        layer = quantized(nn.Linear(c, out), QuantLinear, x)
        integer = integer_form(layer)
        yield f"linear {rows} x {c} to {out}", [lambda layer=layer, x=x: layer(x), lambda i=integer, x=x: i(x)]


def attentions() -> Iterator[tuple[str, Runs]]:
    """The same of attention matmuls."""
    spec = AttentionMatMulSpec(("w", "v"), softmax="w", always_zero=True, follows_a_sym=False)
    for b, m, k, n in ATTENTIONS:
        operands = torch.softmax(torch.randn(b, m, k), 2), torch.randn(b, k, n)
        matmul = spec.make(QUANT, None)
        assert isinstance(matmul, QuantMatMul)
        for q, x in zip(matmul.act_quantizers, operands, strict=True):
            q.set_qparams(*choose_qparams(x, q.n_bits, symmetric=q.symmetric, always_zero=q.always_zero))
            q.enabled = True
        integer = integer_form(matmul)
        yield (
            f"attention {b} x {m} x {k} x {n}",
            [
                lambda matmul=matmul, operands=operands: matmul(*operands),
                lambda integer=integer, operands=operands: integer(*operands),
            ],
        )


def networks() -> Iterator[tuple[str, Runs]]:
    """The same of whole networks."""
    config = load_config(ROOT / "configs/emoji32.yml").model
    for width in (32, 48, 64, 96):
        model = UNet(replace(config, ch=width)).eval().requires_grad_(False)
        for batch in (1, 4):
            inputs = torch.randn(batch, 3, 32, 32), torch.randint(0, 1000, (batch,)).float()
            simulated = Calibration(model, PIXEL, QUANT, CalibrationConfig(), CalibrationData(inputs)).run()
            sizes = [layer.shape.numel() for layer in quant_layers(simulated).values()]
            integer = to_integer(simulated)
            yield (
                f"network of {sum(sizes) // len(sizes)} weights a layer, batch {batch}",
                [
                    lambda network=simulated, inputs=inputs: network(*inputs),
                    lambda network=integer, inputs=inputs: network(*inputs),
                ],
            )


def convolution_halves() -> Iterator[tuple[str, Runs]]:
    """(what it is, float32 and two halves) of convolutions with 8-bit weights."""
    for n, c, size, out in CONVOLUTIONS:
        x, weight = torch.rand(n, c, size, size), torch.randn(out, c, 3, 3)
        q = (x * 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)
        geometry = ([1, 1], [1, 1], [1, 1], 1)
        ones, zeros = torch.ones(out), torch.zeros(out, dtype=torch.int32)
        halves = [
            torch.ops.onednn.qconv_prepack(
                torch.randint(-64, 65, weight.shape, dtype=torch.int8), ones, 1.0, 3, *geometry, list(x.shape)
            )
            for _ in range(2)
        ]

        def both(q=q, halves=halves, ones=ones, zeros=zeros, geometry=geometry) -> torch.Tensor:
            end = (1.0, 0, torch.float32, "none", [], "")
            first, second = (
                torch.ops.onednn.qconv2d_pointwise(q, 1.0, 3, half, ones, zeros, None, *geometry, *end)
                for half in halves
            )
            return first.add_(second)

        yield (
            f"convolution {n} x {c} x {size} x {size} to {out}",
            [
                lambda x=x, w=weight: F.conv2d(x, w, padding=1),
                both,
            ],
        )


def attention_halves() -> Iterator[tuple[str, Runs]]:
    """The same of attention matmuls."""
    for b, m, k, n in ATTENTIONS:
        p, q = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((b, m, k), (b, n, k)))
        high = q >> 1
        halves = (high, q - high)
        result, other = torch.empty(2, b, m, n, dtype=torch.int32)

        def both(p=p, halves=halves, result=result, other=other) -> torch.Tensor:
            for x, y, z, first, second in zip(p, *halves, result, other, strict=True):
                torch._int_mm(x, y.t(), out=first)
                torch._int_mm(x, z.t(), out=second)
            return result.add_(other)

        floats = p.float(), q.float().transpose(1, 2)
        yield f"attention {b} x {m} x {k} x {n}", [lambda floats=floats: torch.matmul(*floats), both]


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{probe.processor()}, instructions of {probe.kind()}")
    for title, cases in (
        ("integers relative to the simulation", (layers, attentions, networks)),
        ("two halves relative to float32", (convolution_halves, attention_halves)),
    ):
        print(title)
        for make in cases:
            for name, runs in make():
                print(f"  {name}: {ratios(runs)[0]:.2f}")


if __name__ == "__main__":
    main()
