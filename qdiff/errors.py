"""The errors that this package raises on purpose. Each message is one line: what was found, and what was expected."""

from collections.abc import Mapping
from typing import Self


class _UserError(ValueError):
    """An error that the user can mend; it knows the argument that it is about.

    Args:
        message: what was found, and what was expected.
        field: the argument or setting that the message is about. It stands before the message: a command line puts the
            name of its own option there (`with_options`).
        where: what stands before the field, usually a path with a colon.
    """

    def __init__(self, message: str, field: str = "", where: str = "") -> None:
        super().__init__(f"{where}{field}{message}")
        self.message, self.field, self.where = message, field, where

    def with_options(self, options: Mapping[str, str]) -> str:
        """The whole message with the name of an option (`--weight_bit`) in the place of its field (`weight_bit`)."""
        return str(self.renamed(options))

    def renamed(self, options: Mapping[str, str]) -> Self:
        """The same error about another name: that of `options` for its field, or its own if there is none."""
        return type(self)(self.message, options.get(self.field, self.field), self.where)


class ConfigError(_UserError):
    """A setting or an argument that cannot work."""


class CheckpointError(_UserError):
    """A file that cannot be used, or that does not agree with an argument."""


class NonFiniteError(ConfigError):
    """A computation gave NaN or infinity. The message says which network, and where."""


class WriteError(OSError):
    """A file that cannot be written. The message names it and says why."""


class MissingExtra(ConfigError, ImportError):
    """A package of an extra is not installed. The message names both."""
