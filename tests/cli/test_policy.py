"""Widths per layer on the command line: --layer_bits and --keep, in a calibration, its files and reports."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ddim.family import PIXEL
from qdiff.checkpoint import PackedFile, PackedInfo, read_tensors, save_packed
from qdiff.config import QuantConfig
from qdiff.layers import MatMul
from qdiff.model import (
    act_quantizers,
    enable_activations,
    init_weights,
    quant_layers,
    quantize_model,
    set_mode_parameters,
)
from tests.support import commands, pictures, tiny
from tests.support.commands import fails, succeeded
from tests.support.quantized import UNET_CONFIG

SAMPLE = "sample_diffusion_ddim.py"
QUANT = ("--ptq", "--weight_bit", 4, "--quant_act", "--a_sym", "--split")
POLICY = ("--layer_bits", "conv_in=A16", "conv_out=W8", "--keep", "temb.*")
SHORT = ("--cali_st", 2, "--cali_n", 8, "--cali_iters_a", 2)
PUBLISHED = (*SHORT, "--cali_iters", 2)
FAST = ("--preset", "fast", *SHORT, "--cali_iters_tune", 2, "--cali_policy_budget", 0)
STORED = (("conv_in", "A16"), ("conv_out", "W8"), ("temb.*", "keep"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {"config": tiny.config_file(folder), "ckpt": tiny.weights_file(folder)}


def sample(model, out, *more):
    words = ("--config", model["config"], "--timesteps", 4, "--max_images", 3, "--threads", 1, "-l", out)
    return commands.run(SAMPLE, *words, *more)


@pytest.fixture(scope="module")
def calibrated(model, tmp_path_factory):
    """The folder of a calibration with widths per layer, and what it printed."""
    out = tmp_path_factory.mktemp("calibrated")
    result = succeeded(sample(model, out, "--ckpt", model["ckpt"], *QUANT, *POLICY, *FAST))
    (folder,) = (out / "samples").iterdir()
    return folder, result.stderr


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("img/*.png")}


def test_a_calibrated_file_gives_the_same_pictures_again(model, calibrated, tmp_path):
    folder, _ = calibrated
    packed = folder / "ckpt.safetensors"
    assert PackedFile.open(packed).info.config.policy == STORED
    tensors = read_tensors(packed)
    assert "temb.dense.0.weight" in tensors and "temb.dense.0.weight_quantizer.integers" not in tensors
    numel = tiny.unet().conv_out.weight.numel()
    assert tensors["conv_out.weight_quantizer.integers"].numel() == numel  # 8 bits
    succeeded(sample(model, tmp_path, *QUANT, "--cali_ckpt", packed))
    assert len(images(folder)) == 3 and images(tmp_path) == images(folder)
    succeeded(sample(model, tmp_path / "a32", "--ptq", "--weight_bit", 4, "--split", "--cali_ckpt", packed))


def test_the_nominal_widths_are_checked_by_name(model, calibrated, tmp_path):
    packed = calibrated[0] / "ckpt.safetensors"
    others = {"--weight_bit": 8, "--act_bit": 16}  # the widths of single layers of the file
    for option, value in others.items():
        words = [*QUANT, option, value, "--cali_ckpt", packed]
        fails(sample(model, tmp_path, *words), f"{option}: the file has", f"called with {value}")


def test_the_published_file_is_missing_and_a_line_says_so_before(model, calibrated, tmp_path):
    folder, printed = calibrated
    assert not (folder / "ckpt.pth").exists()
    line = "no ckpt.pth will be written: the published format cannot hold widths per layer"
    assert line in printed and printed.index(line) < printed.index("calibration:")
    assert line in (folder / "run.log").read_text()
    result = succeeded(sample(model, tmp_path, "--ckpt", model["ckpt"], *QUANT, *PUBLISHED))
    assert list(tmp_path.rglob("ckpt.pth")) and "will be written" not in result.stderr


def test_nearest_rounding_takes_the_widths_too(model, tmp_path):
    words = ("--quant_mode", "linear", "--preset", "fast", *SHORT[:4])
    succeeded(sample(model, tmp_path, "--ckpt", model["ckpt"], *QUANT, *POLICY, *words))
    (made,) = tmp_path.rglob("ckpt.safetensors")
    assert PackedFile.open(made).info.config.policy == STORED and not list(tmp_path.rglob("ckpt.pth"))


def test_an_interrupted_calibration_continues(model, calibrated):
    folder, _ = calibrated
    before = images(folder)
    (folder / "img/1.png").unlink()
    out = folder.parent.parent
    succeeded(sample(model, out, "--ckpt", model["ckpt"], *QUANT, *POLICY, *FAST, "--continue"))
    assert images(folder) == before
    result = sample(model, out, "--ckpt", model["ckpt"], *QUANT, *POLICY[:3], *FAST, "--continue")
    fails(result, "--continue: keep is None now, but was ['temb.*']")


def test_reused_weights_bring_their_widths(model, calibrated, tmp_path):
    packed = calibrated[0] / "ckpt.safetensors"
    words = [*QUANT, "--act_bit", 6, "--resume_w", "--cali_ckpt", packed, "--ckpt", model["ckpt"], *SHORT]
    fails(sample(model, tmp_path, *words), "--resume_w", str(packed), "widths of their own", "--preset fast")
    succeeded(sample(model, tmp_path, *words, "--preset", "fast"))
    (made,) = tmp_path.rglob("ckpt.safetensors")
    config = PackedFile.open(made).info.config
    assert (config.act_bit, config.policy) == (6, STORED)
    old, new = read_tensors(packed), read_tensors(made)
    assert all((old[name] == new[name]).all() for name in old if name.endswith("integers"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--keep", "temb.*"], ("--keep temb.*", "--ptq")),
        ([*QUANT, "--keep", "temb.*", "conv_in"], ("--keep temb.* conv_in: acts only with --preset fast", ".pth")),
        ([*QUANT, "--layer_bits", "conv_in=A16"], ("--layer_bits conv_in=A16", "--preset fast", ".pth")),
        ([*QUANT, *FAST, "--keep", "no.*"], ("--keep 'no.*'", "no layer or attention matmul")),
        ([*QUANT, *FAST, "--keep", "conv_in", "--keep", ""], ("--keep ('', 'keep')", "expected a pattern")),
        ([*QUANT, *FAST, "--keep", "*"], ("--keep: every layer would stay in full precision",)),
        ([*QUANT, *FAST, "--layer_bits", "conv_i=A16"], ("--layer_bits 'conv_i'", "no layer or attention matmul")),
        ([*QUANT, *FAST, "--layer_bits", "conv_in"], ("--layer_bits", "'conv_in'", "PATTERN=WIDTHS")),
        ([*QUANT, *FAST, "--layer_bits", "conv_in=8"], ("--layer_bits", "'8'", "W<bits>A<bits>")),
        ([*QUANT, *FAST, "--layer_bits", "conv_in=W1"], ("--layer_bits", "'W1'", "2 to 16 bits")),
        (["--ptq", *FAST[:6], "--layer_bits", "conv_in=A16"], ("--layer_bits conv_in=A16", "--quant_act")),
        ([*QUANT, "--cali_ckpt", "q.pth", "--keep", "temb.*"], ("--keep temb.*", "acts only in a calibration")),
        (
            [*QUANT, "--cali_ckpt", "q.pth", "--resume_w", "--layer_bits", "conv_in=A16"],
            ("--layer_bits conv_in=A16", "without --resume_w"),
        ),
    ],
)
def test_widths_per_layer_that_cannot_work_are_one_line(model, tmp_path, more, words):
    fails(sample(model, tmp_path, "--ckpt", model["ckpt"], *more), *words)
    assert not list(tmp_path.rglob("img"))


def test_a_value_is_given_at_once_or_one_after_another(model):
    from qdiff_cli.sampling_commands import parse_sampling_command

    start = [SAMPLE, "--config", str(model["config"]), "--ptq", "--preset", "fast"]
    once = parse_sampling_command([*start, "--keep", "a", "b", "--layer_bits", "a=W8", "c=W2A4", "--quant_act"])
    often = parse_sampling_command(
        [*start, "--keep", "a", "--layer_bits", "a=W8", "--keep", "b", "--layer_bits", "c=W2A4", "--quant_act"]
    )
    assert once == often
    assert once.quantization.keep == ("a", "b") and once.quantization.layer_bits == ("a=W8", "c=W2A4")


def test_a_converted_file_keeps_the_widths_or_is_refused(model, calibrated, tmp_path):
    words = ["export.py", "--config", model["config"], *QUANT[1:], "--cali_ckpt", calibrated[0] / "ckpt.safetensors"]
    succeeded(commands.run(*words, "-o", tmp_path / "again.safetensors"))
    first, again = (PackedFile.open(path) for path in (words[-1], tmp_path / "again.safetensors"))
    assert again.info == first.info and again.hashes == first.hashes
    fails(commands.run(*words, "-o", tmp_path / "again.pth"), "again.pth", "published format")
    assert not (tmp_path / "again.pth").exists()
    fails(commands.run(*words, "--keep", "conv_in", "-o", tmp_path / "b.safetensors"), "--keep conv_in: acts only in a")


def smoothed_file(path: Path) -> Path:
    """A packed file of the tiny network with smoothing, and with another bias for when activations are off."""
    network, quant = tiny.unet(), QuantConfig(weight_bit=4, quant_act=True, a_sym=True, split=True)
    model = quantize_model(network, PIXEL, quant)
    generator = torch.Generator().manual_seed(0)
    for layer in quant_layers(model).values():
        layer.smooth(torch.rand(layer.shape[layer.channels], generator=generator) + 0.5)
    init_weights(model, quant.weight_scale_method)
    for quantizer in act_quantizers(model).values():
        quantizer.set_qparams(torch.tensor(0.02), torch.tensor(0.0))
    set_mode_parameters(model, {"conv_in.bias": network.conv_in.bias + 1})
    enable_activations(model, True)
    save_packed(path, model, PackedInfo("pixel", UNET_CONFIG, quant, {}, ""))
    return path


def test_a_converted_file_keeps_smoothing_or_is_refused(model, tmp_path):
    packed = smoothed_file(tmp_path / "smoothed.safetensors")
    words = ["export.py", "--config", model["config"], *QUANT[1:], "--cali_ckpt", packed]
    succeeded(commands.run(*words, "-o", tmp_path / "again.safetensors"))
    old, new = read_tensors(packed), read_tensors(tmp_path / "again.safetensors")
    assert {"conv_in.smoothing", "weights_only.conv_in.bias"} <= old.keys() == new.keys()
    assert all((old[name] == new[name]).all() for name in old)
    for more in ([], ["--ckpt", model["ckpt"]]):
        fails(commands.run(*words, *more, "-o", tmp_path / "again.pth"), "again.pth", "published format", "smoothing")
    assert not (tmp_path / "again.pth").exists()


def test_a_table_refuses_widths_that_its_preset_cannot_store(tmp_path):
    words = ["reproduce.py", "--table", "cifar10", "--reference", tmp_path, "--output", tmp_path]
    for more in (["--keep", "conv_in"], ["--layer_bits", "conv_in=A16"]):
        fails(commands.run(*words, "--", *more), f"{more[0]}: has no effect", "table cifar10", "with --preset fast")


def names_with_counts() -> tuple[str, str]:
    """What the quantized network is called, with activations and without."""
    modules = list(tiny.unet().modules())
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in modules)
    matmuls = sum(isinstance(module, MatMul) for module in modules)
    full = f"W4A8 (4 of {layers + matmuls} layers at other widths)"  # conv_in, conv_out, and two of temb
    return full, f"W4A32 (3 of {layers} layers at other widths)"


@pytest.mark.slow
def test_reports_name_the_nominal_widths_and_count_the_others(model, calibrated, tmp_path):
    command = ["--config", model["config"], "--ckpt", model["ckpt"], "--timesteps", 2, "--batch_size", 2]
    words = ["compare.py", "--checkpoints", calibrated[0] / "ckpt.safetensors", "-o", tmp_path, "--images", 2]
    result = succeeded(commands.run(*words, "--threads", 1, "--", SAMPLE, *command))
    full, weights = names_with_counts()
    for name in (full, f"{full} nearest", weights):
        assert f"| {name} |" in result.stdout


@pytest.mark.slow
def test_tables_name_the_nominal_widths_and_count_the_others(model, tmp_path):
    full, weights = names_with_counts()
    pictures.save(pictures.make(4, 3), tmp_path / "reference")
    words = ["reproduce.py", "--table", "cifar10", "--rows", "q-diffusion-w4a8", "q-diffusion-w4a32", "--images", 2]
    words += ["--trajectory_images", 1, "--reference", tmp_path / "reference", "--extractor", "lite0", "--metrics"]
    words += ["kid", "--preset", "fast", "--output", tmp_path / "out", "--cache", tmp_path / "cache", "--threads", 1]
    command = ["--config", model["config"], "--ckpt", model["ckpt"], "--timesteps", 4]
    result = succeeded(commands.run(*words, "--", *command, *POLICY, *FAST[2:]))
    for name in (full, weights):
        assert f"| Q-Diffusion {name}" in result.stdout
