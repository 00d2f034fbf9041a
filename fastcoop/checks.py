"""Checks of numbers that a caller passes. Booleans and text are no numbers."""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Iterable
from typing import Any

from fastcoop.errors import UserError

LARGEST = 2**32 - 1  # the largest seed that every library accepts

LONGEST = 1_000_000  # epochs or steps of a schedule, whose tables grow with both
LARGEST_BATCH = 65_536  # images; memory for a whole batch is allocated even if there are fewer
MOST_VIEWS = 1000  # augmented views of an image

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def shortened(value: Any) -> str:
    """Return ``repr(value)``, cut in the middle if it is long."""
    try:
        return _short.repr(value)
    except ValueError:  # an int of more digits than Python converts
        return "a number of thousands of digits"


def whole_number(value: Any, name: str, least: int = 0, most: int = LARGEST) -> int:
    """Return ``value`` as an int.

    Raises:
        UserError: It is not a whole number from ``least`` to ``most``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        raise UserError(
            f"Expected {name} to be a whole number from {least} to {most}, got {shortened(value)}."
        )
    return number


def amount(value: Any, name: str) -> float:
    """Return ``value`` as a float.

    Raises:
        UserError: It is not a finite number above 0.
    """
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"Expected {name} to be a finite number above 0, got {shortened(value)}.")
    return number


def several(value: Any) -> list[Any]:
    """Return one value or several as a list. Text, paths and zero-dimensional arrays are one value; iterators are
    consumed."""
    if callable(getattr(value, "tolist", None)):  # of NumPy, pandas or torch
        value = value.tolist()
    if isinstance(value, str | bytes | os.PathLike) or not isinstance(value, Iterable):
        return [value]
    return list(value)
