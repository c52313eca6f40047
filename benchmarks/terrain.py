"""A network that somebody else trained, quantized by one call: errors, sizes and times.

    pip install --no-deps adaptive-terrain-diffusion==0.4.2
    pip install onnx onnxruntime
    python benchmarks/terrain.py --settings W8A8 W4A8 W8A32 W4A32
    python benchmarks/terrain.py --settings W8A8:fast:rounding='nearest',policy_budget=0

The package has a one-step consistency model (Song et al. 2023, arXiv 2303.01469) of terrain heights; `terrain_unet` has
its network. Each line of the table is one setting, sampled from the same six noises: the relative L2 error and the PSNR
(peak 2) of terrains that are generated (G: one evaluation at sigma 80) and varied (V: the full-precision terrains,
noised with strength 0.5), the size of the packed file, and the CPU time of `qdiff.quantize`. The picture has a row for
full precision and one for each setting. A setting is WxAy[:preset[:name=value,...]], with settings of the recipe or
arguments of `qdiff.quantize` as Python writes them; A32 leaves activations in full precision.
"""

import argparse
import ast
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from terrain_unet import TOLERANCE, make_network, onnx_file, read_weights
from torch import Tensor, nn

import qdiff
from qdiff.errors import ConfigError
from qdiff_cli.comparison import save_image_rows

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5
HEIGHT_RANGE, HEIGHT_SCALE = (
    22.16864013671875,
    0.1,
)  # of the package: terrains are asinh(height / 0.1), scaled to [-1, 1]
STRENGTHS = (0.85, 0.7, 0.5, 0.3, 0.15)  # of the varied terrains among the calibration samples
NUM_TERRAINS = 8  # calibration samples of each strength; twice as many are generated
NUM_NOISES = 6


@dataclass(frozen=True)
class Errors:
    """Errors of generated and of varied terrains against full precision.

    Attributes:
        generated: relative L2 error over all terrains.
        varied: the same of varied terrains.
        generated_psnr: dB, peak 2, from the mean squared error over all terrains.
        varied_psnr: the same of varied terrains.
    """

    generated: float
    varied: float
    generated_psnr: float
    varied_psnr: float


def load_network() -> nn.Module:
    """The trained network in plain PyTorch, checked against onnxruntime.

    Raises:
        ConfigError: a package is missing or has another version, or the network differs from its ONNX file.
    """
    file = onnx_file()
    network = make_network(read_weights(file))
    if (difference := onnx_difference(network, file)) > TOLERANCE:
        raise ConfigError(f"{file.name}: differs by {difference:.1e} from onnxruntime, expected at most {TOLERANCE}")
    return network


@torch.no_grad()
def onnx_difference(network: nn.Module, file: Path) -> float:
    """The relative L2 difference between the network and its ONNX file, for three noise levels."""
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    sigma, difficulty = torch.tensor([SIGMA_MAX, 0.4, 0.01]), torch.tensor([0.0, 0.5, 1.0])
    noisy = torch.randn(3, 1, 128, 128, generator=generator) * sigma[:, None, None, None]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feeds = {"noisy": noisy.numpy(), "sigma": sigma.numpy(), "difficulty": difficulty.numpy()}
    expected = torch.from_numpy(session.run(None, feeds)[0])
    return relative_error(denoise(network, noisy, sigma, difficulty), expected)


def strength_sigma(strength: float) -> float:
    """The noise level that `generate_from` adds for a strength in [0, 1]."""
    return SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** strength


def network_inputs(noisy: Tensor, sigma: Tensor, difficulty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of the network: the scaled terrain [N, 1, 128, 128], t = 250 ln sigma [N], the difficulty [N]."""
    return noisy / (sigma**2 + SIGMA_DATA**2).sqrt()[:, None, None, None], 250 * sigma.log(), difficulty


@torch.no_grad()
def denoise(network: nn.Module, noisy: Tensor, sigma: Tensor, difficulty: Tensor) -> Tensor:
    """The consistency model: a terrain in [-1, 1] from a noisy one.

    Args:
        network: the network, in full precision or quantized.
        noisy: [N, 1, 128, 128].
        sigma: the noise levels, [N].
        difficulty: in [0, 1], [N].
    """
    above = sigma - SIGMA_MIN
    c_skip = SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2)
    c_out = above * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()
    output = network(*network_inputs(noisy, sigma, difficulty))
    return (c_out[:, None, None, None] * output + c_skip[:, None, None, None] * noisy).clamp(-1, 1)


def source(terrain: Tensor) -> Tensor:
    """What `generate_from` makes of a generated terrain: the height of its lowest point becomes 0."""
    full = torch.asinh(torch.tensor(HEIGHT_RANGE / HEIGHT_SCALE))
    heights = torch.sinh((terrain + 1) / 2 * full)
    return torch.asinh(heights - heights.amin(dim=(-2, -1), keepdim=True)) / full * 2 - 1


def generate(network: nn.Module, noise: Tensor, difficulty: Tensor) -> Tensor:
    """Terrains [N, 1, 128, 128] from noise of unit variance."""
    sigma = torch.full((len(noise),), SIGMA_MAX)
    return denoise(network, noise * SIGMA_MAX, sigma, difficulty)


def generate_from(
    network: nn.Module, terrains: Tensor, noise: Tensor, difficulty: Tensor, strength: float = 0.5
) -> Tensor:
    """Variations of terrains [N, 1, 128, 128]."""
    sigma = strength_sigma(strength)
    return denoise(network, source(terrains) + noise * sigma, torch.full((len(noise),), sigma), difficulty)


def calibration_samples(network: nn.Module, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the network as its two samplers meet them: 56 samples from other noises than those of `errors`.

    16 are at sigma 80. The others are generated terrains, noised with each of STRENGTHS.

    Args:
        network: the network in full precision.
        seed: seed of noises and difficulties.

    Returns:
        (x [56, 1, 128, 128], t [56], difficulty [56]).
    """
    generator = torch.Generator().manual_seed(1000 + seed)

    def noise(count: int) -> Tensor:
        return torch.randn(count, 1, 128, 128, generator=generator)

    first, difficulty = noise(2 * NUM_TERRAINS), torch.rand(2 * NUM_TERRAINS, generator=generator)
    terrains = source(generate(network, first[:NUM_TERRAINS], difficulty[:NUM_TERRAINS]))
    parts = [network_inputs(first * SIGMA_MAX, torch.full((len(first),), SIGMA_MAX), difficulty)]
    for sigma in map(strength_sigma, STRENGTHS):
        noisy, levels = terrains + noise(NUM_TERRAINS) * sigma, torch.full((NUM_TERRAINS,), sigma)
        parts.append(network_inputs(noisy, levels, torch.rand(NUM_TERRAINS, generator=generator)))
    x, t, difficulties = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return x, t, difficulties


def sample(network: nn.Module, sources: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Generated and varied terrains from the noises of the table, [6, 1, 128, 128] each.

    Args:
        network: the network, in full precision or quantized.
        sources: the terrains that are varied; None: those that are generated here.
    """
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, NUM_NOISES, 1, 128, 128, generator=generator)
    difficulty = torch.linspace(0, 1, NUM_NOISES)
    generated = generate(network, first, difficulty)
    return generated, generate_from(network, generated if sources is None else sources, second, difficulty)


def relative_error(values: Tensor, reference: Tensor) -> float:
    """||values - reference|| / ||reference||."""
    return ((values - reference).norm() / reference.norm()).item()


def psnr(values: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio of terrains in [-1, 1] in dB."""
    return (10 * torch.log10(4 / (values - reference).square().mean())).item()


def compare(terrains: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> Errors:
    """The errors of (generated, varied) terrains."""
    pairs = list(zip(terrains, reference, strict=True))
    return Errors(*(relative_error(*pair) for pair in pairs), *(psnr(*pair) for pair in pairs))


def errors(network: nn.Module, quantized: nn.Module) -> Errors:
    """The errors of a quantized network over six noises."""
    reference = sample(network)
    return compare(sample(quantized, reference[0]), reference)


def parse_setting(text: str) -> dict[str, Any]:
    """The arguments of `qdiff.quantize` for WxAy[:preset[:name=value,...]]."""
    widths, preset, extra = (*text.split(":", 2), "", "")[:3]
    if not (found := re.fullmatch(r"W(\d+)A(\d+)", widths)):
        raise argparse.ArgumentTypeError(f"{text}: expected WxAy[:preset[:name=value,...]], such as W4A8:fast:iters=40")
    bits, act_bits = int(found[1]), int(found[2])
    arguments: dict[str, Any] = {"weight_bit": bits, "act_bit": None if act_bits == 32 else act_bits}
    if preset:
        arguments["preset"] = preset
    call = ast.parse(f"quantize({extra})", mode="eval").body
    return arguments | {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def packed_bytes(quantized: nn.Module) -> int:
    """The size of the file that `qdiff.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.safetensors"
        qdiff.save(file, quantized)
        return file.stat().st_size


def to_picture(terrains: tuple[Tensor, Tensor]) -> Tensor:
    """uint8 [12, 3, 128, 128]: generated, then varied terrains in gray."""
    return ((torch.cat(terrains) + 1) * 127.5).round().byte().expand(-1, 3, -1, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=["W8A8", "W4A8", "W8A32", "W4A32"])
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration samples")
    parser.add_argument("--picture", type=Path, default=Path("terrain.png"))
    args = parser.parse_args()
    settings = {text: parse_setting(text) for text in args.settings}
    torch.set_num_threads(1)
    network = load_network()
    samples, reference = calibration_samples(network, args.seed), sample(network)
    pictures = {"full precision": to_picture(reference)}
    print("| setting | G | PSNR G | V | PSNR V | MB | CPU s |\n|---|---|---|---|---|---|---|", flush=True)
    for name, arguments in settings.items():
        began = time.process_time()
        quantized = qdiff.quantize(network, samples, **arguments)
        seconds = time.process_time() - began
        terrains = sample(quantized, reference[0])
        found, size = compare(terrains, reference), packed_bytes(quantized) / 1e6
        print(
            f"| {name} | {found.generated:.4f} | {found.generated_psnr:.1f} | {found.varied:.4f} "
            f"| {found.varied_psnr:.1f} | {size:.2f} | {seconds:.0f} |",
            flush=True,
        )
        pictures[name] = to_picture(terrains)
        save_image_rows(args.picture, pictures)


if __name__ == "__main__":
    main()
