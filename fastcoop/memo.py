"""What is done once or late: function results that are kept, and objects that are made when they are used."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
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
