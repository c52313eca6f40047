"""NaN and infinity anywhere end in one line that names the place, and no picture of the batch is written."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import commands, tiny, tiny_latent
from tests.support.commands import fails, stops

TEXT_OPTIONS = [
    "--ddim_steps",
    2,
    "--n_samples",
    1,
    "--n_iter",
    1,
    "--threads",
    1,
    "--prompt",
    "red heart",
    "--precision",
    "full",
]


def spoil(state, name, value=float("nan")):
    """`name` with one value spoiled; huge values overflow only where they are used."""
    state[name] = state[name].clone()
    state[name].view(-1)[0] = value
    return state


def pixel(folder, *more):
    words = [
        "--config",
        tiny.config_file(folder),
        "--timesteps",
        3,
        "--max_images",
        2,
        "--threads",
        1,
        "-l",
        folder / "out",
    ]
    return commands.run("sample_diffusion_ddim.py", *words, *more)


def test_a_pixel_checkpoint(tmp_path):
    save_file(spoil(tiny.unet().state_dict(), "mid.block_1.conv1.weight"), tmp_path / "nan.safetensors")
    fails(
        pixel(tmp_path, "--ckpt", tmp_path / "nan.safetensors"),
        "nan.safetensors",
        "mid.block_1.conv1.weight",
        "not finite",
    )
    words = [
        "--config",
        tmp_path / "tiny.yml",
        "--ckpt",
        tmp_path / "nan.safetensors",
        "--timesteps",
        4,
        "--cali_st",
        2,
        "--cali_n",
        2,
    ]
    fails(commands.run("make_calibration_set.py", *words, "-o", tmp_path / "set.pt"), "mid.block_1.conv1.weight")
    assert not list((tmp_path / "out").rglob("*.png")) and not (tmp_path / "set.pt").exists()


@pytest.mark.parametrize(
    "more", [[], ["--ptq", "--weight_bit", 8, "--quant_mode", "linear", "--cali_st", 2, "--cali_n", 2]]
)
def test_a_pixel_network_that_overflows(tmp_path, more):
    state = tiny.unet().state_dict()
    save_file(
        state | {"conv_out.weight": torch.full_like(state["conv_out.weight"], 3e38)}, tmp_path / "huge.safetensors"
    )
    stops(
        pixel(tmp_path, "--ckpt", tmp_path / "huge.safetensors", *more), "the UNet", "first at step 1 of", "not finite"
    )
    words = [
        "--config",
        tmp_path / "tiny.yml",
        "--ckpt",
        tmp_path / "huge.safetensors",
        "--timesteps",
        4,
        "--cali_st",
        2,
        "--cali_n",
        2,
    ]
    fails(commands.run("make_calibration_set.py", *words, "-o", tmp_path / "set.pt"), "the UNet", "first at step 1")
    assert not list((tmp_path / "out").rglob("*.png")) and not (tmp_path / "set.pt").exists()


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return tiny_latent.model_folder(tmp_path_factory.mktemp("text") / "m", "text", scale_by_std=True)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.diffusion_model.out.2.weight", float("nan"), "out.2.weight"),
        ("first_stage_model.decoder.conv_out.weight", float("nan"), "decoder.conv_out.weight"),
        ("first_stage_model.decoder.conv_out.weight", 3e38, "autoencoder"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", float("inf"), "final_layer_norm.weight"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", 3e38, "the UNet"),
        ("scale_factor", float("nan"), "scale_factor"),
    ],
)
def test_each_part_of_a_text_model(text_model, tmp_path, name, value, words):
    state = tiny_latent.state(text_model / "config.yaml")
    if value == 3e38:
        state[name] = torch.full_like(state[name], value)
    tiny_latent.save_as_lightning(tmp_path / "model.ckpt", spoil(state, name, value))
    options = ["--config", text_model / "config.yaml", "--ckpt", tmp_path / "model.ckpt", "--outdir", tmp_path / "out"]
    stops(commands.run("txt2img.py", *TEXT_OPTIONS, *options), words)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_packed_checkpoint(tmp_path):
    bundled = commands.REPOSITORY / "models/ddim/emoji32/w4a8.safetensors"
    shutil.copy(bundled, tmp_path / "q.safetensors")
    from safetensors import safe_open

    with safe_open(bundled, "pt") as file:
        metadata = file.metadata()
    state = load_file(bundled)
    name = next(name for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel())
    save_file(spoil(state, name), tmp_path / "q.safetensors", metadata)
    words = [
        "--config",
        commands.REPOSITORY / "configs/emoji32.yml",
        "--timesteps",
        2,
        "--max_images",
        1,
        "-l",
        tmp_path / "out",
    ]
    words += [
        "--ptq",
        "--weight_bit",
        4,
        "--quant_act",
        "--a_sym",
        "--split",
        "--cali_ckpt",
        tmp_path / "q.safetensors",
    ]
    fails(commands.run("sample_diffusion_ddim.py", *words), "q.safetensors", name)
