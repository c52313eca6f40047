"""Folders of diffusers through the commands: the images of the original layout, and those of diffusers' pipelines."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ddim import diffusers_format as pixel_format
from ddim.samplers import PIXEL_SAMPLERS, PixelSamplerConfig
from ddim.schedule import make_prediction
from ddim.weights import load_unet
from ldm import diffusers_format as latent_format
from ldm.checkpoint import LatentCheckpoint
from ldm.samplers import LATENT_SAMPLERS, Guided, LatentSamplerConfig
from qdiff.checkpoint.diffusers_folder import DiffusersFolder
from qdiff.prediction import EpsNetwork
from qdiff_cli.commands.reproduce import parse as parse_reproduce
from tests.support import commands, tiny_latent
from tests.support import tiny_diffusers as made
from tests.support.commands import fails, succeeded
from tests.support.tiny_diffusers import change, diffusers

PIXEL, LDM, TEXT = "sample_diffusion_ddim.py", "sample_diffusion_ldm.py", "txt2img.py"
PROMPTS = ["red heart", "flag"]


def pixel_yaml(folder: Path, **model) -> Path:
    content = {
        "data": {"dataset": "none", "image_size": 8},
        "model": {"ch": 16, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "norm_groups": 4}
        | {"in_channels": 3, "out_ch": 3, "dropout": 0.1}
        | model,
        "diffusion": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_diffusion_timesteps": 1000},
        "sampling": {"batch_size": 64},
    }
    (folder / "pixel.yml").write_text(yaml.safe_dump(content))
    return folder / "pixel.yml"


AUTOENCODER = {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "norm_groups": 4}
AUTOENCODER |= {"resolution": 16, "in_channels": 3, "out_ch": 3}


def latent_yaml(folder: Path, kind: str, **params) -> Path:
    """`config.yaml` of the tiny unconditional (`latent`) or text model (`text`)."""
    content = tiny_latent.config("text" if kind == "text" else "none", linear_start=0.00085, linear_end=0.012)
    values = content["model"]["params"]
    unet = {"model_channels": 16, "num_res_blocks": 1, "norm_groups": 4, "image_size": 8}
    if kind == "text":
        unet |= {"channel_mult": [1, 2, 2], "attention_resolutions": [1, 2], "num_heads": 2, "context_dim": 16}
        unet |= {"in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "transformer_depth": 1}
        stage = {"embed_dim": 4, "ddconfig": AUTOENCODER | {"z_channels": 4, "double_z": True}}
        values["scale_factor"] = 0.18215
        values["cond_stage_config"]["params"]["layers"] = 2
    else:
        unet |= {"channel_mult": [1, 2], "attention_resolutions": [2], "num_head_channels": 8}
        unet |= {"in_channels": 3, "out_channels": 3}
        stage = {"embed_dim": 3, "n_embed": 40, "ddconfig": AUTOENCODER | {"z_channels": 3, "double_z": False}}
        values["first_stage_config"]["target"] = "ldm.models.autoencoder.VQModelInterface"
        values["channels"] = 3
    values["unet_config"]["params"] = unet
    values["first_stage_config"]["params"] = stage
    values |= params
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def original(folder: Path, diffusers_folder: Path, kind: str) -> Path:
    """The same latent model in the original layout."""
    latent_yaml(folder, kind)
    config = latent_format.resolve_config(None, diffusers_folder)
    tiny_latent.save_as_lightning(folder / "model.ckpt", LatentCheckpoint(diffusers_folder, config).state)
    return folder


def pixel(ckpt: object, out: Path, *more: object):
    words = ["--ckpt", ckpt, "--timesteps", 2, "--eta", 0, "--skip_type", "quad", "--max_images", 2, "--threads", 1]
    return commands.run(PIXEL, *words, "-l", out, *more)


def ldm(model: object, out: Path, *more: object):
    words = ["-r", model, "-n", 2, "--batch_size", 2, "-c", 2, "-e", 0.0, "--seed", 1, "--threads", 1]
    return commands.run(LDM, *words, "-l", out, *more)


def text(ckpt: object, out: Path, *more: object):
    words = ["--ckpt", ckpt, "--prompt", "red heart", "--ddim_steps", 2, "--n_samples", 2, "--n_iter", 1, "--plms"]
    return commands.run(TEXT, *words, "--precision", "full", "--outdir", out, "--threads", 1, *more)


def images(folder: Path) -> list[np.ndarray]:
    found = [np.array(Image.open(path)) for path in sorted(folder.rglob("*.png")) if "grid" not in path.name]
    assert found and all(image.std() > 0 for image in found)
    return found


def same_images(one: Path, other: Path) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(images(one), images(other), strict=True))


# --- against the original layout


def test_pixel_images_are_those_of_the_original_layout(folders, tmp_path, caplog):
    config = pixel_yaml(tmp_path)
    torch.save(pixel_format.read_unet(DiffusersFolder(folders["pixel"])), tmp_path / "original.pth")
    succeeded(pixel(tmp_path / "original.pth", tmp_path / "original", "--config", config))
    succeeded(pixel(folders["pixel"], tmp_path / "folder", "--config", config))
    assert same_images(tmp_path / "original", tmp_path / "folder")
    assert "clip_sample true" in caplog.text  # the sampler of the YAML file does not clip
    succeeded(pixel(folders["pixel"], tmp_path / "alone"))
    assert not same_images(tmp_path / "folder", tmp_path / "alone")
    unclipped = Path(shutil.copytree(folders["pixel"], tmp_path / "unclipped"))
    change(unclipped / "scheduler/scheduler_config.json", clip_sample=False)
    succeeded(pixel(unclipped, tmp_path / "free"))
    assert same_images(tmp_path / "original", tmp_path / "free")


def test_latent_images_are_those_of_the_original_layout(folders, tmp_path):
    succeeded(ldm(original(tmp_path / "model", folders["latent"], "latent"), tmp_path / "original"))
    succeeded(ldm(folders["latent"], tmp_path / "folder"))
    assert same_images(tmp_path / "original", tmp_path / "folder")
    assert (tmp_path / "folder" / "latent" / "samples").is_dir()  # named by the folder


def test_text_images_are_those_of_the_original_layout(folders, tmp_path):
    model = original(tmp_path / "model", folders["text"], "text")
    succeeded(text(model, tmp_path / "original", "--config", model / "config.yaml"))
    succeeded(text(folders["text"], tmp_path / "folder"))
    succeeded(text(folders["text"], tmp_path / "agreeing", "--config", model / "config.yaml"))
    assert same_images(tmp_path / "original", tmp_path / "folder")
    assert same_images(tmp_path / "original", tmp_path / "agreeing")


def test_calibrated_files_of_one_layout_fit_the_other(folders, tmp_path):
    config = pixel_yaml(tmp_path)
    torch.save(pixel_format.read_unet(DiffusersFolder(folders["pixel"])), tmp_path / "original.pth")
    widths = ["--config", config, "--ptq", "--weight_bit", 4, "--quant_act", "--split"]
    quick = ["--cali_st", 1, "--cali_n", 2, "--cali_iters", 1, "--cali_iters_a", 1]
    succeeded(pixel(tmp_path / "original.pth", tmp_path / "calibrated", *widths, *quick))
    for name in ("ckpt.pth", "ckpt.safetensors"):
        (file,) = (tmp_path / "calibrated").rglob(name)
        for layout, ckpt in (("original", tmp_path / "original.pth"), ("folder", folders["pixel"])):
            succeeded(pixel(ckpt, tmp_path / layout / name, *widths, "--cali_ckpt", file))
        assert same_images(tmp_path / "original" / name, tmp_path / "folder" / name)


@pytest.mark.slow
def test_the_words_after_the_dashes_of_compare(folders, tmp_path):
    """Without a YAML file."""
    nearest = ["--ptq", "--weight_bit", 4, "--quant_mode", "linear", "--quant_act", "--cali_st", 1, "--cali_n", 2]
    succeeded(pixel(folders["pixel"], tmp_path / "calibrated", *nearest))
    (file,) = (tmp_path / "calibrated").rglob("ckpt.safetensors")
    words = ["--checkpoints", file, "-o", tmp_path / "report", "--images", 2, "--no_nearest", "--threads", 1]
    after = [PIXEL, "--ckpt", folders["pixel"], "--timesteps", 2, "--max_images", 2]
    result = succeeded(commands.run("compare.py", *words, "--", *after))
    assert "W4A8" in result.stdout


def test_the_words_after_the_dashes_of_reproduce(folders):
    options = parse_reproduce(["--table", "cifar10", "--check", "--", "--ckpt", str(folders["pixel"])])
    assert [found.table.command.ckpt for found in options.commands] == [folders["pixel"]]


@pytest.mark.parametrize("name", ["pixel", "latent", "text2"])
def test_calibration_sets_without_a_yaml_file(folders, tmp_path, name):
    words = ["--ckpt", folders[name], "-o", tmp_path / "set.pt", "--timesteps", 2, "--cali_st", 2, "--cali_n", 2]
    succeeded(commands.run("make_calibration_set.py", *words, "--threads", 1))
    content = torch.load(tmp_path / "set.pt")
    assert len(content["xs"]) == 2 and ("cs" in content) == (name == "text2")


def test_the_log_of_the_run_names_the_file_of_weights(copy, tmp_path):
    for name, sample, part in (("pixel", pixel, "unet"), ("latent", ldm, "vqvae"), ("text", text, "text_encoder")):
        folder = copy(name)
        (file,) = (folder / part).glob("*.safetensors")
        half = file.with_name(file.name.replace(".safetensors", ".fp16.safetensors"))
        shutil.copy(file, half)
        result = succeeded(sample(folder, tmp_path / "out" / name))
        line = f"{folder / part}: the weights are those of {file.name} (beside it: {half.name})"
        (log,) = (tmp_path / "out" / name).rglob("run.log")
        assert result.stderr.count(line) == log.read_text().count(line) == 1


# --- against the pipelines of diffusers


@pytest.fixture
def double():
    """New tensors are float64, as the pipelines of diffusers draw noise in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def noise(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def relative(found: torch.Tensor, expected: np.ndarray) -> float:
    """The relative difference of images in [-1, 1] from those of a pipeline in [0, 1]."""
    shown = (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert expected.std() > 0.01
    return float(np.linalg.norm(shown - expected) / np.linalg.norm(expected))


@torch.no_grad()
def test_pixel_images_are_those_of_the_pipeline(folders, double):
    pipeline = diffusers.DDIMPipeline.from_pretrained(folders["pixel"], dtype=torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    expected = pipeline(batch_size=2, generator=generator, num_inference_steps=10, output_type="np").images
    config = pixel_format.resolve_config(None, folders["pixel"])
    network, prediction = load_unet(config, folders["pixel"]).double(), make_prediction(config.diffusion)
    sampler = PIXEL_SAMPLERS.get("generalized")
    times = sampler.timesteps(PixelSamplerConfig(timesteps=10), 1000)
    denoiser = EpsNetwork(network, prediction, "the UNet")
    found = sampler.clipped(config.clip_x0)(denoiser, noise(3), prediction.alphas_cumprod, times, lambda: noise(3))
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize(("name", "sampler"), [("latent", "ddim"), ("text", "plms"), ("text2", "ddim")])
@torch.no_grad()
def test_latent_images_are_those_of_the_pipeline(folders, double, name, sampler):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[name], dtype=torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    if sampler == "ddim":
        options = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **options)
    config = latent_format.resolve_config(None, folders[name])
    z = noise(config.channels)
    if name == "latent":
        given = {"batch_size": 2, "generator": torch.Generator().manual_seed(3)}
    else:
        given = {"prompt": PROMPTS, "latents": z, "guidance_scale": 7.5, "height": 16, "width": 16}
    expected = pipeline(**given, num_inference_steps=5, output_type="np").images
    checkpoint = LatentCheckpoint(folders[name], config)
    unet, parts = checkpoint.unet().double(), checkpoint.model_parts().double()
    network = unet
    if name != "latent":
        contexts = (parts.cond_stage_model.encode(prompts) for prompts in (PROMPTS, ["", ""]))
        network = Guided(unet, *contexts, 7.5)
    found = LATENT_SAMPLERS.get(sampler)
    times = found.timesteps(LatentSamplerConfig(sampler, 5), config.timesteps)
    denoiser = EpsNetwork(network, config.prediction, "the UNet")
    latents = found.sample(denoiser, z, config.alphas_cumprod, times, lambda: z)
    assert relative(parts.decode(latents), expected) < 1e-5


# --- folders that cannot be used: one line each


def test_a_missing_shard(pipelines, tmp_path):
    folder = made.saved(pipelines["text"], tmp_path / "sharded", max_shard_size="100KB")
    shard = next((folder / "unet").glob("*-00002-of-*"))
    shard.unlink()
    fails(text(folder, tmp_path / "out"), shard.name, "missing")


@pytest.mark.parametrize(
    ("name", "file", "values", "words"),
    [
        ("pixel", "unet/config.json", {"norm_eps": 1e-5}, ["norm_eps 1e-05", "expected 1e-06"]),
        ("latent", "unet/config.json", {"norm_eps": 1e-6}, ["norm_eps 1e-06", "expected 1e-05"]),
        ("text", "scheduler/scheduler_config.json", {"prediction_type": "w"}, ['prediction_type "w"', "v_prediction"]),
        ("text", "model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, ["StableDiffusionXLPipeline"]),
        ("text", "unet/config.json", {"addition_embed_type": "text_time"}, ["addition_embed_type"]),
        ("text", "model_index.json", {"unet": ["no_such_module", "Evil"]}, ["no_such_module.Evil"]),
        ("text", "unet/diffusion_pytorch_model.safetensors", None, ["no weights"]),
    ],
)
def test_bad_folders(copy, tmp_path, name, file, values, words):
    folder = copy(name)
    if values is None:
        (folder / file).unlink()
    else:
        change(folder / file, **values)
    sample = {"pixel": pixel, "latent": ldm, "text": text}[name]
    fails(sample(folder, tmp_path / "out"), str(folder), *words)
    if values is not None:
        set_words = ["--ckpt", folder, "-o", tmp_path / "set.pt"]
        fails(commands.run("make_calibration_set.py", *set_words), *words)


def test_folders_of_another_family(folders, tmp_path):
    fails(pixel(folders["latent"], tmp_path), "LDMPipeline", "DDPMPipeline")
    fails(ldm(folders["pixel"], tmp_path), "DDPMPipeline")
    fails(ldm(folders["text"], tmp_path), "a model with text", "txt2img.py")
    fails(text(folders["latent"], tmp_path), "a model without text", "sample_diffusion_ldm.py")


def test_yaml_files_that_do_not_agree(folders, tmp_path):
    other = pixel_yaml(tmp_path, ch=32)
    fails(pixel(folders["pixel"], tmp_path, "--config", other), "--config", "model.ch 32", "has 16")
    config = latent_yaml(tmp_path / "text", "text", linear_end=0.0195)
    fails(text(folders["text"], tmp_path, "--config", config), "linear_end 0.0195", "has 0.012")
    config = latent_yaml(tmp_path / "text", "text", scale_factor=0.2)
    fails(text(folders["text"], tmp_path, "--config", config), "scale_factor 0.2", "has 0.18215")
    fails(text(folders["text2"], tmp_path, "--config", latent_yaml(tmp_path, "text")), "config.yaml", "text2")
    fails(ldm(folders["latent"], tmp_path, "model.params.linear_end=0.02"), "linear_end=0.02", "folder of diffusers")


def test_no_configuration(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"x")
    fails(pixel(tmp_path / "a.pth", tmp_path), "--config", "YAML file")
    fails(commands.run("make_calibration_set.py", "--ckpt", tmp_path / "a.pth", "-o", tmp_path / "s.pt"), "--config")


# --- repositories of the hub


def offline(cache: Path) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache)}


@pytest.mark.multiprocess
def test_a_repository_in_the_cache_and_one_that_is_not(folders, tmp_path):
    words = ["--timesteps", 2, "--max_images", 2, "--threads", 1, "-l", tmp_path / "out"]
    env = offline(tmp_path / "cache")
    fails(
        commands.script(PIXEL, "--ckpt", "google/ddpm-cifar10-32", *words, env=env), "google/ddpm-cifar10-32", "cache"
    )
    repository = tmp_path / "cache" / "models--tiny--pixel"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folders["pixel"], repository / "snapshots" / ("0" * 40))
    succeeded(commands.script(PIXEL, "--ckpt", "tiny/pixel", *words, env=env))
    (run,) = (tmp_path / "out" / "samples").iterdir()
    assert json.loads((run / "run.json").read_text())["ckpt"] == "tiny/pixel"
    assert len(os.listdir(run / "img")) == 2
