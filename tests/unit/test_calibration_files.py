"""Calibration files of other layouts: an unambiguous one becomes the published layout, any other is one clear line."""

import numpy as np
import pytest
import torch

from qdiff.calibration.data import load_set
from qdiff.errors import CheckpointError

STEPS, SAMPLES, SHAPE, WIDTH = 3, 4, (2, 5, 5), 6
TIMES = [801.0, 401.0, 1.0]


def published(guided: bool = False) -> dict:
    generator = torch.Generator().manual_seed(0)
    content = {
        "xs": [torch.randn(SAMPLES, *SHAPE, generator=generator) for _ in range(STEPS)],
        "ts": [torch.full((SAMPLES,), time) for time in TIMES],
    }
    if guided:
        for name in ("cs", "ucs"):
            context = torch.randn(SAMPLES, 7, WIDTH, generator=generator)
            content[name] = [context] * STEPS
    return content


def one_time_a_step(content):
    return content | {"ts": TIMES}


def one_time_tensor_a_step(content):
    return content | {"ts": torch.tensor(TIMES, dtype=torch.int64)}


def times_of_two_dimensions(content):
    return content | {"ts": [t[:, None] for t in content["ts"]]}


def stacked(content):
    return {name: torch.stack(part) for name, part in content.items()}


def arrays(content):
    return {name: [tensor.numpy() for tensor in part] for name, part in content.items()}


def one_array(content):
    return {name: torch.stack(part).numpy().astype(np.float64) for name, part in content.items()}


def nested_lists(content):
    return {name: [tensor.tolist() for tensor in part] for name, part in content.items()}


def lists_of_rows(content):
    return {name: [list(tensor) for tensor in part] for name, part in content.items()}


def flat(content):
    return {name: torch.cat(part) for name, part in content.items()}


def flat_rows_shuffled_by_step(content):
    """One trajectory after the other."""
    return {name: torch.stack(part).transpose(0, 1).flatten(0, 1) for name, part in content.items()}


def flat_list(content):
    return {name: list(torch.cat(part)) for name, part in content.items()}


def by_trajectory(content):
    return {name: list(torch.stack(part).transpose(0, 1)) for name, part in content.items()}


LAYOUTS = [
    one_time_a_step,
    one_time_tensor_a_step,
    times_of_two_dimensions,
    stacked,
    arrays,
    one_array,
    nested_lists,
    lists_of_rows,
    flat,
    flat_rows_shuffled_by_step,
    flat_list,
    by_trajectory,
]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unambiguous_layouts_are_the_published_one(tmp_path, layout, guided):
    torch.save(layout(published(guided)), tmp_path / "set.pt")
    context_dim = WIDTH if guided else None
    rows = load_set(tmp_path / "set.pt", SHAPE, context_dim).select(STEPS, SAMPLES)
    torch.save(published(guided), tmp_path / "published.pt")
    expected = load_set(tmp_path / "published.pt", SHAPE, context_dim).select(STEPS, SAMPLES)
    assert torch.equal(rows.trajectories, expected.trajectories)
    for found, wanted in zip(rows.inputs, expected.inputs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_one_context_serves_all_rows(tmp_path):
    content = published(guided=True)
    torch.save(content | {"ucs": content["ucs"][0][:1]}, tmp_path / "set.pt")
    *_, context = load_set(tmp_path / "set.pt", SHAPE, WIDTH).select(STEPS, SAMPLES).inputs
    assert torch.equal(context[STEPS * SAMPLES :], content["ucs"][0][:1].expand(STEPS * SAMPLES, -1, -1))


def without_a_sample(content):
    return {name: [part[0][:3], *part[1:]] for name, part in content.items()}


def unequal_flat_rows(content):
    return {name: torch.cat(part)[1:] for name, part in content.items()}


def ragged_lists(content):
    return content | {"xs": [[[[1.0, 2.0], [3.0]]]]}


def spoiled(name):
    def layout(content):
        part = content[name][1].clone()
        part.view(-1)[0] = float("nan")
        return content | {name: [content[name][0], part, content[name][2]]}

    return layout


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (without_a_sample, "3 to 4 samples"),
        (unequal_flat_rows, "3 to 4 samples"),
        (ragged_lists, "nested lists of different lengths"),
        (spoiled("ts"), "ts holds values that are not finite"),
        (spoiled("cs"), "cs holds values that are not finite"),
        (lambda content: content | {"ts": content["ts"][:2]}, "ts 2"),
        (lambda content: content | {"ts": [t[:3] for t in content["ts"]]}, "4 samples with 3 times"),
        (lambda content: content | {"ts": "quad"}, "ts holds str"),
        (lambda content: content | {"ts": 5}, "ts"),
        (lambda content: content | {"xs": {}}, "xs holds dict"),
        (lambda content: content | {"xs": []}, "xs is empty"),
        (lambda content: content | {"xs": [torch.zeros(4)] * 3}, "4 dimensions"),
        (lambda content: content | {"xs": [x[:, :1] for x in content["xs"]]}, r"samples of shape \(1, 5, 5\)"),
        (lambda content: content | {"xs": [(x * 9).to(torch.uint8) for x in content["xs"]]}, "uint8"),
        (
            lambda content: content | {"cs": [c[..., :5] for c in content["cs"]]},
            "contexts of width 5 in cs: expected 6",
        ),
        (lambda content: content | {"ucs": [c[:, :5] for c in content["ucs"]]}, "different lengths"),
        (lambda content: content | {"cs": [c[:, 0] for c in content["cs"]]}, "cs holds"),
        (lambda content: content | {"xs": [np.array(["a", "b"])] * 3}, "expected numbers"),
    ],
)
def test_other_layouts_are_one_clear_line(tmp_path, layout, words):
    torch.save(layout(published(guided=True)), tmp_path / "set.pt", pickle_protocol=2)
    with pytest.raises(CheckpointError, match=words) as raised:
        load_set(tmp_path / "set.pt", SHAPE, WIDTH)
    assert "set.pt" in str(raised.value)
