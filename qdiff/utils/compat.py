"""torchvision beside a CPU build of torch.

torchvision's wheel then fails on import ("operator torchvision::nms does not exist") and takes
torchmetrics, transformers and torch-fidelity with it. Declaring the two operators that it looks for
is enough; nothing here calls them. Call `make_torchvision_importable` before importing those packages.
"""

import importlib.util
from functools import cache
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[torch.library.Library] = []  # a library's operators live as long as it does


@cache
def make_torchvision_importable() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` where the real extension cannot load."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _extension_loads(Path(spec.origin).parent):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    _libraries.append(library)


def _extension_loads(folder: Path) -> bool:
    for extension in folder.glob("_C.*"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
        return True
    return False
