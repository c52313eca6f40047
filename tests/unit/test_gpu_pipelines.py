"""Networks of diffusers on the integer engine of CUDA, in Triton's interpreter."""

import copy

import pytest
import torch

from tests.support import golden

pytest.importorskip("diffusers", reason="the extra diffusers is not installed")
pytest.importorskip("triton", reason="the package triton is not installed")

from qdiff.engines.gpu.layers import find_obstacles, to_integer
from tests.support import pipelines


def in_double(value):
    """Inputs of a network in float64."""
    if isinstance(value, dict):
        return {name: in_double(part) for name, part in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@torch.no_grad()
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_transformers_are_the_simulation(name):
    pipe = pipelines.quantized(name)
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    pipelines.CASES[name].sample(pipe)
    handle.remove()
    args, kwargs = calls[0]
    expected = copy.deepcopy(pipe.transformer).double()(*map(in_double, args), **in_double(kwargs))[0]
    assert not any(find_obstacles(pipe.transformer).values())
    found = to_integer(pipe.transformer)(*args, **kwargs)[0]
    assert golden.relative_error(found.double(), expected) < 1e-6
