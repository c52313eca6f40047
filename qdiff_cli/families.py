"""Decides which family a model belongs to."""

from pathlib import Path

import yaml

from qdiff.checkpoint.diffusers_folder import DiffusersFolder
from qdiff.errors import ConfigError


def is_latent(path: Path | None, checkpoint: Path | None = None) -> bool:
    """Whether a model is a latent one.

    Args:
        path: its YAML file, in which the section `model` of a latent model names a target class; None: the checkpoint
            is a folder of diffusers.
        checkpoint: its full-precision checkpoint.

    Raises:
        CheckpointError: the settings in the folder are missing or damaged.
        ConfigError: the YAML file cannot be read.
    """
    if path is None:
        folder = DiffusersFolder.find(checkpoint)
        return folder is not None and folder.is_latent
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f" {path}: cannot be read ({str(error).splitlines()[0]})", field="config") from None
    return isinstance(content, dict) and isinstance(content.get("model"), dict) and "target" in content["model"]
