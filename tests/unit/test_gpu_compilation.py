"""The machine code of the Triton kernels, compiled without a GPU in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support.commands import REPOSITORY

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton, which is made for Linux"),
]
INTEGER_MATRIX = ("IMMA", "IGMMA")  # instructions that multiply matrices of int8
SPILLS = ("STL", "LDL")


def compiled(which: str) -> list[dict]:
    """What `tests/support/compile_kernels.py` finds."""
    command = [sys.executable, "-m", "tests.support.compile_kernels", which]
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # the interpreter has no compiler
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(found: list[dict]) -> None:
    """No spills; products on the matrix units; in integer epilogues no product and sum that are rounded once."""
    for code in found:
        label = f"{code['case']} on sm_{code['capability']}: {code}"
        instructions = code["instructions"]
        assert code["stack"] == 0 and not any(name in instructions for name in SPILLS), label
        if code["kernel"] in ("product_kernel", "attention_kernel"):
            assert any(name in instructions for name in INTEGER_MATRIX), label
        if code["kernel"] in ("product_kernel", "finish_kernel"):
            assert "FFMA" not in instructions, label


def test_products_and_attention_compile_to_matrix_instructions_without_spills():
    found = compiled("few")
    assert {(code["capability"], code["kernel"]) for code in found} == {
        (80, "product_kernel"),
        (90, "product_kernel"),
        (90, "finish_kernel"),
        (80, "attention_kernel"),
    }
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_all_launches_compile_without_spills(capability):
    found = compiled(str(capability))
    assert {code["kernel"] for code in found} == {
        f"{name}_kernel" for name in ("product", "finish", "quantize", "norm", "attention")
    }
    check(found)
