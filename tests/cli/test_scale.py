"""Many images, several processes, and processes that die."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from qdiff.evaluation.features import Extractor, extract
from qdiff.evaluation.images import Selected
from qdiff.utils.memory import peak_memory
from qdiff_cli.images import load_png
from qdiff_cli.runs import sample_missing
from tests.support import commands, tiny

SAMPLE = "sample_diffusion_ddim.py"


SIZE = 96


class Stub:
    """A sampler that draws nothing: image i holds the digits of i. `dies_at`: the call that is interrupted."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.made: Counter[int] = Counter()
        self.calls, self.dies_at = 0, dies_at

    def __call__(self, indices: list[int]) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.made.update(indices)
        images = torch.zeros(len(indices), 3, SIZE, SIZE, dtype=torch.uint8)
        for image, i in zip(images, indices, strict=True):
            image[0, 0, :4] = torch.tensor([i >> 24, i >> 16 & 255, i >> 8 & 255, i & 255], dtype=torch.uint8)
        return images


def simulate(folder: Path, total: int) -> None:
    first, second = Stub(dies_at=total // 64 // 2), Stub()
    with pytest.raises(KeyboardInterrupt):
        sample_missing(folder, total, 64, first)
    early = peak_memory()
    sample_missing(folder, total, 64, second)
    grown = peak_memory() - early
    assert {path.name for path in folder.iterdir()} == {f"{i}.png" for i in range(total)}
    made = first.made + second.made
    assert len(made) == total and set(made.values()) == {1}  # none twice
    seen = {tuple(load_png(folder / f"{i}.png")[0, 0, :4].tolist()) for i in range(total)}
    assert len(seen) == total
    assert grown < total * 3 * SIZE**2 / 4  # the half of the images that is made in this part would be twice that


def test_many_images(tmp_path):
    simulate(tmp_path / "img", 2_000)


class Drawn:
    """Images that are drawn when they are read."""

    name, hash = "drawn", "0"

    def __init__(self, total: int) -> None:
        self.total = total

    def __len__(self) -> int:
        return self.total

    def picture(self, index: int) -> Image.Image:
        return Image.new("RGB", (SIZE, SIZE), (index % 256, 0, 0))


def test_features_of_many_images_need_the_memory_of_a_batch(tmp_path):
    def run(images):
        return images[:, :, 0, 0].float(), images[:, :, 0, 0].float()

    stub = Extractor("stub", "0" * 64, "", run)
    extract(Selected(Drawn(64)), stub, tmp_path / "first")
    early = peak_memory()
    found = extract(Selected(Drawn(4_000)), stub, tmp_path / "second")
    grown = peak_memory() - early
    assert found.features[:, 0].tolist() == [i % 256 for i in range(4_000)]
    assert grown < 4_000 * 3 * SIZE**2 / 4


@pytest.mark.slow
def test_fifty_thousand_images(tmp_path):
    simulate(tmp_path / "img", 50_000)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return tiny.config_file(folder), tiny.weights_file(folder)


def command(files, out: Path, processes: int, images: int, *more: str) -> list[str]:
    config, weights = files
    words = f"--config {config} --ckpt {weights} --timesteps 5 --eta 1 --max_images {images} --threads 1 -l {out}"
    file = commands.REPOSITORY / "scripts" / SAMPLE
    start = commands.torchrun(processes, file) if processes > 1 else [sys.executable, str(file)]
    return [*start, *words.split(), *more]


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("samples/*/img/*.png")}


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes of torchrun in /proc")
def test_a_process_that_dies_loses_only_unfinished_images(files, tmp_path):
    """Two processes, then three, make the images that one makes."""
    images = 200
    process = subprocess.Popen(
        command(files, tmp_path / "a", 2, images), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(content(tmp_path / "a")) < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    process.wait(timeout=120)
    early = content(tmp_path / "a")
    assert 20 <= len(early) < images
    result = subprocess.run(
        command(files, tmp_path / "a", 3, images, "--continue"), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    late = content(tmp_path / "a")
    assert len(late) == images and all(late[name] == bytes_ for name, bytes_ in early.items())
    assert subprocess.run(command(files, tmp_path / "b", 1, images), capture_output=True, timeout=300).returncode == 0
    assert late == content(tmp_path / "b")
