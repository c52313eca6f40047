"""All paths on a pretended CUDA device, in a process of their own (`tests/pretend`)."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.commands import REPOSITORY

FOLDER = REPOSITORY / "tests" / "pretend"


def guard() -> Path:
    """The compiled guard, from the cache or compiled now (6 s)."""
    source = FOLDER / "guard.cpp"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    key = hashlib.sha256(source.read_bytes() + f"{compiler} {torch.__version__}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdiff"
    path = cache / f"guard-{key}.so"
    if not path.is_file():
        spec = importlib.util.find_spec("torch")
        assert spec is not None and spec.origin is not None
        root = Path(spec.origin).parent
        cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        includes = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include", f"-L{root}/lib"]
        flags = ["-O1", "-std=c++20", "-shared", "-fPIC", *includes]
        subprocess.run([*compiler.split(), *flags, str(source), "-o", str(temporary)], check=True)
        temporary.replace(path)
    return path


@pytest.mark.multiprocess
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this build of PyTorch has CUDA: `make test-gpu` tests it")
@pytest.mark.skipif(sys.platform != "linux", reason="the guard is loaded in the way of Linux")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_all_paths_run_on_a_pretended_device(chosen):
    """The slow ones count the memory of full-size networks."""
    command = [sys.executable, str(FOLDER / "run.py"), str(guard()), "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-m", chosen, str(FOLDER)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=REPOSITORY)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-1000:]
    assert "skipped" not in result.stdout.splitlines()[-1]
