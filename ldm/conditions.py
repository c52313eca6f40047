"""What latents are conditioned on: prompts or classes, as contexts for the images of a batch."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import LatentModelParts
from ldm.encoders import FrozenCLIPEmbedder
from qdiff.errors import ConfigError, NonFiniteError

log = logging.getLogger(__name__)

Conditions = Callable[[Sequence[int]], tuple[Tensor, Tensor | None]]


def text_conditions(model_parts: Callable[[], LatentModelParts], prompt_of: Callable[[int], str]) -> Conditions:
    """Contexts [N, L, D] of the prompts of the given images, and of the empty prompt. What is cut of a long prompt is logged."""
    told: set[str] = set()

    def conditions(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        text = model_parts().cond_stage_model
        new = {prompt_of(i) for i in indices} - told
        told.update(new)
        for prompt, rest in cut_prompts(text, sorted(new)).items():
            log.warning("a prompt of more than %d tokens: %r is cut off the end of %r", text.max_length, rest, prompt)
        return _finite(text.encode([prompt_of(i) for i in indices])), _finite(text.encode([""] * len(indices)))

    return conditions


def cut_prompts(text: FrozenCLIPEmbedder, prompts: Iterable[str]) -> dict[str, str]:
    """The prompts that are longer than the text tower takes, each with the end that it does not see."""
    return {prompt: rest for prompt in prompts if (rest := text.cut_off(prompt))}


def _finite(contexts: Tensor) -> Tensor:
    if not torch.isfinite(contexts).all():
        raise NonFiniteError(
            "the conditioning: contexts that are not finite numbers; nothing of this batch was written"
        )
    return contexts


def class_conditions(model_parts: Callable[[], LatentModelParts], classes: Sequence[int]) -> Conditions:
    """Contexts [N, 1, D] where image i is of class `classes[i % len(classes)]`, and of "no class" (the last one)."""

    def conditions(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        embedder = model_parts().cond_stage_model
        none = embedder.embedding.num_embeddings - 1
        return _finite(embedder.encode([classes[i % len(classes)] for i in indices])), _finite(
            embedder.encode([none] * len(indices))
        )

    return conditions


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file in UTF-8, one a line; blank lines are none. All scripts read prompts by this function.

    Raises:
        ConfigError: no such file, another encoding, or no prompt in it.
    """
    if not path.is_file():
        raise ConfigError(f"prompts: {path}: no such file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"prompts: {path}: expected text in UTF-8, found byte 0x{content[error.start]:02x} at {error.start}"
        ) from None
    if "\0" in text:
        raise ConfigError(f"prompts: {path}: expected text in UTF-8, found zero bytes (UTF-16, or no text)")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"prompts: {path}: expected one prompt a line, found none")
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
