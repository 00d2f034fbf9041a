"""Checks of values that a caller passes. Booleans and text are not numbers."""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from fastcoop.errors import UserError, unknown

LARGEST = 2**32 - 1  # the largest seed that every library accepts
MAX_JOBS = 1024  # processes

LONGEST = 1_000_000  # epochs or steps of a schedule, whose tables grow with both
LARGEST_BATCH = 65_536  # images; memory for a whole batch is allocated even if there are fewer
LONGEST_RANGE = 10_000  # numbers of a range such as "1-10"
MOST_VIEWS = 1000  # augmented views of an image

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def shortened(value: Any) -> str:
    """Return ``repr(value)``, cut in the middle if it is long."""
    return _short.repr(value)


def one_of(value: str, kind: str, valid: Collection[str]) -> str:
    """Return ``value`` if it is one of ``valid``, names of the ``kind``, else raise a UserError with the nearest."""
    if value not in valid:
        raise unknown(kind, value, valid)
    return value


def whole_number(value: Any, name: str, least: int = 0, most: int = LARGEST) -> int:
    """Return ``value`` as an int.

    Raises:
        UserError: It is not a whole number from ``least`` to ``most``.
    """
    with suppress(TypeError):
        if not isinstance(value, bool) and least <= operator.index(value) <= most:
            return operator.index(value)
    raise UserError(f"Expected {name} to be a whole number from {least} to {most}, got {shortened(value)}.")


def expand_range(text: str) -> list[int] | None:
    """Return the whole numbers of a range, such as [1, 2, 3] for "1-3"; None for any other text."""
    first, dash, last = (part.strip() for part in text.partition("-"))
    if not dash or not (first.isdecimal() and last.isdecimal()) or len(first) > 10 or len(last) > 10:
        return None
    numbers = range(int(first), int(last) + 1)
    return list(numbers) if 0 < len(numbers) <= LONGEST_RANGE else None


def amount(value: Any, name: str) -> float:
    """Return ``value`` as a float.

    Raises:
        UserError: It is not a finite number above 0.
    """
    with suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool | str | bytes) and 0 < float(value) < math.inf:
            return float(value)
    raise UserError(f"Expected {name} to be a finite number above 0, got {shortened(value)}.")


def several(value: Any) -> list[Any]:
    """Return one value or several as a list. Text, paths, mappings and zero-dimensional arrays are one value; iterators
    are consumed."""
    if callable(getattr(value, "tolist", None)):  # of NumPy, pandas or torch
        value = value.tolist()
    if isinstance(value, str | bytes | os.PathLike | Mapping) or not isinstance(value, Iterable):
        return [value]
    return list(value)
