"""Kinds of mistakes and habits: each is one clear line before any long work, or just works."""

import errno
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from tests.support import commands, tiny, tiny_latent
from tests.support.commands import fails, stops, succeeded

LDM, TEXT, PIXEL = "sample_diffusion_ldm.py", "txt2img.py", "sample_diffusion_ddim.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {kind: tiny_latent.model_folder(folder / kind, kind, scale_by_std=True) for kind in ("none", "text")}
    (made["text"] / "prompts.txt").write_text("red heart\nflag\n")
    return made | {"config": tiny.config_file(folder), "weights": tiny.weights_file(folder)}


def ldm(model, out, *more):
    return commands.run(
        LDM, "-r", model, "-n", 2, "--batch_size", 2, "-c", 3, "--seed", 1, "-l", out, "--threads", 1, *more
    )


def text(model, out, *more, config=None, n_iter=1):
    words = [
        "--config",
        config or model / "config.yaml",
        "--ckpt",
        model,
        "--ddim_steps",
        2,
        "--n_samples",
        2,
        "--n_iter",
        n_iter,
    ]
    return commands.run(TEXT, *words, "--precision", "full", "--outdir", out, "--threads", 1, *more)


def pixel(models, out, *more, images=2, config=None):
    words = [
        "--config",
        config or models["config"],
        "--timesteps",
        4,
        "--max_images",
        images,
        "--threads",
        1,
        "-l",
        out,
    ]
    return commands.run(PIXEL, *words, "--ckpt", models["weights"], *more)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.array(Image.open(path)) for path in sorted(folder.rglob("*.png")) if "grid" not in path.name}


# --- configurations


def nested(path: str, value: object) -> dict:
    tree = value
    for name in reversed(path.split(".")):
        tree = {name: tree}
    return tree


def merged(tree: dict, more: dict) -> dict:
    return tree | {
        name: merged(tree[name], value) if isinstance(value, dict) and isinstance(tree.get(name), dict) else value
        for name, value in more.items()
    }


@pytest.mark.parametrize(
    ("setting", "value", "word"),
    [
        ("diffusion.beta_endd", 0.02, "beta_endd"),
        ("diffusion.beta_schedule", "cosine", "cosine"),
        ("diffusion.parameterization", "velocity", "velocity"),
        ("diffusion.beta_start", "small", "beta_start"),
        ("model.chanels", 3, "chanels"),
        ("model.out_ch", 6, "out_ch 6"),
        ("data.logit_transform", True, "logit_transform"),
        ("data.resolution", 8, "resolution"),
        ("sampling.batchsize", 8, "batchsize"),
        ("training.step", 8, "step"),
        ("sampler.eta", 1, "sampler"),
    ],
)
def test_what_a_pixel_configuration_cannot_mean_is_named(models, tmp_path, setting, value, word):
    content = merged(yaml.safe_load(models["config"].read_text()), nested(setting, value))
    (tmp_path / "changed.yml").write_text(yaml.safe_dump(content))
    fails(pixel(models, tmp_path / "out", config=tmp_path / "changed.yml"), "changed.yml", word)
    words = ["--config", tmp_path / "changed.yml", "--ckpt", models["weights"], "-o", tmp_path / "set.pt"]
    fails(commands.run("make_calibration_set.py", *words), word)


LATENT = [
    ("model.params.scale_facto", 3, "scale_facto"),
    ("model.params.beta_schedule", "cosine", "cosine"),
    ("model.params.rescale_betas_zero_snr", True, "rescale_betas_zero_snr"),
    ("model.params.liner_start", 0.001, "liner_start"),
    ("model.params.parameterization", "w", "parameterization"),
    ("model.params.conditioning_key", "concat", "conditioning_key"),
    ("model.params.timesteps", "many", "timesteps"),
    ("model.params.unet_config.params.num_head", 2, "num_head"),
    ("model.params.unet_config.parms", 2, "parms"),
    ("model.params.first_stage_config.params.embed_dm", 4, "embed_dm"),
    ("model.params.first_stage_config.params.ddconfig.chh", 4, "chh"),
    ("model.parameters", 1, "parameters"),
    ("modle", 1, "modle"),
]


@pytest.mark.parametrize(("setting", "value", "word"), LATENT)
def test_what_a_latent_configuration_cannot_mean_is_named(models, tmp_path, setting, value, word):
    """In the YAML file and on the command line."""
    fails(ldm(models["none"], tmp_path / "out", f"{setting}={value}"), word)
    content = merged(yaml.safe_load((models["none"] / "config.yaml").read_text()), nested(setting, value))
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.yaml").write_text(yaml.safe_dump(content))
    fails(ldm(tmp_path / "m", tmp_path / "out"), "config.yaml", word)
    assert not (tmp_path / "out").exists()


def test_training_keys_of_released_files_are_read_over_but_not_set(models, tmp_path):
    content = merged(
        yaml.safe_load((models["none"] / "config.yaml").read_text()),
        {
            "model": {
                "base_learning_rate": 1e-6,
                "params": {"monitor": "val/loss", "loss_type": "l1", "log_every_t": 200},
            },
            "data": {"target": "main.DataModuleFromConfig"},
            "lightning": {"trainer": {"benchmark": True}},
        },
    )
    shutil.copytree(models["none"], tmp_path / "m")
    (tmp_path / "m/config.yaml").write_text(yaml.safe_dump(content))
    succeeded(ldm(tmp_path / "m", tmp_path / "out"))
    fails(
        ldm(models["none"], tmp_path / "b", "model.params.loss_type=l2"), "model.params.loss_type changes nothing here"
    )


RELEASED = [
    *sorted((commands.REPOSITORY / "configs").glob("*/*.yaml")),
    commands.REPOSITORY / "models/ldm/emoji64/config.yaml",
]


@pytest.mark.parametrize("file", RELEASED, ids=lambda file: file.parent.name)
def test_the_files_that_come_with_the_project_are_read(file):
    from ldm.config import load_config

    if file.name != "txt2img-1p4B-eval.yaml":  # of LAION, whose text tower is refused by name
        assert load_config(file).parameterization == "eps"


def test_a_network_that_predicts_v_is_calibrated_and_sampled(models, tmp_path):
    content = merged(yaml.safe_load(models["config"].read_text()), nested("diffusion.parameterization", "v"))
    (tmp_path / "v.yml").write_text(yaml.safe_dump(content))
    short = ["--cali_st", 2, "--cali_n", 4, "--cali_iters", 2, "--cali_iters_a", 2, "--cali_iters_tune", 2]
    succeeded(pixel(models, tmp_path / "q", "--ptq", "--quant_act", *short, config=tmp_path / "v.yml"))
    succeeded(pixel(models, tmp_path / "v", config=tmp_path / "v.yml"))
    succeeded(pixel(models, tmp_path / "eps"))
    images = {name: pixels(tmp_path / name)["0.png"].astype(int) for name in ("q", "v", "eps")}
    assert abs(images["q"] - images["v"]).mean() < abs(images["eps"] - images["v"]).mean()


# --- options: typed and without effect

QUANTIZED = ["--ptq", "--weight_bit", 4]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--weight_bit", 4], ("--weight_bit 4", "--ptq")),
        (["--quant_act"], ("--quant_act", "--ptq")),
        (["--act_bit", 6], ("--act_bit 6", "--ptq")),
        (["--split"], ("--split", "--ptq")),
        (["--cali_n", 6], ("--cali_n 6", "--ptq")),
        ([*QUANTIZED, "--act_bit", 6], ("--act_bit 6", "--quant_act")),
        ([*QUANTIZED, "--a_sym"], ("--a_sym", "--quant_act")),
        ([*QUANTIZED, "--cali_iters_a", 6], ("--cali_iters_a 6", "--quant_act")),
        ([*QUANTIZED, "--quant_mode", "linear", "--cali_iters", 6], ("--cali_iters 6", "--quant_mode qdiff")),
        ([*QUANTIZED, "--resume_w"], ("--resume_w", "--cali_ckpt")),
        ([*QUANTIZED, "--cali_ckpt", "no.pth", "--cali_iters", 6], ("--cali_iters 6", "--cali_ckpt")),
        ([*QUANTIZED, "--engine", "integer"], ("--engine integer", "--quant_act")),
        (["--engine", "integer"], ("--engine integer", "--ptq")),
        ([*QUANTIZED, "--quant_act", "--engine", "integer_packed", "--device", "cpu"], ("it is for CUDA", "found cpu")),
        (["--sample_type", "dpm_solver", "--eta", 0.5], ("--eta 0.5", "generalized")),
        (["--sample_type", "ddpm_noisy", "--eta", 0.5], ("--eta 0.5", "generalized")),
        (["--sample_type", "dpm_solver", "--skip_type", "quad"], ("--skip_type quad", "uniform")),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(models, tmp_path, more, words):
    fails(pixel(models, tmp_path / "out", *more), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more",
    [
        ["-v", "-c", 5],
        ["-v", "-e", 0.5],
        ["--dpm", "-e", 0.5],
        ["--weight_bit", 4],
        ["--quant_mode", "linear"],
        ["--scale", 3],
    ],
)
def test_an_option_that_would_do_nothing_is_refused_by_the_latent_script(models, tmp_path, more):
    name = {"-c": "--custom_steps", "-e": "--eta"}.get(more[-2], more[-2])
    fails(commands.run(LDM, "-r", models["none"], "-n", 1, "--seed", 1, "-l", tmp_path / "out", *more), name)


@pytest.mark.parametrize(
    "more",
    [
        ["--plms", "--ddim_eta", 0.5],
        ["--dpm", "--ddim_eta", 0.5],
        ["--skip_grid", "--n_rows", 2],
        ["--prompt", "a", "--from-file", commands.REPOSITORY / "README.md"],
        ["--act_bit", 8],
    ],
)
def test_an_option_that_would_do_nothing_is_refused_by_the_text_script(models, tmp_path, more):
    name = next(word for word in ("--ddim_eta", "--n_rows", "--prompt", "--act_bit") if word in more)
    fails(text(models["text"], tmp_path / "out", *more), name)


def test_an_option_that_asks_for_what_happens_anyway_passes(models, tmp_path):
    succeeded(pixel(models, tmp_path / "a", "--sample_type", "dpm_solver", "--eta", 0, "--skip_type", "uniform"))
    succeeded(pixel(models, tmp_path / "b", "--cond", "--resume", "--engine", "simulated"))
    succeeded(text(models["text"], tmp_path / "c", "--plms", "--ddim_eta", 0, "--no_grad_ckpt", "--prompt", "flag"))
    made = pixel(models, tmp_path / "d", *QUANTIZED, "--cali_st", 2, "--cali_n", 4, "--cali_iters", 1)
    succeeded(made)
    packed = next((tmp_path / "d").rglob("ckpt.safetensors"))
    succeeded(pixel(models, tmp_path / "e", *QUANTIZED, "--quant_mode", "qdiff", "--resume", "--cali_ckpt", packed))


# --- prompts


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_prompts_with_a_mark_and_blank_lines_make_the_same_images(models, tmp_path, mark, end):
    (tmp_path / "p.txt").write_bytes(mark + end.join([b"red heart", b"", b"  ", b"flag", b""]))
    succeeded(text(models["text"], tmp_path / "out", "--from-file", tmp_path / "p.txt"))
    succeeded(text(models["text"], tmp_path / "one", "--prompt", "red heart"))
    found, first = pixels(tmp_path / "out"), pixels(tmp_path / "one")
    assert len(found) == 4 and all((found[name] == image).all() for name, image in first.items())
    prompts = [Image.open(path).info["prompt"] for path in sorted((tmp_path / "out").rglob("0*.png"))]
    assert prompts == ["red heart", "red heart", "flag", "flag"]


@pytest.mark.parametrize(
    "content", ["grün".encode("latin-1"), "red heart".encode("utf-16"), b"\x89PNG\r\n\x1a\n\0\0", b"", b" \n\n"]
)
def test_prompts_in_another_encoding_are_one_line(models, tmp_path, content):
    (tmp_path / "p.txt").write_bytes(content)
    fails(text(models["text"], tmp_path / "out", "--from-file", tmp_path / "p.txt"), "p.txt")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images/0.png")
    model = tiny_latent.model_folder(tmp_path / "m", "text")  # its calibration prompts
    (model / "prompts.txt").write_bytes(content)
    words = ["--config", model / "config.yaml", "--ckpt", model, "--timesteps", 2, "--cali_st", 1, "--cali_n", 1]
    fails(commands.run("make_calibration_set.py", *words, "-o", tmp_path / "set.pt"), "prompts.txt")


def test_a_prompt_that_is_too_long_is_shown(models, tmp_path):
    result = succeeded(text(models["text"], tmp_path / "out", "--prompt", "red heart " * 5 + "flag"))
    assert "flag" in result.stderr and "cut off" in result.stderr
    assert "flag" in next((tmp_path / "out").rglob("cut_prompts.txt")).read_text()


def test_a_prompt_that_is_no_text_is_one_line(models, tmp_path):
    fails(text(models["text"], tmp_path / "out", "--prompt", "caf\udce9"), "expected text in UTF-8")


# --- folders, files, environment

NAMES = ["my.model v1.5", "ünï cödé", "-leading", "with'quote\"s", "a=b", "[brackets]*?"]


@pytest.mark.parametrize("name", NAMES, ids=map(ascii, NAMES))
def test_a_folder_with_any_name(models, tmp_path, name):
    shutil.copytree(models["none"], tmp_path / name)
    succeeded(ldm(tmp_path / name, tmp_path / "out" / name))
    assert len(pixels(tmp_path / "out")) == 2
    shutil.copy(models["weights"], tmp_path / name / "w.safetensors")
    words = ["--config", models["config"], "--timesteps", 2, "--max_images", 1, "-l", tmp_path / name, "--threads", 1]
    succeeded(commands.run(PIXEL, *words, "--ckpt", tmp_path / name / "w.safetensors"))
    succeeded(commands.run(PIXEL, *words, "--ckpt", tmp_path / name / "w.safetensors", "--continue"))


def test_a_name_that_is_no_text_is_one_line(models, tmp_path):
    for more in (["--ckpt", tmp_path / "caf\udce9"], ["-l", tmp_path / "caf\udce9"]):
        fails(pixel(models, tmp_path / "out", *more), "expected text in UTF-8")


def test_extra_keys_of_stages_are_named_and_ignored(models, tmp_path, caplog):
    state = tiny_latent.state(models["text"] / "config.yaml")
    state |= {"cond_stage_model.logit_scale": torch.ones(()), "first_stage_model.extra.weight": torch.zeros(1)}
    tiny_latent.save_as_lightning(tmp_path / "model.ckpt", state)
    result = text(models["text"], tmp_path / "out", "--prompt", "flag", "--ckpt", tmp_path / "model.ckpt")
    succeeded(result)
    assert "logit_scale" in caplog.text and "extra.weight" in caplog.text


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "0"}])
def test_leftovers_of_torchrun_are_one_line(models, tmp_path, environment):
    words = [
        "--config",
        models["config"],
        "--ckpt",
        models["weights"],
        "--timesteps",
        2,
        "--max_images",
        1,
        "-l",
        tmp_path / "out",
    ]
    fails(commands.run(PIXEL, *words, env=environment), f"WORLD_SIZE={environment['WORLD_SIZE']}")


def test_another_package_of_the_same_name_is_told(models, tmp_path):
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm/__init__.py").write_text("")
    result = commands.script(LDM, "-r", models["none"], "-n", 1, "--seed", 1, env={"PYTHONPATH": str(tmp_path)})
    fails(result, str(tmp_path), "PYTHONPATH")


def test_a_terminal_without_unicode_gets_replacements(models, tmp_path):
    shutil.copytree(models["none"], tmp_path / "ünï")
    words = ["-r", tmp_path / "ünï", "-n", 1, "-c", 2, "--seed", 1, "-l", tmp_path / "öut"]
    result = commands.script(LDM, *words, env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and "\\xf6ut" in result.stdout, result.stderr


def test_training_does_not_write_into_the_folder_of_another_model(tmp_path):
    for changed in ("a.yml", "b.yml"):
        shutil.copy(commands.REPOSITORY / "configs/emoji32.yml", tmp_path / changed)
    words = ["--emoji", tmp_path / "no.tgz", "--config", tmp_path / "a.yml"]
    fails(commands.run("train_bundled.py", *words), "-o: expected a folder")
    for folder in ("models/ldm/emoji64", "models/ldm/emoji64-text"):
        fails(commands.run("train_bundled.py", *words, "-o", commands.REPOSITORY / folder), "another configuration")
    shutil.copytree(commands.REPOSITORY / "models/ldm/emoji64", tmp_path / "mine")
    (tmp_path / "mine/config.yaml").unlink()
    fails(commands.run("train_bundled.py", *words, "-o", tmp_path / "mine"), "weights of another model")
    config = commands.REPOSITORY / "models/ldm/emoji64-text/config.yaml"
    fails(
        commands.run(
            "train_bundled.py", "--emoji", "no.tgz", "--config", config, "-o", config.parent.with_name("emoji64")
        ),
        "another",
    )
    fails(commands.run("train_bundled.py", *words, "--part", "unet"), "--part")


# --- writing


def test_what_cannot_be_written_is_found_before_the_work(models, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    inside, calls = file / "inside", []
    monkeypatch.setattr("qdiff_cli.commands.make_calibration_set.make_pixel_set", lambda *_: calls.append("drawn"))
    words = ["--config", models["config"], "--ckpt", models["weights"], "--timesteps", 4, "--cali_st", 2]
    fails(commands.run("make_calibration_set.py", *words, "-o", inside / "set.pt"), str(inside))
    fails(commands.run("make_calibration_set.py", *words, "-o", tmp_path), "expected a file")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    monkeypatch.setattr("qdiff_cli.commands.evaluate.evaluate", lambda *_: calls.append("evaluated"))
    for option in ("--output", "--npz", "--save_statistics"):
        words = [tmp_path, "--extractor", "lite0", "--cache", tmp_path / "cache", option, inside / "x.npz"]
        fails(commands.run("evaluate.py", *words), str(inside))
    fails(commands.run("compare.py", "--bundled", "emoji32", "-o", inside), str(inside))
    fails(commands.run("reproduce.py", "--table", "bundled", "--models", "emoji32", "--output", inside), str(inside))
    fails(commands.run("demo.py", "--output", inside), str(inside))
    fails(pixel(models, inside), str(inside))
    assert not calls


def full_at(monkeypatch, place: str, number: int):
    """Let the `number`th call (from 0) of a step of writing, and all after it, find a full disk."""
    owner, name = {
        "create": (tempfile, "mkstemp"),
        "sync": (os, "fsync"),
        "rename": (Path, "replace"),
        "folder": (Path, "mkdir"),
    }[place]
    original, calls = getattr(owner, name), []

    def step(*args, **kwargs):
        calls.append(args)
        if len(calls) > number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, step)
    return calls


SLOW_PLACES = [pytest.param(place, marks=pytest.mark.slow) for place in ("sync", "rename", "folder")]


@pytest.mark.parametrize("place", ["create", *SLOW_PLACES])
def test_a_full_disk_at_any_point_is_one_line(tmp_path, monkeypatch, place):
    """A calibration with its resume log, reports, both formats and images; it continues once there is room."""
    small = {"ch_mult": (1,), "attn_resolutions": ()}
    config, weights = tiny.config_file(tmp_path, ch_mult=[1], attn_resolutions=[]), tmp_path / "small.safetensors"
    save_file(tiny.unet(config=replace(tiny.MODEL, **small)).state_dict(), weights)
    models = {"config": config, "weights": weights}
    short = [
        "--ptq",
        "--weight_bit",
        4,
        "--quant_act",
        "--cali_st",
        2,
        "--cali_n",
        4,
        "--cali_iters",
        1,
        "--cali_iters_a",
        1,
    ]
    with monkeypatch.context() as patch:
        calls = full_at(patch, place, 10**6)
        succeeded(pixel(models, tmp_path / "whole", *short))
        total = len(calls)
    assert total > 1
    points = sorted({0, 1, 2, total // 2, *range(max(0, total - 6), total)})
    for number in points:
        with monkeypatch.context() as patch:
            calls = full_at(patch, place, number)
            result = pixel(models, tmp_path / f"{place}{number}", *short)
            assert len(calls) > number
        assert "Traceback" not in result.stderr
        if result.returncode:
            stops(result, "No space left")
        else:
            assert "report" in result.stderr  # pictures of a calibration that has its checkpoint
    last = tmp_path / f"{place}{points[-1]}"
    succeeded(pixel(models, last, *short, *(["--continue"] if list(last.rglob("run.json")) else [])))
    whole = pixels(tmp_path / "whole")
    assert all((image == whole[name]).all() for name, image in pixels(last).items())


# --- memory, and runs that are extended


def test_sampling_that_runs_out_of_memory_takes_half_a_batch(models, tmp_path, monkeypatch, caplog):
    from ddim.sampling import PixelSampler

    succeeded(pixel(models, tmp_path / "a", "--batch_size", 5, images=10))
    original, tried = PixelSampler.__call__, []

    def limited(self, network, indices, *args, **kwargs):
        tried.append(len(indices))
        if len(indices) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, network, indices, *args, **kwargs)

    monkeypatch.setattr(PixelSampler, "__call__", limited)
    succeeded(pixel(models, tmp_path / "b", "--batch_size", 5, images=10))
    first, second = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert list(first) == list(second) and all(abs(first[name].astype(int) - second[name]).max() <= 1 for name in first)
    assert tried == [5, 3, 2, 1, 2, 2, 1, 2]  # what did not fit is not tried again
    assert [record for record in caplog.messages if "out of memory with a batch" in record] == [
        "out of memory with a batch of 5: continuing with 3",
        "out of memory with a batch of 3: continuing with 2",
    ]
    monkeypatch.setattr(PixelSampler, "__call__", lambda *_, **__: limited(None, None, range(3)))
    stops(pixel(models, tmp_path / "c", "--batch_size", 1, images=1), "out of memory")


def test_a_latent_run_is_extended(models, tmp_path):
    succeeded(ldm(models["none"], tmp_path / "a", "-n", 6))
    succeeded(ldm(models["none"], tmp_path / "b", "-n", 4))
    succeeded(ldm(models["none"], tmp_path / "b", "-n", 6, "--continue"))
    whole, extended = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert len(whole) == 6 and all((whole[name] == extended[name]).all() for name in whole)


def test_a_text_run_is_extended_by_rounds_and_by_prompts(models, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("flag\nred heart\n")
    succeeded(text(models["text"], tmp_path / "a", "--from-file", prompts, n_iter=2))
    succeeded(text(models["text"], tmp_path / "b", "--from-file", prompts))
    succeeded(text(models["text"], tmp_path / "b", "--from-file", prompts, "--continue", n_iter=2))
    whole, extended = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert len(whole) == 8 and all((whole[name] == extended[name]).all() for name in whole)
    prompts.write_text("flag\nred heart\nface\n")
    fails(
        text(models["text"], tmp_path / "b", "--from-file", prompts, "--continue", n_iter=2),
        "00004.png",
        "'flag'",
        "'face'",
    )
    prompts.write_text("flag\nred heart\n")
    succeeded(text(models["text"], tmp_path / "c", "--from-file", prompts))
    prompts.write_text("flag\nred heart\nface\n")
    succeeded(text(models["text"], tmp_path / "c", "--from-file", prompts, "--continue"))
    assert len(pixels(tmp_path / "c")) == 6
