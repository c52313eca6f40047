"""Fixtures for the tests of the engines."""

import pytest

from qdiff.engines import cpu_kernels, probe


@pytest.fixture
def integer_path(monkeypatch):
    """Run the integer path on every processor, whatever the probe says.

    Its logic is the same everywhere; only 8-bit numbers can be wrong.
    """
    monkeypatch.setattr(probe, "why_unavailable", lambda: None)
    monkeypatch.setattr(probe, "largest_exact_weight", lambda: probe.LARGEST_BYTE)
    monkeypatch.setattr(probe, "attention_is_exact", lambda: True)


@pytest.fixture(params=["compiled", "plain"])
def operators(request, monkeypatch):
    """The fused operators, compiled and in plain PyTorch."""
    if request.param == "compiled" and cpu_kernels.library() is None:
        pytest.skip("no C++ compiler")
    if request.param == "plain":
        monkeypatch.setattr(cpu_kernels, "library", lambda: None)
    return request.param
