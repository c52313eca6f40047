"""The errors that this package raises on purpose. Each message is one line: what was found, and what was expected."""


class ConfigError(ValueError):
    """A setting or an argument that cannot work.

    Attributes:
        field: the name of the argument or setting, if the message is about one. The message begins with it; a command
            line shows its own option in its place.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class CheckpointError(ValueError):
    """A file that cannot be used.

    Attributes:
        field: the argument that the file does not agree with, if the message is about one.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class NonFiniteError(ConfigError):
    """A computation gave NaN or infinity. The message says which network, and where."""


class WriteError(OSError):
    """A file that cannot be written. The message names it and says why."""


class MissingExtra(ConfigError, ImportError):
    """A package of an extra is not installed. The message names both."""
