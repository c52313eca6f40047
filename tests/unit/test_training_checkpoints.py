"""Training checkpoints as full-precision input.

The EMA weights come first, prefixes of wrappers are removed, and a log line says what was taken.
"""

from collections import OrderedDict

import pytest
import torch

from qdiff.checkpoint import read_tensors
from qdiff.errors import CheckpointError


def state(value: float, prefix: str = "") -> OrderedDict:
    return OrderedDict(
        (f"{prefix}{name}", torch.full((2, 3), value)) for name in ("conv_in.weight", "temb.dense.0.bias")
    )


OPTIMIZER = {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
    "param_groups": [{"lr": 1e-4, "params": [0]}],
}


@pytest.mark.parametrize(
    ("content", "value", "words"),
    [
        ([state(1, "module."), OPTIMIZER, 7, 900, state(2)], 2, "the EMA weights, entry 4 of a list of 5"),
        ([state(1, "module."), OPTIMIZER, 7, 900], 1, "the weights, entry 0 of a list of 4"),
        ({"model": state(1), "ema": state(2), "step": 5}, 2, "the EMA weights, 'ema'"),
        ({"model": state(1), "ema": {"decay": 0.99, "shadow": state(2)}}, 2, "the EMA weights, 'ema'"),
        (
            {"model": state(1), "ema": {"shadow_params": [torch.zeros(2)]}},
            1,
            "the weights, 'model' of model, ema; its 'ema' has another form",
        ),
        ({"model": state(1), "ema": state(2, "ema_model.") | state(3, "online_model.")}, 2, "'ema'"),
        (
            {"model_state_dict": state(1), "optimizer_state_dict": OPTIMIZER, "epoch": 3},
            1,
            "the weights, 'model_state_dict'",
        ),
        ({"ema_state_dict": state(2, "module."), "model_state_dict": state(1, "module.")}, 2, "'ema_state_dict'"),
        (state(1, "_orig_mod.module."), 1, ""),
        ({"state_dict": state(1), "global_step": 10}, 1, ""),
    ],
)
def test_the_weights_inside_are_found(tmp_path, caplog, content, value, words):
    torch.save(content, tmp_path / "model.ckpt")
    found = read_tensors(tmp_path / "model.ckpt")
    assert set(found) == set(state(0))
    assert all(tensor.eq(value).all() for tensor in found.values())
    assert words in caplog.text and bool(words) == bool(caplog.text)


@pytest.mark.parametrize(
    "content", [[], [5], {"optimizer": OPTIMIZER}, {"model": OPTIMIZER}, {"model": {}}, torch.zeros(2), "text"]
)
def test_other_contents_are_one_clear_line(tmp_path, content):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="expected a state dict of tensors"):
        read_tensors(tmp_path / "model.ckpt")
