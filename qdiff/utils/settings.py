"""Sections of YAML files become checked dataclasses: unknown, missing and mistyped settings are named."""

import contextlib
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from qdiff.errors import ConfigError


def check_names(found: Iterable[str], known: Iterable[str], section: str) -> None:
    """Check the keys of a section of a YAML file.

    Args:
        found: the keys of the section.
        known: the keys that are read.
        section: the section's name, for the message.

    Raises:
        ConfigError: a key that nothing reads; the message offers the nearest known one.
    """
    known = list(known)
    for name in map(str, found):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ConfigError(f"section {section}: unknown {name}" + (f" (did you mean {near[0]}?)" if near else ""))


def typed(value: Any, kind: Any, name: str) -> Any:
    """Check the type of a setting.

    Args:
        value: what the file holds.
        kind: int, float, bool, str, None, or a tuple or union of them.
        name: the setting's name, for the message.

    Returns:
        The value; a list becomes a tuple, and a number that YAML reads as text (1e-4) a float.

    Raises:
        ConfigError: a value of another type.
    """
    if get_origin(kind) is UnionType:
        if value is None and NoneType in get_args(kind):
            return None
        parts = [part for part in get_args(kind) if part is not NoneType]
        is_list = isinstance(value, list | tuple)
        kind = next((part for part in parts if (get_origin(part) is tuple) == is_list), parts[0])
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(typed(item, get_args(kind)[0], name) for item in value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):  # YAML reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    plain = isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if not plain or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"{name} {value!r}: expected {getattr(kind, '__name__', kind)}")
    return value


def fill(kind: type, values: dict[str, Any], section: str, ignored: Iterable[str] = ()) -> Any:
    """Make a dataclass from a section of a YAML file.

    Args:
        kind: the dataclass.
        values: the section; lists become tuples.
        section: its name, for messages.
        ignored: further keys that the section may have.

    Raises:
        ConfigError: a setting is missing, unknown or of another type, by name.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"section {section}: expected settings, found {values!r}")
    known = {field.name: field for field in fields(kind)}
    required = [name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    missing = [name for name in required if values.get(name) is None]
    check_names(values, [*known, *ignored], section)
    if missing:
        raise ConfigError(f"section {section}: missing {', '.join(missing)}")
    given = {name: value for name, value in values.items() if name in known}
    return kind(**{name: typed(value, known[name].type, f"{section}.{name}") for name, value in given.items()})
