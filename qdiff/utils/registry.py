"""Objects that are chosen by name: samplers, scale rules."""

from collections.abc import Callable
from typing import Generic, TypeVar, overload

from qdiff.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from names to objects. New entries register themselves when their module is imported.

    Args:
        field: the setting whose value is a name of this table. Messages begin with it.
    """

    def __init__(self, field: str) -> None:
        self.field = field
        self._entries: dict[str, T] = {}

    @overload
    def register(self, name: str) -> Callable[[T], T]: ...

    @overload
    def register(self, name: str, entry: T) -> T: ...

    def register(self, name: str, entry: T | None = None) -> T | Callable[[T], T]:
        """Add an entry, either by `register(name, entry)` or as a decorator, `@register(name)`.

        Returns:
            The entry itself, or the decorator, which returns what it decorates.

        Raises:
            ValueError: the name is already taken.
        """
        if entry is None:
            return lambda decorated: self.register(name, decorated)
        if name in self._entries:
            raise ValueError(f"{self.field} {name!r}: already registered")
        self._entries[name] = entry
        return entry

    def get(self, name: str, field: str | None = None) -> T:
        """Return the entry of this name.

        Args:
            name: its name.
            field: the setting that holds the name, if it is not that of the table.

        Raises:
            ConfigError: no entry has this name. The message lists the names.
        """
        if name not in self._entries:
            raise ConfigError(
                f" {name!r}: expected one of {', '.join(self._entries)}", field=self.field if field is None else field
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """Return all names in the order of registration."""
        return list(self._entries)
