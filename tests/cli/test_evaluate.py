"""The evaluating scripts as users run them, on small images and on the bundled models."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qdiff.evaluation.similarity import SIMILARITY_DEFINITION, isolated_pixels
from tests.support import commands, pictures, tiny
from tests.support.commands import fails, succeeded

EMBEDDED = commands.REPOSITORY / "models/ddim/emoji32"
STEPS = 3  # of DDIM, where 50 would show the same
FIGURES = ("fid", "kid", "is", "precision", "recall")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    for seed, name in enumerate("ab"):
        pictures.save(pictures.make(16, seed), folder / name)
    return folder


def options(work: Path, *more: object) -> list[object]:
    return [*more, "--extractor", "lite0", "--cache", work / "cache", "--batch_size", 16, "--threads", 1]


def torchrun(processes: int, name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = commands.torchrun(processes, commands.REPOSITORY / "scripts" / name, *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def figures(path: Path) -> dict:
    return {name: value for name, value in json.loads(path.read_text()).items() if name in FIGURES}


def test_folders_npz_and_statistics_give_the_same_figures(work):
    first = commands.run(
        "evaluate.py",
        *options(work, work / "a", "--reference", work / "b", "--against", work / "b", "--output", work / "one.json"),
        *("--npz", work / "a.npz", "--save_statistics", work / "a_statistics.npz"),
    )
    assert first.returncode == 0, first.stderr
    assert "NOT comparable" in first.stdout and "biased" in first.stdout
    found = json.loads((work / "one.json").read_text())
    assert set(FIGURES) <= set(found) and found["psnr"] < 30 and 0 < found["ssim"] < 1 and found["perceptual"] > 0
    assert found["isolated"] == isolated_pixels(pictures.make(16, 0), pictures.make(16, 1)).sum() > 0
    assert found["identity"] == 0 and SIMILARITY_DEFINITION in first.stdout and "\nisolated " in first.stdout
    with np.load(work / "a.npz") as file:
        assert np.array_equal(file["arr_0"], pictures.make(16, 0).permute(0, 2, 3, 1).numpy())
    second = commands.run(
        "evaluate.py", *options(work, work / "a.npz", "--reference", work / "b", "--output", work / "two.json")
    )
    assert second.returncode == 0, second.stderr
    assert figures(work / "two.json") == figures(work / "one.json")
    third = commands.run(
        "evaluate.py",
        *options(work, work / "b", "--reference", work / "a_statistics.npz", "--output", work / "three.json"),
    )
    assert third.returncode == 0, third.stderr
    assert figures(work / "three.json")["fid"] == pytest.approx(found["fid"], rel=1e-6)


@pytest.mark.multiprocess
def test_the_number_of_processes_changes_nothing(work):
    assert (
        commands.run(
            "evaluate.py", *options(work, work / "a", "--reference", work / "b", "--output", work / "one.json")
        ).returncode
        == 0
    )
    shutil.rmtree(work / "cache")
    result = torchrun(
        2, "evaluate.py", *options(work, work / "a", "--reference", work / "b", "--output", work / "ranks.json")
    )
    assert result.returncode == 0, result.stderr
    assert figures(work / "ranks.json") == figures(work / "one.json")


def with_a_broken_image(work: Path, folder: Path) -> list[object]:
    shutil.copytree(work / "a", folder / "broken")
    (folder / "broken" / "0011.png").write_bytes(b"")
    return [*options(work, folder / "broken", "--reference", work / "b"), "--cache", folder / "cache"]


def test_a_broken_image_is_named(work, tmp_path):
    result = commands.run("evaluate.py", *with_a_broken_image(work, tmp_path))
    assert result.returncode == 1 and "0011.png: a broken image" in result.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_broken_image_of_one_process_ends_all(work, tmp_path):
    result = torchrun(2, "evaluate.py", *with_a_broken_image(work, tmp_path))
    assert result.returncode != 0 and "0011.png: a broken image" in result.stderr


def test_a_sampling_command_is_evaluated(work):
    config, weights = tiny.config_file(work), tiny.weights_file(work)
    command = [
        "sample_diffusion_ddim.py",
        "--config",
        config,
        "--ckpt",
        weights,
        "--timesteps",
        4,
        "--max_images",
        6,
        "-l",
        work / "out",
    ]
    result = commands.run(
        "evaluate.py",
        *options(work, "--reference", work / "b", "--metrics", "kid", "--output", work / "o.json"),
        "--",
        *command,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((work / "o.json").read_text())["count"] == 6
    fails(
        commands.run("evaluate.py", *options(work), "--", "txt2img.py", "--prompt", "x", "--skip_save", *TEXT),
        "--skip_save",
    )
    result = commands.run("evaluate.py", *options(work, "--reference", work / "b"), "--", "nothing.py")
    fails(result, "nothing.py", "sample_diffusion_ddim.py")
    shutil.rmtree(work / "out")
    run = lambda *words: commands.run("evaluate.py", *options(work, *words), "--", *command)  # noqa: E731
    fails(run("--reference", work / "none"), "expected a folder of images")
    result = run("--reference", work / "b", "--count", 7)
    assert result.returncode == 1 and "--count 7: the sampling command makes 6 images" in result.stderr.splitlines()[-1]
    result = run("--reference", work / "b", "--against", work / "a")
    assert result.returncode == 1 and "16 images, expected 6" in result.stderr.splitlines()[-1]
    assert not (work / "out").exists()  # said before the sampling


TEXT = ("--config", "models/ldm/emoji64-text/config.yaml", "--ckpt", "models/ldm/emoji64-text")


def test_bad_evaluations_say_what_is_wrong(work, tmp_path):
    run = lambda *words: commands.run("evaluate.py", *options(work, *words))  # noqa: E731
    fails(run(work / "a", "--count", 17), "16 images", "17")
    fails(run(tmp_path / "none"), "expected a folder of images")
    fails(run(work / "a", "--clip", tmp_path), "missing config.json")
    pictures.save(pictures.make(1, 1), tmp_path / "one")
    fails(run(work / "a", "--reference", tmp_path / "one"), "one: 1 image, expected at least 2")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/data.mdb").write_bytes(b"no database")
    fails(run(work / "a", "--reference", tmp_path / "base"), "not an lmdb database, or a damaged one")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    fails(run(work / "a", "--reference", tmp_path / "other.npz"), "mu [3] and sigma [3, 3], expected [2048]")
    np.savez(tmp_path / "c_clean_train_32.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    fails(
        run(work / "a", "--reference", tmp_path / "c_clean_train_32.npz"),
        "mode clean",
        "expected the Inception extractor",
    )
    pictures.save(pictures.make(15, 1), tmp_path / "fewer")
    fails(run(work / "a", "--against", tmp_path / "fewer"), "15 images, expected 16")
    (tmp_path / "fewer/0014.png").rename(tmp_path / "fewer/0016.png")
    fails(run(work / "a", "--against", tmp_path / "fewer", "--count", 15), "16 stands where", "has 0014")
    fails(run(work / "a", "--metrics", "fid"), "--metrics fid: expected a --reference")
    fails(run(work / "a", "--crop", 8), "--crop: expected images as the --reference")
    fails(run(work / "a", "--prompts", work / "a/0000.png"), "--prompts: expected --clip")
    offline = {"XDG_CACHE_HOME": str(tmp_path), "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    result = commands.run("evaluate.py", work / "a", "--reference", work / "b", "--threads", 1, env=offline)
    fails(result, "weights-inception", "cannot be reached")
    result = commands.run("evaluate.py", *options(work, work / "a", "--reference", "cifar10-train"), env=offline)
    assert result.returncode == 1 and "cifar10-train: not in" in result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    words = [
        "--checkpoints",
        EMBEDDED / "w8a8.safetensors",
        EMBEDDED / "w4a8.safetensors",
        "--images",
        2,
        "--no_nearest",
        "--threads",
        1,
    ]
    command = ["sample_diffusion_ddim.py", "--config", "configs/emoji32.yml", "--use_pretrained", "--skip_type", "quad"]
    result = succeeded(commands.run("compare.py", *words, "-o", folder, "--", *command, "--timesteps", STEPS))
    return folder, result.stdout


def nominal(name):
    """The name of a network without the number of its layers at other widths."""
    return name.partition(" (")[0]


def test_the_comparison_is_written(report):
    folder, shown = report
    assert {
        "index.html",
        "table.md",
        "table.csv",
        "errors.json",
        "images.png",
        "errors.png",
        "ranges.png",
        "shortcuts.png",
    } <= {path.name for path in folder.iterdir()}
    errors = {nominal(name): values for name, values in json.loads((folder / "errors.json").read_text()).items()}
    assert set(errors) == {"W8A32", "W8A8", "W4A32", "W4A8"}
    means = {name: sum(values["eps"]) / STEPS for name, values in errors.items()}
    assert means["W8A32"] < means["W8A8"] < means["W4A8"] < 0.15
    assert errors["W8A8"]["bops"] == pytest.approx(2 * errors["W4A8"]["bops"], rel=0.05)
    assert re.search(r"\| W4A8 \(\d+ of \d+ layers at other widths\) \|", shown) and SIMILARITY_DEFINITION in shown
    assert SIMILARITY_DEFINITION in (folder / "table.md").read_text()
    with (folder / "table.csv").open(newline="") as file:
        lines = {nominal(line["setting"]): line for line in csv.DictReader(file)}
    memory = {name: line["MB"] for name, line in lines.items()}
    for name, values in errors.items():
        shown_figures = int(lines[name]["isolated px"]), lines[name]["identity"]
        assert shown_figures == (values["isolated"], f"{values['identity']:.0%}") and 0 <= values["identity"] <= 1
    assert set(memory) == {"full precision", *errors}
    if sys.platform == "linux":
        assert all(float(megabytes) > 0 for megabytes in memory.values())


def test_the_page_opens_in_a_browser(report, tmp_path):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    page = tmp_path / "page"
    shutil.copytree(report[0], page)
    counting = (
        "<script>addEventListener('load', () => document.body.dataset.seen = "
        "[...document.images].filter(i => i.naturalWidth > 100).length + ' ' + "
        "document.querySelectorAll('tbody tr').length)</script>"
    )
    text = (page / "index.html").read_text()
    (page / "index.html").write_text(text.replace("</body>", counting + "</body>"))
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking "
    quiet += "--disable-component-update --disable-sync"
    command = [browser, "--headless", "--no-sandbox", *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    result = subprocess.run(
        [*command, "--dump-dom", f"file://{page / 'index.html'}"], capture_output=True, text=True, timeout=120
    )
    seen = re.search(r'data-seen="(\d+) (\d+)"', result.stdout)
    assert seen, result.stderr
    assert int(seen[1]) == text.count("<img") == 4
    assert int(seen[2]) == text.count("<tr><td>") > 5


def test_comparison_refuses_what_does_not_fit(tmp_path):
    other = commands.REPOSITORY / "models/ldm/emoji64/w4a8.safetensors"
    command = ["sample_diffusion_ddim.py", "--config", "configs/emoji32.yml", "--use_pretrained"]
    fails(commands.run("compare.py", "--checkpoints", other, "-o", tmp_path, "--", *command), "another network")
    fails(commands.run("compare.py", "-o", tmp_path, "--", *command), "--checkpoints")
    torch.save({}, tmp_path / "published.pth")
    result = commands.run("compare.py", "--checkpoints", tmp_path / "published.pth", "-o", tmp_path, "--", *command)
    fails(result, "expected packed checkpoints; scripts/export.py converts published ones")


def test_a_table_is_filled_and_continued(tmp_path):
    words = [
        "--table",
        "bundled",
        "--models",
        "emoji32",
        "--rows",
        "full-precision",
        "q-diffusion-w4a8",
        "q-diffusion-w4a32",
        "--images",
        3,
    ]
    words += ["--trajectory_images", 2, "--threads", 1, "--output", tmp_path / "out", "--cache", tmp_path / "cache"]
    words += ["--metrics", "kid"]  # each FID takes a second
    words += ["--", "--timesteps", STEPS]
    result = commands.run("reproduce.py", *words)
    assert result.returncode == 0, result.stderr
    assert "3 rows, 3 images, 1 seed(s): sampling" in result.stdout
    content = json.loads((tmp_path / "out/table.json").read_text())["emoji32"]
    assert set(content) == {"full-precision", "q-diffusion-w4a8", "q-diffusion-w4a32"}
    assert (
        content["q-diffusion-w4a32"][0]["trajectory_error"] < content["q-diffusion-w4a8"][0]["trajectory_error"] < 0.15
    )
    assert content["q-diffusion-w4a8"][0]["psnr"] > 10
    with (tmp_path / "out/table.csv").open(newline="") as file:
        lines = {nominal(line["setting"]): line for line in csv.DictReader(file)}
    for row, name in (("q-diffusion-w4a8", "Q-Diffusion W4A8"), ("q-diffusion-w4a32", "Q-Diffusion W4A32")):
        assert lines[name]["isolated px"] == str(content[row][0]["isolated"])
        assert lines[name]["identity"] == f"{content[row][0]['identity']:.0%}"
    assert (tmp_path / "out/table.md").read_text().count(SIMILARITY_DEFINITION) == 1
    assert {"table.md", "table.csv", "index.html", "emoji32.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    images = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("img/*.png")}
    assert len(images) == 3 * 4  # each row, and full precision with another seed as reference
    next(iter(images)).unlink()
    (tmp_path / "out/emoji32/q-diffusion-w4a8/seed0-3/result.json").unlink()
    again = commands.run("reproduce.py", *words)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "out/table.json").read_text())["emoji32"]["q-diffusion-w4a8"][0][
        "kid"
    ] == pytest.approx(content["q-diffusion-w4a8"][0]["kid"], rel=1e-9)
    fewer = commands.run("reproduce.py", *(1 if word == 2 else word for word in words))
    assert fewer.returncode == 0, fewer.stderr
    figures = json.loads((tmp_path / "out/table.json").read_text())["emoji32"]["q-diffusion-w4a8"][0]
    assert figures["trajectory_error"] != content["q-diffusion-w4a8"][0]["trajectory_error"]
    kept = list(images)[1:]
    assert all(path.stat().st_mtime_ns == images[path] for path in kept)


CHECK = shlex.split("--table bundled --models emoji32 --rows q-diffusion-w4a8 --check --threads 1")


@pytest.mark.slow
def test_a_table_is_checked_before_the_long_run(tmp_path):
    words = [*CHECK, "--output", tmp_path]
    result = commands.run("reproduce.py", *words)
    assert result.returncode == 0, result.stderr
    assert "full precision: PASS" in result.stdout and "Q-Diffusion W4A8: PASS" in result.stdout
    assert (tmp_path / "check_emoji32.png").is_file()
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    shutil.copy(commands.REPOSITORY / "models/ldm/emoji64/w4a8.safetensors", wrong / "w4a8.safetensors")
    result = commands.run("reproduce.py", *words, "--checkpoints", wrong)
    assert result.returncode == 1 and "the check failed" in result.stderr.splitlines()[-1]
    assert "Q-Diffusion W4A8: FAIL" in result.stdout and "of the latent family, expected pixel" in result.stdout


@pytest.mark.slow
def test_the_check_sees_a_checkpoint_that_nothing_was_learned_for(tmp_path):
    command = "--config configs/emoji32.yml --use_pretrained --timesteps 20 --skip_type quad --max_images 1 --threads 1"
    command += " --ptq --weight_bit 4 --quant_mode linear --quant_act --a_sym --split --cali_st 4 --cali_n 4"
    result = commands.run("sample_diffusion_ddim.py", *shlex.split(command), "-l", tmp_path / "linear")
    assert result.returncode == 0, result.stderr
    (tmp_path / "given").mkdir()
    shutil.copy(next((tmp_path / "linear").rglob("ckpt.safetensors")), tmp_path / "given" / "w4a8.safetensors")
    words = [*CHECK, "--output", tmp_path]
    result = commands.run("reproduce.py", *words, "--checkpoints", tmp_path / "given")
    assert result.returncode == 1 and "the check failed" in result.stderr.splitlines()[-1]
    assert "Q-Diffusion W4A8: FAIL, trajectory error 0." in result.stdout


@pytest.fixture
def pixel_table(work, tmp_path):
    """The CIFAR-10 table on a tiny network: a function of images, checkpoint and further sampling options."""
    config = tiny.config_file(tmp_path)

    def run(images, weights, *more, seeds=1):
        words = [
            "--table",
            "cifar10",
            "--images",
            images,
            "--trajectory_images",
            2,
            "--threads",
            1,
            "--extractor",
            "lite0",
        ]
        words += [
            "--rows",
            "full-precision",
            "linear-w4a8",
            "q-diffusion-w4a8",
            "q-diffusion-w4a32",
            "--reference",
            work / "b",
        ]
        words += ["--seeds", seeds]
        words += ["--output", tmp_path / "out", "--cache", work / "cache", "--", "--config", config, "--ckpt", weights]
        return commands.run("reproduce.py", *words, "--timesteps", 5, "--cali_st", 3, "--cali_n", 8, *more)

    return run, tmp_path


@pytest.mark.slow
def test_the_table_of_a_paper_is_filled(pixel_table):
    """On a tiny network: calibrations, their reuse, and what does not fit what was begun."""
    run, folder = pixel_table
    weights = tiny.weights_file(folder)
    short = ("--cali_iters", 2, "--cali_iters_a", 2)
    result = run(5, weights, *short)
    assert result.returncode == 0, result.stderr
    assert (
        "calibrations (1)" in result.stdout and "| Q-Diffusion W4A8 |" in result.stdout and "| 4.93 |" in result.stdout
    )
    content = json.loads((folder / "out/table.json").read_text())["cifar10"]
    assert content["q-diffusion-w4a32"][0]["trajectory_error"] < content["q-diffusion-w4a8"][0]["trajectory_error"]
    assert len(list((folder / "out").rglob("ckpt.safetensors"))) == 2  # linear, and one for both rows of Q-Diffusion
    result = run(5, weights, *short)
    assert result.returncode == 0 and "nothing left to sample" in result.stdout
    result = run(5, weights, *short, seeds=2)  # the checkpoints of both methods serve again
    assert result.returncode == 0, result.stderr
    content = json.loads((folder / "out/table.json").read_text())["cifar10"]
    assert all(len(seeds) == 2 for seeds in content.values())
    assert len(list((folder / "out").rglob("ckpt.safetensors"))) == 2
    other = folder / "other.safetensors"
    changed = {name: tensor * 1.01 for name, tensor in tiny.unet().state_dict().items()}
    save_file(changed, other)
    fails(run(5, other, *short), "begun with other options")
    longer = run(4, weights, "--cali_iters", 3, "--cali_iters_a", 2)  # another recipe: not the checkpoint of the first
    assert longer.returncode == 0, longer.stderr
    assert len(list((folder / "out").rglob("ckpt.safetensors"))) == 3  # nearest rounding has no iterations
    shutil.copy(other, weights)  # under the same name
    fails(run(5, weights, *short), "begun with another")


def test_the_table_of_stable_diffusion_takes_captions_and_images_of_any_size(work, tmp_path):
    prompts = ["red heart", "cat face", "flag", "blue heart"]
    entries = [{"id": i, "image_id": i // 2, "caption": prompts[i // 2]} for i in range(8)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": entries}))
    pictures.save(pictures.make(5, 3), tmp_path / "coco")
    pictures.save(pictures.make(5, 3)[:, :, :, :20], tmp_path / "narrow")
    (tmp_path / "narrow/0000.png").rename(tmp_path / "coco/0100.png")
    words = [
        "--table",
        "stable-diffusion",
        "--rows",
        "full-precision",
        "linear-w8a8",
        "--images",
        3,
        "--trajectory_images",
        1,
    ]
    words += [
        "--reference",
        tmp_path / "coco",
        "--crop",
        32,
        "--captions",
        tmp_path / "captions.json",
        "--extractor",
        "lite0",
    ]
    words += ["--threads", 1, "--output", tmp_path / "out", "--cache", work / "cache", "--metrics", "kid"]
    sampling = ["--", *TEXT, "--H", 64, "--W", 64, "--f", 4, "--ddim_steps", 2, "--cali_st", 2, "--cali_n", 2]
    result = commands.run("reproduce.py", *words, *sampling)
    assert result.returncode == 0, result.stderr
    kept = next((tmp_path / "out/stable-diffusion").glob("captions-3-*.txt")).read_text().splitlines()
    assert len(set(kept)) == 3 and set(kept) <= set(prompts)
    entries[0]["caption"] = entries[2]["caption"] = entries[4]["caption"] = entries[6]["caption"] = "another"
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": entries}))
    fails(commands.run("reproduce.py", *words, *sampling), "begun with other options")


def test_bad_tables_say_what_is_wrong(tmp_path):
    run = lambda words: commands.run("reproduce.py", "--output", tmp_path, *shlex.split(words))  # noqa: E731
    fails(run("--table bundled --rows q-diffusion-w3a8"), "q-diffusion-w3a8", "q-diffusion-w4a8")
    fails(run("--table bundled --models emoji16"), "emoji16", "emoji32")
    fails(run("--table lsun-church"), "--reference", "lsun-church")
    fails(run("--table stable-diffusion --reference ."), "--captions")
    fails(run("--table lsun-church --reference qdiff"), "no images")
    fails(run("--table bundled --clip ."), "--clip .: missing config.json")
    for option, hint in (("--max_images 8", "--images"), ("-l x", "--output"), ("--continue", "always continued")):
        fails(run(f"--table bundled --models emoji32 -- {option}"), "belongs to the rows of the table", hint)
    fails(run("--table bundled --models emoji32 -- --engine integer"), "--engine integer: full-precision, linear-w8a32")
    fails(run("--table cifar10 --clip ."), "--clip: the images of cifar10 have no prompts")
    fails(run("--table cifar10 --check --checkpoints nowhere"), "--checkpoints nowhere: expected a folder")
    (tmp_path / "captions.json").write_text('{"annotations": [{"id": 1}]}')
    fails(
        run(f"--table stable-diffusion --reference . --captions {tmp_path / 'captions.json'}"),
        "not a COCO caption file",
    )
