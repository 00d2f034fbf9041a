"""Exceptions that users read, the suggestion for a misspelled name, and errors of the disk as such exceptions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LISTED = 20  # valid names in one message


class FastcoopError(Exception):
    """Base class of fastcoop's own exceptions.

    The message is one sentence: what was expected, what was given, what to do. The command line prints it to standard
    error and exits with code 2.
    """


class UserError(FastcoopError, ValueError):
    """Raised for input that cannot be used."""


class MissingFile(UserError, FileNotFoundError):
    """Raised where a file or folder that was named is not there."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return ``' Did you mean "x"?'`` for the closest of ``valid``, else ``' Valid: a, b, c.'``, cut if long."""
    names = sorted(set(valid))
    by_lower = {name.lower(): name for name in names}
    if close := difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6):
        return f' Did you mean "{by_lower[close[0]]}"?'
    return f" Valid: {abbreviate(names, LISTED)}." if names else ""


def abbreviate(names: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """Return the beginning of a list: ``a, b, c and 7 more``, or ``a; b; c; and 7 more`` by the separator "; "."""
    more = f"{separator.strip(', ')} and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def unknown(kind: str, name: object, valid: Iterable[str]) -> UserError:
    """Return the error of a name that is not one of ``valid``, with the nearest that is."""
    return UserError(f'There is no {kind} "{name}".{nearest(str(name), valid)}')


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn the OSError of a full, read-only or missing disk into a UserError while ``place`` is written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        message = f"{place} cannot be written ({reason}); free space or choose another place."
        raise UserError(message) from error
