"""What other packages bring: their entry points, and registries that load them when they are first read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from threading import RLock
from typing import Generic, TypeVar

__all__ = ["EncoderProviderDiagnostic", "Registry", "providers"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class EncoderProviderDiagnostic:
    """An installed provider that was left out, and why.

    Attributes:
        provider_key: the name of its entry point.
        provider: what that points to, "package.module:function".
        exception_type, message: of what it raised.
    """

    provider_key: str
    provider: str
    exception_type: str
    message: str

    def concise(self) -> str:
        """In a few words."""
        return f"{self.exception_type}: {self.message}"


@cache
def providers(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group that installed packages have, by name, then by what they point to."""
    return tuple(sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value)))


class Registry(Generic[Item]):
    """Items by name: those that somebody added, and those that installed providers add, which are called when
    the registry is first read. One that fails is left out whole, with a diagnostic.

    Args:
        group: of entry points; each is a callable without arguments that adds items.
    """

    def __init__(self, group: str) -> None:
        self._group, self._items = group, dict[str, Item]()
        self._lock, self._begun, self._loaded = RLock(), False, False
        self._diagnostics: tuple[EncoderProviderDiagnostic, ...] = ()

    def add(self, name: str, item: Item) -> None:
        """Add an item; it takes the place of one of that name."""
        with self._lock:
            self._items = {**self._items, name: item}

    def added(self, name: str) -> Item | None:
        """An item of that name that was added already, without asking providers."""
        return self._items.get(name)

    def get(self, name: str) -> Item | None:
        """The item of that name; None where nobody has added one."""
        found = self._items.get(name)
        if found is None:
            self._load()
            found = self._items.get(name)
        return found

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._items))

    def diagnostics(self) -> tuple[EncoderProviderDiagnostic, ...]:
        """Of the providers that failed."""
        self._load()
        return self._diagnostics

    def _load(self) -> None:
        if self._loaded:
            return
        with self._lock:
            if self._begun:  # by another thread, or a provider reads what it adds to
                return
            self._begun = True
            try:
                self._diagnostics = tuple(filter(None, map(self._added_by, providers(self._group))))
                self._loaded = True
            finally:
                self._begun = self._loaded

    def _added_by(self, provider: EntryPoint) -> EncoderProviderDiagnostic | None:
        before = self._items
        try:
            provider.load()()
        except (Exception, SystemExit) as error:  # whatever other packages do
            self._items = before
            message = " ".join(str(error).split()) or "No error message"
            return EncoderProviderDiagnostic(provider.name, provider.value, type(error).__name__, message)
        return None
