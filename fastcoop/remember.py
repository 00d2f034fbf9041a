"""A cache of function results that lives as long as the object they were computed from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

Function = TypeVar("Function", bound=Callable[..., Any])


def remember(most: int) -> Callable[[Function], Function]:
    """Cache a function's last ``most`` results for each object passed as its first argument.

    Results and further arguments must not refer to the object, or it would never be freed.
    """

    def decorate(function: Function) -> Function:
        known: WeakKeyDictionary[Any, OrderedDict[Any, Any]] = WeakKeyDictionary()

        @wraps(function)
        def remembering(owner: Any, *arguments: Any) -> Any:
            results = known.setdefault(owner, OrderedDict())
            if arguments in results:
                results.move_to_end(arguments)
                return results[arguments]
            result = results[arguments] = function(owner, *arguments)
            while len(results) > most:
                results.popitem(last=False)
            return result

        return remembering  # type: ignore[return-value]

    return decorate
