"""The one exception a user is meant to read, and the suggestion that goes with a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Input that cannot be used. The message is one sentence: what was expected, what came, what to do.

    The command line prints it to standard error and exits with code 2.
    """


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return ``' Did you mean "x"?'`` for the closest of ``valid``, else ``' Valid: a, b, c.'``."""
    names = sorted(set(valid))
    lowered = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    if close:
        return f' Did you mean "{lowered[close[0]]}"?'
    return f" Valid: {', '.join(names)}." if names else ""
