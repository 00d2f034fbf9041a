"""Select rows of a results table: ``shots=16``, ``accuracy>=50``, ``dataset=dtd,eurosat``, ``init!=random``."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastcoop.errors import UserError, nearest

if TYPE_CHECKING:
    import pandas as pd

CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|!=|=|<|>)(.*)", re.DOTALL)
ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def select_rows(table: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """Return the rows of a results table that meet all conditions.

    Args:
        table: a results table.
        conditions: ``NAME=VALUE`` or ``NAME!=VALUE``, with one value or several separated by commas; or ``<``, ``<=``,
            ``>``, ``>=`` with a number. NAME is a column or a setting of the methods. A value that contains commas,
            such as a label, is also compared as a whole.

    Raises:
        UserError: a condition of another form, an unknown name, or a value that must be a number and is not.
    """
    for condition in conditions:
        match = CONDITION.fullmatch(condition)
        if match is None:
            raise UserError(
                f'"{condition}" should be NAME=VALUE, such as shots=16, dataset!=dtd or accuracy<20.'
            )
        name, sign, text = match[1], match[2], match[3].strip()
        values = _column(table, name)
        if sign in ORDER:
            limit = _number(text)
            if math.isnan(limit):
                raise UserError(
                    f'"{condition}" compares with "{text}", which is not a number; give one, or use = or !=.'
                )
            selected = [ORDER[sign](_number(value), limit) for value in values]
        else:
            accepted = [text, *(piece.strip() for piece in text.split(","))]
            selected = [any(_equal(value, one) for one in accepted) == (sign == "=") for value in values]
        table = table[selected]
    return table


def _column(table: pd.DataFrame, name: str) -> list[Any]:
    if name in table:
        return table[name].tolist()
    settings = [json.loads(text) for text in table.settings] if "settings" in table else []
    known = {key for one in settings for key in one}
    if name not in known and len(table):
        raise UserError(f'The results have no column or setting "{name}".{nearest(name, {*table, *known})}')
    return [one.get(name) for one in settings]


def _equal(value: Any, text: str) -> bool:
    if value is None or value != value:
        return text.lower() in ("", "none")
    if isinstance(value, bool):
        return str(value).lower() == text.lower()
    return str(value) == text or (not isinstance(value, str) and _number(value) == _number(text))


def _number(value: Any) -> float:
    """Return a value as a float: NaN for other than numbers, infinity for "all" shots."""
    try:
        return math.inf if value == "all" else float(value)
    except (TypeError, ValueError):
        return math.nan
