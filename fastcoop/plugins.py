"""What installed packages add to fastcoop, by entry points: methods, datasets and report items.

A package names them in its pyproject.toml, and fastcoop finds them in every process that it runs in:

    [project.entry-points."fastcoop.methods"]
    nearest_mean = "my_package.nearest_mean:NearestMean"
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from fastcoop.errors import UserError

T = TypeVar("T")

log = logging.getLogger("fastcoop")


class Registry(MutableMapping[str, T]):
    """A mapping of fastcoop's own objects of one kind, followed by those of installed packages.

    Packages are searched when a name is not fastcoop's own or all names are listed; an object is imported when it is
    first looked up. Assigning to a name adds an object to this process only.

    Args:
        group: Entry point group, such as "fastcoop.methods".
        kind: What its objects are called in messages, such as "method".
        own: fastcoop's own objects by name, in order.
        prepare: Called with a name and the object loaded for it; returns the object to use, or raises an exception
            whose message names the problem.
    """

    def __init__(self, group: str, kind: str, own: Mapping[str, T], prepare: Callable[[str, Any], T]):
        self.group, self.kind = group, kind
        self._prepare = prepare
        self._loaded = dict(own)
        self._own = frozenset(own)

    @cached_property
    def _found(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self.group):
            known = found.setdefault(entry.name, [])
            if entry not in known:  # a folder may be on the import path twice
                known.append(entry)
        for name in self._own & found.keys():
            package = _package(found.pop(name)[0])
            log.warning(
                'The %s "%s" of the package %s is not used: fastcoop has its own.', self.kind, name, package
            )
        return found

    def __getitem__(self, name: str) -> T:
        """Return the object of this name.

        Raises:
            KeyError: There is none.
            UserError: Its package cannot be imported or provides something else, or several packages provide it.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(name, self._found[name])
        return self._loaded[name]

    def _load(self, name: str, entries: list[EntryPoint]) -> T:
        packages = list(map(_package, entries))
        if len(packages) > 1:
            raise UserError(
                f'The packages {" and ".join(packages)} both provide the {self.kind} "{name}"; uninstall one of them.'
            )
        try:
            return self._prepare(name, entries[0].load())
        except Exception as error:
            raise UserError(
                f'The {self.kind} "{name}" of the package {packages[0]} cannot be used '
                f"({type(error).__name__}: {error}); repair or uninstall the package."
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._loaded or name in self._found

    def __setitem__(self, name: str, value: T) -> None:
        self._loaded[name] = value

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._loaded, *self._found]))

    def __len__(self) -> int:
        return len(self._loaded.keys() | self._found.keys())


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value
