"""The latent scripts as users run them: on tiny models with random weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.support import commands, tiny_latent
from tests.support.commands import fails, succeeded

LDM, TEXT = "sample_diffusion_ldm.py", "txt2img.py"
QUICK = ["--cali_st", 2, "--cali_n", 4, "--cali_iters", 1, "--cali_iters_a", 1, "--threads", 1]
NEAREST = ["--quant_mode", "linear", "--cali_st", 2, "--cali_n", 4]
PUBLISHED_LDM = [
    "-r {model} -n 20 --batch_size 10 -c 200 -e 1.0 --seed 41 --ptq --weight_bit 4 -l {out} --cali_ckpt {none}",
    "-r {model} -n 20 --batch_size 10 -c 400 -e 0.0 --seed 41 --ptq --weight_bit 8 --quant_act --act_bit "
    "8 -l {out} --cali_ckpt {none}",
    "-r {model} -n 50000 --batch_size 10 -c 200 -e 1.0 --seed 40 --ptq --weight_bit 4 --quant_mode qdiff --cali_st 20 "
    "--cali_batch_size 32 --cali_n 256 --quant_act --act_bit 8 --a_sym --a_min_max --running_stat "
    "--cali_data_path {none} -l {out}",
]
PUBLISHED_TEXT = [
    "--prompt words --plms --cond --ptq --weight_bit 4 --quant_mode qdiff --no_grad_ckpt --split "
    "--n_samples 5 --outdir {out} "
    "--cali_ckpt {none}",
    "--prompt words --plms --cond --ptq --weight_bit 8 --quant_mode qdiff --no_grad_ckpt --split "
    "--n_samples 5 --quant_act --act_bit 8 "
    "--sm_abit 16 --outdir {out} --cali_ckpt {none}",
    "--prompt words --plms --cond --ptq --weight_bit 4 --quant_mode qdiff --quant_act --act_bit 8 "
    "--cali_st 25 --cali_batch_size 8 "
    "--cali_n 128 --no_grad_ckpt --split --running_stat --sm_abit 16 --cali_data_path {none} --outdir {out}",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("latent")
    made = {
        kind: tiny_latent.model_folder(folder / kind, kind, scale_by_std=True) for kind in ("none", "class", "text")
    }
    (made["text"] / "prompts.txt").write_text("red heart\nflag\nface\n")
    return made


def ldm(model: Path, out: Path, *more: object, images: int = 5):
    return commands.run(
        LDM, "-r", model, "-n", images, "--batch_size", 2, "-c", 4, "--seed", 41, "-l", out, "--threads", 1, *more
    )


def text(model: Path, out: Path, *more: object):
    common = ["--ddim_steps", 4, "--n_samples", 2, "--n_iter", 1]
    given = [] if "--from-file" in more else ["--prompt", "red heart"]
    given += [] if "--laion400m" in more else ["--config", model / "config.yaml"]
    given += [] if {"--ckpt", "--laion400m"} & set(more) else ["--ckpt", model]
    return commands.run(TEXT, *common, *given, "--outdir", out, "--threads", 1, *more)


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.array(Image.open(path)) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("more", [[], ["--dpm"], ["-e", 0.0]])
def test_unconditional_sampling(models, tmp_path, more):
    succeeded(ldm(models["none"], tmp_path, *more))
    run = only(tmp_path / "none/samples")
    images = pixels(run / "img")
    assert list(images) == [f"sample_{i:06d}.png" for i in range(5)]
    stacked = np.load(only(run / "numpy"))["arr_0"]
    assert stacked.shape == (5, 16, 16, 3) and stacked.dtype == np.uint8
    assert all((stacked[i] == image).all() for i, image in enumerate(images.values()))
    assert yaml.safe_load((run / "sampling_config.yaml").read_text())["custom_steps"] == 4


def test_an_interrupted_run_continues_with_the_same_bits(models, tmp_path):
    succeeded(ldm(models["none"], tmp_path))
    run = only(tmp_path / "none/samples")
    before = pixels(run / "img")
    for name in ("sample_000001.png", "sample_000004.png"):
        (run / "img" / name).unlink()
    succeeded(ldm(models["none"], tmp_path, "--continue"))
    after = pixels(run / "img")
    assert list(before) == list(after) and all((before[name] == after[name]).all() for name in before)


def test_classes_and_guidance_change_the_images(models, tmp_path):
    for name, more in {"a": ["--classes", "1"], "b": ["--classes", "2"], "c": ["--classes", "1", "--scale", 3]}.items():
        succeeded(ldm(models["class"], tmp_path / name, *more, images=2))
    images = {name: pixels(only(tmp_path / name / "class/samples") / "img")["sample_000000.png"] for name in "abc"}
    assert (images["a"] != images["b"]).any() and (images["a"] != images["c"]).any()


@pytest.mark.parametrize("split", [["--split"], pytest.param([], marks=pytest.mark.slow)])
def test_calibration_and_both_formats(models, tmp_path, split):
    options = ["--ptq", "--weight_bit", 4, "--quant_act", *split]
    succeeded(ldm(models["none"], tmp_path / "a", *options, *QUICK, images=2))
    run = only(tmp_path / "a/none/samples")
    made = pixels(run / "img")
    for name in ("ckpt.pth", "ckpt.safetensors"):
        succeeded(ldm(models["none"], tmp_path / name, *options, "--cali_ckpt", run / name, images=2))
        again = pixels(only(tmp_path / name / "none/samples") / "img")
        assert all((made[key] == again[key]).all() for key in made)
    wrong = [
        "--ptq",
        "--weight_bit",
        4,
        "--quant_act",
        *([] if split else ["--split"]),
        "--cali_ckpt",
        run / "ckpt.safetensors",
    ]
    fails(ldm(models["none"], tmp_path / "c", *wrong), "split")


def test_packed_files_load_without_the_model(models, tmp_path):
    options = ["--ptq", "--weight_bit", 8, "--quant_act", "--sm_abit", 16, "--split", "--plms"]
    options += ["--quant_mode", "linear"]
    succeeded(text(models["text"], tmp_path / "a", *options, *NEAREST))
    run = only(tmp_path / "a")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(models["text"] / "config.yaml", alone)
    shutil.copy(models["text"] / "prompts.txt", alone)
    packed = run / "ckpt.safetensors"
    succeeded(text(alone, tmp_path / "b", *options, "--ckpt", alone, "--cali_ckpt", packed))
    assert len(pixels(only(tmp_path / "b") / "samples")) == 2
    (run / "stages.safetensors").write_bytes(b"\0" + (run / "stages.safetensors").read_bytes()[1:])
    fails(text(alone, tmp_path / "c", *options, "--ckpt", alone / "none.ckpt", "--cali_ckpt", packed), "sha256")
    (run / "stages.safetensors").unlink()
    fails(text(alone, tmp_path / "c", *options, "--ckpt", alone / "none.ckpt", "--cali_ckpt", packed), "no such file")


def test_text_images_carry_their_settings(models, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("flag\n\nred heart\n")
    succeeded(
        text(models["text"], tmp_path / "out", "--from-file", prompts, "--plms", "--fixed_code", "--precision", "full")
    )
    run = only(tmp_path / "out")
    files = sorted((run / "samples").iterdir())
    assert [file.name for file in files] == [f"{i:05d}.png" for i in range(4)]
    info = [Image.open(file).text for file in files]
    assert [entry["prompt"] for entry in info] == ["flag", "flag", "red heart", "red heart"]
    assert info[0]["seed"] == "42" and json.loads(info[0]["settings"])["scale"] == 7.5
    assert Image.open(run / "grid-0000.png").size[0] > 32


def test_the_calibration_set_holds_both_contexts(models, tmp_path):
    succeeded(text(models["text"], tmp_path, "--ptq", "--quant_act", "--plms", *NEAREST))
    content = torch.load(only(tmp_path) / "calibration_set.pt", weights_only=True)
    assert set(content) == {"xs", "ts", "cs", "ucs"} and len(content["xs"]) == 2
    assert content["cs"][0].shape == content["ucs"][0].shape == (4, 8, 16)
    assert not torch.equal(content["cs"][0], content["ucs"][0])


@pytest.mark.parametrize("command", PUBLISHED_LDM)
def test_published_latent_commands_parse_and_stop_at_the_missing_file(models, tmp_path, command):
    none = tmp_path / "none.pth"
    words = command.format(model=models["none"] / "model.ckpt", out=tmp_path, none=none).split()
    fails(commands.run(LDM, *words), str(none))


@pytest.mark.parametrize("command", PUBLISHED_TEXT)
def test_published_text_commands_parse_and_stop_at_the_missing_files(tmp_path, command):
    none = tmp_path / "none.pth"
    missing = str(none) if "--cali_ckpt" in command else "models/ldm/stable-diffusion-v1/model.ckpt"
    fails(commands.run(TEXT, *command.format(out=tmp_path, none=none).split()), missing)


@pytest.mark.parametrize(
    ("kind", "more", "word"),
    [
        ("none", ["--classes", "1"], "unconditional"),
        ("class", ["--classes", "5"], "0 to 4"),
        ("text", [], "txt2img"),
        ("none", ["nonsense"], "key=value"),
        ("none", ["-c", 2000], "sampling steps"),
        ("none", ["-v", "--dpm"], "--vanilla_sample"),
        ("none", ["model.params.unet_config.target=os.system"], "os.system"),
    ],
)
def test_bad_latent_options_are_one_clear_line(models, tmp_path, kind, more, word):
    fails(ldm(models[kind], tmp_path, *more), word)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--plms", "--ddim_eta", 0.5], "PLMS"),
        (["--H", 17], "multiples of"),
        (["--f", 3], "--f 3"),
        (["--from-file", "nowhere.txt"], "nowhere.txt"),
        (["--laion400m"], "not supported"),
    ],
)
def test_bad_text_options_are_one_clear_line(models, tmp_path, more, word):
    fails(text(models["text"], tmp_path, *more), word)


EMBEDDED = ["--ptq", "--quant_act", "--split", "--threads", 1]


def test_the_bundled_latent_model_runs_quantized(tmp_path):
    folder = commands.REPOSITORY / "models/ldm/emoji64"
    packed = folder / "w8a8.safetensors"
    options = [
        "-n",
        4,
        "--batch_size",
        4,
        "-c",
        10,
        "-e",
        0,
        "--seed",
        1,
        "--weight_bit",
        8,
        *EMBEDDED,
        "--cali_ckpt",
        packed,
    ]
    succeeded(commands.run(LDM, "-r", folder, *options, "-l", tmp_path))
    images = np.stack(list(pixels(only(tmp_path / "emoji64/samples") / "img").values())).astype(float)
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert images.shape == (4, 64, 64, 3) and corners.mean() > 200 and images.std() > 30  # something on white


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_the_bundled_text_model_follows_its_prompt(tmp_path, bits):
    folder = commands.REPOSITORY / "models/ldm/emoji64-text"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red heart\nblue heart\n")
    packed = folder / f"w{bits}a8.safetensors"
    options = [
        "--config",
        folder / "config.yaml",
        "--ckpt",
        folder,
        "--from-file",
        prompts,
        "--plms",
        "--ddim_steps",
        15,
        "--n_iter",
        1,
    ]
    options += [
        "--n_samples",
        2,
        "--precision",
        "full",
        "--weight_bit",
        bits,
        "--sm_abit",
        16,
        *EMBEDDED,
        "--cali_ckpt",
        packed,
    ]
    succeeded(commands.run(TEXT, *options, "--outdir", tmp_path / "out"))
    images = np.stack(list(pixels(only(tmp_path / "out") / "samples").values())).astype(float)
    red, _, blue = images[:, 20:44, 20:44].mean(axis=(1, 2)).T
    assert (red[:2] > blue[:2] + 60).all() and (blue[2:] > red[2:] + 60).all()
