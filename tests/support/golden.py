"""The folder of reference numbers: `$QDIFF_GOLDEN`, or `../shared/golden` beside the checkout."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(os.environ.get("QDIFF_GOLDEN") or Path(__file__).resolve().parents[3] / "shared" / "golden")


def require() -> None:
    """Skip the whole test file, as one, where the folder is absent."""
    if not ROOT.is_dir():
        pytest.skip(f"no reference data at {ROOT} (set QDIFF_GOLDEN)", allow_module_level=True)


def path(name: str) -> Path:
    """A file or folder of the reference data; the test is skipped where this one is absent."""
    target = ROOT / name
    if not target.exists():
        pytest.skip(f"no {name} in {ROOT}")
    return target


def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(path(name))


def read_json(name: str):
    return json.loads(path(name).read_text())


def cases(family: str) -> list[str]:
    """Names of the whole-network cases of one family, discovered."""
    return sorted(
        p.parent.name for p in ROOT.glob("cases/*/case.json") if json.loads(p.read_text())["family"] == family
    )


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 error, computed in float64."""
    value, reference = value.double(), reference.double()
    return ((value - reference).norm() / reference.norm().clamp(min=1e-300)).item()
