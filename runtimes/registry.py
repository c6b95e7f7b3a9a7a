"""Classes by name: those of this project, and those that installed packages add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints


class Registry(Mapping[str, "type[Any]"]):
    """Name -> class, each imported when it is asked for, so that a command starts fast.

    Args:
        group: of the entry points by which a package adds a class.
        built_in: name -> ``module:Class``; these cannot be replaced by a package.
    """

    def __init__(self, group: str, built_in: Mapping[str, str]) -> None:
        self.group, self.built_in = group, built_in

    def __getitem__(self, name: str) -> type[Any]:
        if name in self.built_in:
            module, _, attribute = self.built_in[name].partition(":")
            return getattr(import_module(module), attribute)
        if name in self._added().names:
            return self._added()[name].load()
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or name in self._added().names

    def __iter__(self) -> Iterator[str]:
        yield from self.built_in
        yield from sorted(self._added().names - self.built_in.keys())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _added(self) -> EntryPoints:
        from importlib.metadata import entry_points  # a tenth of the time that a small command takes to import all else

        return entry_points(group=self.group)
