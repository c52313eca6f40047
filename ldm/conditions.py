"""Contexts for the images of a batch, from prompts or classes."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import LatentModelParts
from ldm.encoders import ClassEmbedder, TextEmbedder
from qdiff.errors import ConfigError, NonFiniteError

log = logging.getLogger(__name__)

# From the indices of N images to their contexts: conditional and unconditional, each [N, L, D].
Conditions = Callable[[Sequence[int]], tuple[Tensor, Tensor]]


def text_conditions(model_parts: Callable[[], LatentModelParts], prompt_of: Callable[[int], str]) -> Conditions:
    """Condition images on prompts, and without guidance on the empty prompt.

    The end that is cut off a long prompt is logged once.

    Args:
        model_parts: returns the parts of a model with a text tower. It is called for each batch.
        prompt_of: from the index of an image to its prompt.
    """
    reported: set[str] = set()

    def conditions(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        text = model_parts().cond_stage_model
        if not isinstance(text, TextEmbedder):
            raise ConfigError(f"prompts: expected a model with a text tower, found {type(text).__name__}")
        new = {prompt_of(i) for i in indices} - reported
        reported.update(new)
        for prompt, rest in cut_prompts(text, sorted(new)).items():
            log.warning("a prompt of more than %d tokens: %r is cut off the end of %r", text.max_length, rest, prompt)
        return _finite(text.encode([prompt_of(i) for i in indices])), _finite(text.encode([""] * len(indices)))

    return conditions


def cut_prompts(text: TextEmbedder, prompts: Iterable[str]) -> dict[str, str]:
    """Find the prompts that are too long for the text tower.

    Returns:
        From each such prompt to the end that the text tower does not see.
    """
    return {prompt: rest for prompt in prompts if (rest := text.cut_off(prompt))}


def _finite(contexts: Tensor) -> Tensor:
    """Return the contexts, or raise NonFiniteError."""
    if not torch.isfinite(contexts).all():
        raise NonFiniteError(
            "the conditioning: contexts that are not finite numbers; nothing of this batch was written"
        )
    return contexts


def class_conditions(model_parts: Callable[[], LatentModelParts], classes: Sequence[int]) -> Conditions:
    """Condition images on classes, and without guidance on "no class", the last class of the embedder.

    Args:
        model_parts: returns the parts of a model with a class embedder. It is called for each batch.
        classes: class numbers. Image i has the class `classes[i % len(classes)]`.
    """

    def conditions(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        embedder = model_parts().cond_stage_model
        if not isinstance(embedder, ClassEmbedder):
            raise ConfigError(f"classes: expected a model with a class embedder, found {type(embedder).__name__}")
        no_class = embedder.embedding.num_embeddings - 1
        contexts = embedder.encode([classes[i % len(classes)] for i in indices])
        return _finite(contexts), _finite(embedder.encode([no_class] * len(indices)))

    return conditions


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a text file in UTF-8, one a line; blank lines are skipped.

    Raises:
        ConfigError: the file does not exist, has another encoding, or holds no prompt.
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


def calibration_prompt(file: Path) -> Callable[[int], str]:
    """Return a function from the index of a calibration sample to its prompt.

    The prompts are taken in turn. The file is read at the first call.

    Args:
        file: the file of prompts, one a line.
    """
    prompts: list[str] = []

    def prompt_of(index: int) -> str:
        if not prompts:
            prompts.extend(read_prompts(file))
        return prompts[index % len(prompts)]

    return prompt_of


def parse_classes(text: str | None, count: int) -> list[int]:
    """Parse class numbers separated by commas, such as `25,187`.

    Args:
        text: the class numbers. None stands for all classes.
        count: number of classes.

    Raises:
        ConfigError: a class does not exist.
    """
    if text is None:
        return list(range(count))
    numbers = text.split(",")
    for number in numbers:
        if not number.strip().isdigit() or int(number) >= count:
            raise ConfigError(f" {number}: expected numbers of 0 to {count - 1}", field="classes")
    return [int(number) for number in numbers]
