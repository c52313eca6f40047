"""Commands as users run them: in this process (quick), as a process of their own, or as several under torchrun."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

from qdiff_cli.options import run_main

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = {
    "sample_diffusion_ddim.py": "sample_ddim",
    "sample_diffusion_ldm.py": "sample_ldm",
    "make_calibration_set.py": "make_calibration_set",
}


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(name: str, *arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run a script's `main` in this process, with its status and what it printed, as `script` gives them."""
    module = import_module(f"qdiff_cli.commands.{MODULES.get(name, name.removesuffix('.py'))}")
    words, out, err, status = list(map(str, arguments)), io.StringIO(), io.StringIO(), 0
    with environment(env or {}), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_main(module.main, words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1 if end.code else 0
    return subprocess.CompletedProcess([name, *words], status, out.getvalue(), err.getvalue())


def script(
    name: str, *arguments: object, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run a script as a process of its own, for at most `timeout` seconds."""
    command = [sys.executable, str(REPOSITORY / "scripts" / name), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, **(env or {})}, timeout=timeout
    )


def start(name: str, *arguments: object) -> subprocess.Popen:
    """Start a script as a process of its own, to be killed."""
    command = [sys.executable, str(REPOSITORY / "scripts" / name), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPOSITORY)


def torchrun(processes: int, file: str | Path, *arguments: object) -> list[str]:
    """The command that starts a file in several processes, on a port that is free."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        str(file),
        *map(str, arguments),
    ]


def fails(result: subprocess.CompletedProcess, *words: str) -> None:
    """Expect one clear line on stderr, no traceback, and a status that is not 0."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode not in (0, None), result.stdout
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def stops(result: subprocess.CompletedProcess, *words: str) -> None:
    """Expect work that ends with one clear line on stderr after its progress bars, and a status that is not 0."""
    last = result.stderr.rstrip().splitlines()[-1]
    assert result.returncode not in (0, None), result.stdout
    assert last.startswith("error: ") and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in last, last


def succeeded(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, result.stderr
    return result
