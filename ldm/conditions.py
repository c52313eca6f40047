"""What latents are conditioned on: prompts or classes, as contexts for the images of a batch."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ldm.checkpoint import Stages
from qdiff.config import ConfigError

Conditions = Callable[[Sequence[int]], tuple[Tensor, Tensor | None]]


def text_conditions(stages: Callable[[], Stages], prompt_of: Callable[[int], str]) -> Conditions:
    """Contexts [N, L, D] of the prompts of the given images, and of the empty prompt."""

    def conditions(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        text = stages().cond_stage_model
        return text.encode([prompt_of(i) for i in indices]), text.encode([""] * len(indices))

    return conditions


def class_conditions(stages: Callable[[], Stages], classes: Sequence[int]) -> Conditions:
    """Contexts [N, 1, D] where image i is of class `classes[i % len(classes)]`, and of "no class" (the last one)."""

    def conditions(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        embedder = stages().cond_stage_model
        none = embedder.embedding.num_embeddings - 1
        return embedder.encode([classes[i % len(classes)] for i in indices]), embedder.encode([none] * len(indices))

    return conditions


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; ConfigError where there are none."""
    if not path.is_file():
        raise ConfigError(f"prompts: {path}: no such file")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"prompts: {path} is empty")
    return prompts


def calibration_prompt(config_path: Path) -> Callable[[int], str]:
    """The prompt of calibration sample i: from `prompts.txt` beside the YAML file, read when the first one is asked for."""
    prompts: list[str] = []

    def prompt_of(index: int) -> str:
        if not prompts:
            prompts.extend(read_prompts(config_path.with_name("prompts.txt")))
        return prompts[index % len(prompts)]

    return prompt_of


def parse_classes(text: str | None, count: int) -> list[int]:
    """The classes of `--classes 25,187`, or all `count` of them; ConfigError for one that does not exist."""
    if text is None:
        return list(range(count))
    for word in text.split(","):
        if not word.strip().isdigit() or int(word) >= count:
            raise ConfigError(f"--classes {word}: expected numbers of 0 to {count - 1}")
    return [int(word) for word in text.split(",")]
