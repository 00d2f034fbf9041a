"""What installed packages add to fastcoop, by entry points: methods, datasets and report items.

A package names them in its pyproject.toml, and fastcoop finds them in every process that it runs in:

    [project.entry-points."fastcoop.methods"]
    nearest_mean = "my_package.nearest_mean:NearestMeanMethod"
"""

from __future__ import annotations

import logging
from collections import UserDict
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from fastcoop.errors import UserError

T = TypeVar("T")

log = logging.getLogger("fastcoop")


class Registry(UserDict[str, T]):
    """A mapping of fastcoop's own objects of one kind, followed by those of installed packages.

    Packages are searched when the registry is first used; an object is imported when it is first looked up. Assigning
    to a name adds an object to this process only.

    Args:
        group: Entry point group, such as "fastcoop.methods".
        kind: What its objects are called in messages, such as "method".
        own: fastcoop's own objects by name, in order.
        prepare: Called with a name and the object loaded for it; returns the object to use, or raises an exception
            whose message names the problem.
    """

    def __init__(self, group: str, kind: str, own: Mapping[str, T], prepare: Callable[[str, Any], T]):
        self.group, self.kind = group, kind
        self._own, self._prepare = own, prepare

    @cached_property
    def data(self) -> dict[str, Any]:  # type: ignore[override]
        data: dict[str, Any] = dict(self._own)
        found = dict.fromkeys(entry_points(group=self.group))  # a folder may be on the import path twice
        for entry in found:
            if entry.name in self._own:
                message = 'The %s "%s" of the package %s is not used: fastcoop has its own.'
                log.warning(message, self.kind, entry.name, _package(entry))
            else:
                data.setdefault(entry.name, []).append(entry)  # a list: not imported yet
        return data

    def __getitem__(self, name: str) -> T:
        """Return the object of this name.

        Raises:
            KeyError: There is none.
            UserError: Its package cannot be imported or provides something else, or several packages provide it.
        """
        found = self.data[name]
        if isinstance(found, list):
            found = self.data[name] = self._load(name, found)
        return found

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


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value
