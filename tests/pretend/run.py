"""Run pytest on a build of PyTorch without CUDA as if it had CUDA.

    python tests/pretend/run.py GUARD.so ARGUMENTS ...

The guard must be there before anything in libtorch asks for CUDA, so it is loaded between PyTorch's own libraries and
`import torch`.
"""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path


def main() -> int:
    assert "torch" not in sys.modules
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    os.environ["QDIFF_PRETENDED_CUDA"] = "1"
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU tensors inside
    import pytest

    return pytest.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
