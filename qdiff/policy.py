"""Widths per layer: a policy names the layers that stay in full precision or take other widths than the nominal ones.

A policy is a sequence of (pattern, widths). Patterns match paths of layers and attention matmuls as in a shell
(`down.*.conv1`); the widths are `W8A16`, `W8`, `A16`, or `keep` for full precision. Of several patterns that match a
path, the last one with a say counts.
"""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from qdiff.errors import ConfigError

KEEP = "keep"
_WIDTHS = re.compile(r"(?:W(\d+))?(?:A(\d+))?")

Policy = tuple[tuple[str, str], ...]


def parse_widths(text: str, field: str = "policy") -> tuple[int | None, int | None]:
    """The widths of weights and activations that `text` names; None: the nominal width.

    Raises:
        ConfigError: another form, or a width outside 2 to 16 bits.
    """
    found = _WIDTHS.fullmatch(text)
    if found is None or not any(found.groups()):
        raise ConfigError(f" {text!r}: expected W<bits>A<bits>, W<bits>, A<bits> or {KEEP}", field=field)
    weight, act = (None if group is None else int(group) for group in found.groups())
    for bits in (weight, act):
        if bits is not None and not 2 <= bits <= 16:
            raise ConfigError(f" {text!r}: expected widths of 2 to 16 bits", field=field)
    return weight, act


def make_policy(entries: Mapping[str, str] | Iterable[tuple[str, str]], field: str = "policy") -> Policy:
    """Check a policy.

    Args:
        entries: {pattern: widths}, or the pairs in order.
        field: what an error names.

    Raises:
        ConfigError: an entry that is no pair of texts, or widths that cannot be parsed.
    """
    pairs = list(entries.items() if isinstance(entries, Mapping) else entries)
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise ConfigError(f" {pair!r}: expected a pattern and its widths", field=field)
        if pair[1] != KEEP:
            parse_widths(pair[1], field)
    return tuple((str(pattern), str(widths)) for pattern, widths in pairs)


def is_kept(policy: Policy, path: str) -> bool:
    """Whether the layer or attention matmul at `path` stays in full precision."""
    matching = [widths for pattern, widths in policy if fnmatchcase(path, pattern)]
    return bool(matching) and matching[-1] == KEEP


def widths_of(policy: Policy, path: str) -> tuple[int | None, int | None]:
    """The widths of weight and activations of the layer at `path`; None: the nominal width."""
    weight = act = None
    for pattern, widths in policy:
        if widths != KEEP and fnmatchcase(path, pattern):
            own_weight, own_act = parse_widths(widths)
            weight, act = own_weight or weight, own_act or act
    return weight, act


def unused_patterns(policy: Policy, paths: Iterable[str]) -> list[str]:
    """The patterns that match none of `paths`."""
    known = list(paths)
    return [pattern for pattern, _ in policy if not any(fnmatchcase(path, pattern) for path in known)]
