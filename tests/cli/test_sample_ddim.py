"""The scripts as users run them: on the tiny network and on the bundled one."""

import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support import commands, tiny
from tests.support.commands import fails
from tests.support.quantized import UNET_CONFIG, Payload, quantized

SAMPLE = "sample_diffusion_ddim.py"
PUBLISHED = [
    "--config {config} --use_pretrained --timesteps 100 --eta 0 --skip_type quad --ptq --weight_bit 4 "
    "--quant_mode qdiff --split "
    "-l {out} --cali_ckpt {ckpt}",
    "--config {config} --use_pretrained --timesteps 100 --eta 0 --skip_type quad --ptq --weight_bit 4 "
    "--quant_mode qdiff "
    "--quant_act --act_bit 8 --a_sym --split -l {out} --cali_ckpt {ckpt}",
    "--config {config} --use_pretrained --timesteps 100 --eta 0 --skip_type quad --ptq --weight_bit 4 "
    "--quant_mode qdiff --cali_st 20 "
    "--cali_batch_size 32 --cali_n 256 --quant_act --act_bit 8 --a_sym --split --cali_data_path {data} -l {out}",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Configuration, weights and a calibrated checkpoint of the tiny network."""
    from ddim.family import PIXEL
    from qdiff.checkpoint import PackedInfo, save_packed, save_published

    folder = tmp_path_factory.mktemp("tiny")
    unet, model, quant = quantized()
    save_published(folder / "q.pth", model, PIXEL, unet.state_dict(), activations=True)
    save_packed(folder / "q.safetensors", model, PackedInfo("pixel", UNET_CONFIG, quant, {}, ""))
    paths = {"q": folder / "q.pth", "packed": folder / "q.safetensors", "folder": folder}
    return paths | {"config": tiny.config_file(folder), "ckpt": tiny.weights_file(folder)}


def base(files, out, *more, images=6):
    return ["--config", files["config"], "--timesteps", 5, "--max_images", images, "--threads", 1, "-l", out, *more]


def run_folder(out: Path) -> Path:
    (folder,) = (out / "samples").iterdir()
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "img").iterdir()}


@pytest.mark.parametrize("sample_type", ["generalized", "dpm_solver", "ddpm_noisy"])
def test_full_precision_sampling(files, tmp_path, sample_type):
    result = commands.run(SAMPLE, *base(files, tmp_path, "--ckpt", files["ckpt"], "--sample_type", sample_type))
    assert result.returncode == 0, result.stderr
    names = sorted(content(run_folder(tmp_path)))
    assert names == [f"{i}.png" for i in range(6)]
    image = Image.open(run_folder(tmp_path) / "img/0.png")
    assert image.size == (8, 8) and image.mode == "RGB"


def test_interruption_changes_no_bit(files, tmp_path):
    more = ("--ckpt", files["ckpt"], "--eta", 1.0)
    assert commands.run(SAMPLE, *base(files, tmp_path / "a", *more, images=10)).returncode == 0
    whole = content(run_folder(tmp_path / "a"))

    assert commands.run(SAMPLE, *base(files, tmp_path / "b", *more, images=10)).returncode == 0
    folder = run_folder(tmp_path / "b")
    for name in ("1.png", "4.png", "5.png", "9.png"):
        (folder / "img" / name).unlink()
    kept = (folder / "img/0.png").stat().st_mtime_ns
    assert commands.run(SAMPLE, *base(files, tmp_path / "b", *more, "--continue", images=10)).returncode == 0
    assert content(folder) == whole and (folder / "img/0.png").stat().st_mtime_ns == kept


def test_a_killed_run_continues(files, tmp_path):
    arguments = base(files, tmp_path / "a", "--ckpt", files["ckpt"], images=120)
    process = commands.start(SAMPLE, *arguments)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "a").glob("samples/*/img/9.png")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = len(list((tmp_path / "a").glob("samples/*/img/*.png")))
    assert 0 < made < 120
    assert commands.run(SAMPLE, *arguments, "--continue").returncode == 0
    assert commands.run(SAMPLE, *base(files, tmp_path / "b", "--ckpt", files["ckpt"], images=120)).returncode == 0
    assert content(run_folder(tmp_path / "a")) == content(run_folder(tmp_path / "b"))


def test_other_settings_do_not_continue(files, tmp_path):
    assert commands.run(SAMPLE, *base(files, tmp_path, "--ckpt", files["ckpt"], images=1)).returncode == 0
    result = commands.run(SAMPLE, *base(files, tmp_path, "--ckpt", files["ckpt"], "--continue", "--seed", 5, images=1))
    fails(result, "seed is 5", "1234")


def test_calibration_then_both_formats_then_weights_reused(files, tmp_path):
    data = tmp_path / "set.pt"
    made = commands.run(
        "make_calibration_set.py",
        "--config",
        files["config"],
        "--ckpt",
        files["ckpt"],
        "--timesteps",
        8,
        "--cali_st",
        4,
        "--cali_n",
        8,
        "-o",
        data,
    )
    assert made.returncode == 0, made.stderr
    assert len(torch.load(data, weights_only=True)["xs"]) == 4
    quant = ("--ptq", "--weight_bit", 4, "--quant_act", "--a_sym", "--split")
    short = ("--cali_st", 2, "--cali_n", 8, "--cali_iters", 1, "--cali_iters_a", 1, "--cali_batch_size", 4)
    first = commands.run(
        SAMPLE, *base(files, tmp_path / "a", "--ckpt", files["ckpt"], *quant, *short, "--cali_data_path", data)
    )
    assert first.returncode == 0, first.stderr
    folder = run_folder(tmp_path / "a")
    for i, name in enumerate(("ckpt.pth", "ckpt.safetensors")):
        again = commands.run(SAMPLE, *base(files, tmp_path / f"b{i}", *quant, "--cali_ckpt", folder / name, "--resume"))
        assert again.returncode == 0, again.stderr
        assert content(run_folder(tmp_path / f"b{i}")) == content(folder)
    more = ("--act_bit", 6, "--resume_w", "--cali_ckpt", folder / "ckpt.safetensors", "--ckpt", files["ckpt"])
    refused = commands.run(SAMPLE, *base(files, tmp_path / "c", *quant, *short, *more))
    fails(refused, "--cali_iters 1", "--resume_w")  # no rounding is learned
    short = [word for pair in zip(short[::2], short[1::2], strict=True) if pair[0] != "--cali_iters" for word in pair]
    reused = commands.run(SAMPLE, *base(files, tmp_path / "c", *quant, *short, *more))
    assert reused.returncode == 0, reused.stderr
    from qdiff.checkpoint import PackedFile, read_tensors

    assert PackedFile.open(run_folder(tmp_path / "c") / "ckpt.safetensors").info.config.act_bit == 6
    foreign = read_tensors(files["ckpt"])
    torch.save({name: tensor + 1 for name, tensor in foreign.items()}, tmp_path / "foreign.ckpt")
    refused = commands.run(SAMPLE, *base(files, tmp_path / "d", *quant, *short, *more[:-1], tmp_path / "foreign.ckpt"))
    fails(refused, "ckpt.safetensors", "another full-precision checkpoint")
    old, new = (read_tensors(run_folder(tmp_path / part) / "ckpt.safetensors") for part in ("a", "c"))
    assert all(torch.equal(old[name], new[name]) for name in old if name.endswith("integers"))


def test_ptq_alone_generates_the_set_and_calibrates(files, tmp_path):
    short = ("--cali_n", 4, "--cali_iters", 1, "--cali_iters_a", 1)
    result = commands.run(SAMPLE, *base(files, tmp_path, "--ckpt", files["ckpt"], "--ptq", "--quant_act", *short))
    assert result.returncode == 0, result.stderr
    assert {"ckpt.pth", "ckpt.safetensors", "calibration_set.pt", "run.log"} <= {
        p.name for p in run_folder(tmp_path).iterdir()
    }
    assert (
        len(torch.load(run_folder(tmp_path) / "calibration_set.pt", weights_only=True)["xs"]) == 5
    )  # as many as the sampler makes
    assert re.search(r"weights 1/\d+ temb.dense.0: validation loss", (run_folder(tmp_path) / "run.log").read_text())


@pytest.mark.parametrize("command", PUBLISHED)
def test_published_commands_parse_and_stop_at_the_missing_files(tmp_path, command):
    words = command.format(
        config="configs/cifar10.yml", out=tmp_path / "out", ckpt=tmp_path / "no.pth", data=tmp_path / "no.pt"
    )
    fails(commands.run(SAMPLE, *shlex.split(words), env={"XDG_CACHE_HOME": str(tmp_path / "cache")}), "no such file")


def test_offline_without_cached_weights(tmp_path):
    result = commands.run(
        SAMPLE, "--config", "configs/cifar10.yml", "--use_pretrained", "-l", tmp_path / "out",
        env={"XDG_CACHE_HOME": str(tmp_path / "cache"), "https_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip
    fails(result, "no weights at", "cannot be reached")
    assert not list((tmp_path / "out" / "samples").iterdir())


def _evil(folder: Path) -> Path:
    torch.save({"state_dict": {"w": torch.zeros(1)}, "x": Payload(f"touch {folder / 'ran'}")}, folder / "evil.pth")
    return folder / "evil.pth"


def _html(folder: Path) -> Path:
    (folder / "page.pth").write_text("<!doctype html><title>404</title>")
    return folder / "page.pth"


def _truncated(files, folder: Path) -> Path:
    (folder / "cut.pth").write_bytes(files["q"].read_bytes()[:5000])
    return folder / "cut.pth"


QUANT = ("--ptq", "--weight_bit", 4, "--quant_act", "--a_sym", "--split")
BAD = {
    "unknown config": (lambda f, d: ["--config", d / "no.yml"], "no such file"),
    "config of another family": (
        lambda f, d: ["--config", commands.REPOSITORY / "environment.yml"],
        "expected the sections",
    ),
    "width 1": (lambda f, d: ["--ptq", "--weight_bit", 1, "--cali_ckpt", f["q"]], "--weight_bit 1"),
    "width 17": (lambda f, d: ["--ptq", "--weight_bit", 17, "--cali_ckpt", f["q"]], "--weight_bit 17"),
    "no steps": (lambda f, d: ["--ckpt", f["ckpt"], "--timesteps", 0], "--timesteps"),
    "too many steps": (lambda f, d: ["--ckpt", f["ckpt"], "--timesteps", 1001], "--timesteps 1001"),
    "unwritable output": (lambda f, d: ["--ckpt", f["ckpt"], "-l", f["ckpt"]], "cannot be written"),
    "no weights": (lambda f, d: [], "no weights"),
    "wrong width": (lambda f, d: ["--ptq", "--weight_bit", 8, "--split", "--cali_ckpt", f["q"]], "--weight_bit 8"),
    "not split": (lambda f, d: ["--ptq", "--weight_bit", 4, "--cali_ckpt", f["q"]], "--split"),
    "other channels": (
        lambda f, d: ["--config", tiny.config_file(d, ch=32), *QUANT, "--cali_ckpt", f["q"]],
        "expected",
    ),
    "truncated": (lambda f, d: [*QUANT, "--cali_ckpt", _truncated(f, d)], "damaged"),
    "web page": (lambda f, d: [*QUANT, "--cali_ckpt", _html(d)], "HTML"),
    "code": (lambda f, d: [*QUANT, "--cali_ckpt", _evil(d)], "refused"),
    "time steps that are not there": (
        lambda f, d: ["--ckpt", f["ckpt"], "--ptq", "--cali_st", 6],
        "--cali_st 6: the sampler makes only 5",
    ),
    "linear with a learned one": (
        lambda f, d: [*QUANT, "--quant_mode", "linear", "--cali_ckpt", f["packed"]],
        "--quant_mode linear",
    ),
    "text for a checkpoint": (
        lambda f, d: [*QUANT, "--cali_ckpt", commands.REPOSITORY / "README.md"],
        "no pickle of tensors",
    ),
    "unknown option": (lambda f, d: ["--bits", 4], "unrecognized"),
    "quantization without --ptq": (lambda f, d: ["--cali_ckpt", f["q"]], "--ptq"),
    "no such device": (lambda f, d: ["--ckpt", f["ckpt"], "--device", "mps"], "not present"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(files, tmp_path, name):
    make, word = BAD[name]
    fails(commands.run(SAMPLE, *base(files, tmp_path / "out"), *make(files, tmp_path)), word)
    assert not (tmp_path / "ran").exists()


EMBEDDED = commands.REPOSITORY / "models/ddim/emoji32"


def test_the_bundled_model_runs_quantized(tmp_path):
    words = "--config configs/emoji32.yml --use_pretrained --timesteps 2 --skip_type quad --max_images 1"
    quant = [
        "--ptq",
        "--weight_bit",
        4,
        "--quant_act",
        "--a_sym",
        "--split",
        "--cali_ckpt",
        EMBEDDED / "w4a8.safetensors",
    ]
    for i, more in enumerate(([], quant)):
        result = commands.run(SAMPLE, *shlex.split(words), *more, "-l", tmp_path / str(i))
        assert result.returncode == 0, result.stderr
        assert len(content(run_folder(tmp_path / str(i)))) == 1


def test_one_flipped_byte_of_the_bundled_checkpoint_is_named(tmp_path):
    damaged = bytearray((EMBEDDED / "w4a8.safetensors").read_bytes())
    damaged[len(damaged) // 2] ^= 4
    (tmp_path / "w4a8.safetensors").write_bytes(damaged)
    words = [
        "--config",
        "configs/emoji32.yml",
        *QUANT,
        "--cali_ckpt",
        tmp_path / "w4a8.safetensors",
        "-l",
        tmp_path / "out",
    ]
    fails(commands.run(SAMPLE, *words), "sha256")


@pytest.mark.slow
def test_a_killed_calibration_continues(files, tmp_path):
    """Killed half-way, continued by the same command: the same checkpoint, bit for bit; other settings are refused."""
    recipe = [
        "--preset",
        "fast",
        "--cali_st",
        2,
        "--cali_n",
        4,
        "--cali_iters_a",
        3,
        "--cali_iters_tune",
        2,
    ]
    arguments = base(
        files,
        tmp_path / "a",
        "--ckpt",
        files["ckpt"],
        "--ptq",
        "--quant_act",
        "--timestep_groups",
        2,
        *recipe,
        images=1,
    )
    process = commands.start(SAMPLE, *arguments)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "a").glob("samples/*/calibration/0009.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "a").glob("samples/*/ckpt.safetensors"))
    fails(commands.run(SAMPLE, *arguments, "--continue", "--cali_iters_a", 4), "cali_iters_a is 4 now, but was 3")
    assert commands.run(SAMPLE, *arguments, "--continue").returncode == 0
    other = base(files, tmp_path / "b", *arguments[arguments.index("--ckpt") :], images=1)
    assert commands.run(SAMPLE, *other).returncode == 0
    first, second = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    assert (first / "ckpt.safetensors").read_bytes() == (second / "ckpt.safetensors").read_bytes()
    assert {"layers.csv", "layers.png", "units.png", "manifest.jsonl"} <= {
        path.name for path in (first / "calibration").iterdir()
    }
    assert not (first / "ckpt.pth").exists()  # the published format has no timestep groups
