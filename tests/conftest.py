"""Shared fixtures and settings. The folder of a test says its kind: `unit`, `cli`, `golden` or `gpu`."""

import os
import shutil
from pathlib import Path

import pytest

# before NumPy is imported: its sums depend on the number of threads, as PyTorch's do
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from tests.support import tiny
from tests.support.commands import REPOSITORY

KINDS = ("unit", "cli", "golden", "gpu")

torch.set_num_threads(1)  # the networks are tiny: more threads only wait for one another
# for the processes that tests start, so that an installation is not needed
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_configure(config: pytest.Config) -> None:
    """Let Triton's kernels run in its interpreter, on the CPU, except in the tests of a GPU."""
    os.environ.setdefault("TRITON_INTERPRET", "0" if config.option.markexpr == "gpu" else "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the folder that it is in."""
    root = Path(__file__).parent
    for item in items:
        kind = item.path.relative_to(root).parts[0] if item.path.is_relative_to(root) else ""
        if kind in KINDS:
            item.add_marker(kind)


@pytest.fixture(autouse=True)
def one_thread():
    """Commands set the number of threads of the process that they run in."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def network():
    """The tiny pixel UNet; tests must not change it."""
    return tiny.unet()


@pytest.fixture(scope="session")
def rows(network):
    """Calibration samples of the tiny pixel UNet: 4 time steps, 16 of each."""
    return tiny.rows(network)


@pytest.fixture(scope="session")
def pipelines():
    """Tiny pipelines of diffusers, by kind; tests must not change them."""
    from tests.support import tiny_diffusers as made

    return {
        "pixel": made.pixel_pipeline(),
        "latent": made.latent_pipeline(),
        "text": made.text_pipeline(),
        "text2": made.text_pipeline(second=True),
    }


@pytest.fixture(scope="session")
def folders(pipelines, tmp_path_factory):
    """The folders that they are saved in, by kind; tests must not change them."""
    from tests.support import tiny_diffusers

    root = tmp_path_factory.mktemp("folders")
    return {name: tiny_diffusers.saved(pipeline, root / name) for name, pipeline in pipelines.items()}


@pytest.fixture
def copy(folders, tmp_path):
    """Copies a folder, which a test may change."""

    def of(name: str) -> Path:
        return Path(shutil.copytree(folders[name], tmp_path / name))

    return of
