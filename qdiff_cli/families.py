"""Decides which family the YAML file of a model belongs to."""

from pathlib import Path

import yaml

from qdiff.errors import ConfigError


def is_latent(path: str | Path) -> bool:
    """Whether a YAML file describes a latent model. Its section `model` names a target class.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f" {path}: cannot be read ({str(error).splitlines()[0]})", field="config") from None
    return isinstance(content, dict) and isinstance(content.get("model"), dict) and "target" in content["model"]
