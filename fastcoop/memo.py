"""What is done once or late: function results that are kept, objects and imports that are made when they are used."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

Function = TypeVar("Function", bound=Callable[..., Any])


def memoize(most: int) -> Callable[[Function], Function]:
    """Cache a function's last ``most`` results for each object passed as its first argument.

    Results and further arguments must not refer to the object, or it would never be freed.
    """

    def decorate(function: Function) -> Function:
        known: WeakKeyDictionary[Any, Callable[..., Any]] = WeakKeyDictionary()

        @wraps(function)
        def memoized(owner: Any, *arguments: Any) -> Any:
            if owner not in known:
                weak = ref(owner)  # the cache must not keep the owner alive
                known[owner] = lru_cache(most)(lambda *others: function(weak(), *others))
            return known[owner](*arguments)

        return memoized  # type: ignore[return-value]

    return decorate


class Late:
    """An object that is made when anything but its ``known`` attributes is first used, because that takes seconds."""

    def __init__(self, make: Callable[[], Any], **known: Any):
        vars(self).update(known)
        self._make = make

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._make(), attribute)


def late_names(package: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package: its imports ``if TYPE_CHECKING`` are made when a name is first used.

    So are those of its modules. Planning, ``--help`` and reading results then load no torch, and type checkers see
    plain imports.
    """
    source = ast.parse(inspect.getsource(sys.modules[package])).body
    (block,) = (node for node in source if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    modules = {alias.name: str(node.module) for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name in modules:
            return getattr(import_module(modules[name]), name)
        if name.startswith("_") or find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(f"{package}.{name}")

    return get
