"""Make torchvision importable beside a CPU build of torch.

torchvision's wheel fails on import beside such a build ("operator torchvision::nms does not exist"), and torchmetrics,
transformers and torch-fidelity fail with it. It is enough to declare the two operators that it looks for; this project
calls neither. Call `make_torchvision_importable` before importing one of these packages.
"""

import importlib.util
from functools import cache
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[torch.library.Library] = []  # operators exist only as long as the library that declared them


@cache
def make_torchvision_importable() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` if torchvision's own extension cannot be loaded."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _extension_loads(Path(spec.origin).parent):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    _libraries.append(library)


def _extension_loads(folder: Path) -> bool:
    """Whether torchvision's compiled extension in `folder` loads beside this torch."""
    for extension in folder.glob("_C.*"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
        return True
    return False
