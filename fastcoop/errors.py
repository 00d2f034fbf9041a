"""The one exception a user is meant to read, the suggestion that goes with a misspelt name, and a disk's refusal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

LISTED = 20  # valid names in one message


class UserError(Exception):
    """Input that cannot be used. The message is one sentence: what was expected, what came, what to do.

    The command line prints it to standard error and exits with code 2.
    """


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return ``' Did you mean "x"?'`` for the closest of ``valid``, else ``' Valid: a, b, c.'``, the
    first of them where they are many."""
    names = sorted(set(valid))
    lowered = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    if close:
        return f' Did you mean "{lowered[close[0]]}"?'
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f" Valid: {', '.join(names[:LISTED])}{more}." if names else ""


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what a full, read-only or missing disk raises while ``place`` is written into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{place} cannot be written ({error.strerror or error}); free space or choose another place."
        ) from error
