"""Class names to show in place of those of folders: files that give them, and suggestions for such a file."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcoop.datasets.files import abbreviate, in_prompt, normalized, read_csv
from fastcoop.datasets.official_files import packaged_names
from fastcoop.errors import UserError, nearest, writing
from fastcoop.files import atomic_write
from fastcoop.progress import counted

COLUMNS = ("class", "name")
FORM = "a .csv with the columns class and name, as `fastcoop datasets names FOLDER` writes"
WORDNET_ID = re.compile(r"n\d{8}")  # names of ImageNet's class folders
PREFIXES = (  # suggestions leave one out where every class has it and a letter follows
    re.compile(r"n\d{8}[ _.-]+"),  # n02085620-Chihuahua
    re.compile(
        r"(?:(?:class|category|label)[ _.-]*)?\d+[ _.:)-]+", re.IGNORECASE
    ),  # 001.Black_footed_Albatross
    re.compile(r"(?:class|category|label)[ _.:-]+", re.IGNORECASE),
)
CAMEL = re.compile(r"(?<=[a-z]{2})(?=[A-Z][a-z])")  # AnnualCrop, but not McDonald


def shown_names(given: str | Path | Mapping[str, str], classes: Sequence[str], place: Path) -> list[str]:
    """Return the name of each of ``classes``, which are those of ``place``, by a file or mapping of all of them.

    Raises:
        UserError: The file cannot be read, names a class that is not there or one twice, lacks one, or gives two the
            same name.
    """
    composed = {normalized(one): one for one in classes} | {one: one for one in classes}
    names: dict[str, str] = {}
    owners: dict[str, str] = {}
    for where, key, name in _pairs(given):
        one = composed.get(key) or composed.get(normalized(key))
        if one is None:
            raise UserError(
                f'{where} names the class "{key}", which {place} does not have.{nearest(key, classes)}'
            )
        if one in names:
            raise UserError(f'{where} names the class "{key}" a second time; leave one of them.')
        if not in_prompt(name):
            raise UserError(f'{where} has an empty name for the class "{key}"; give it one.')
        if (other := owners.setdefault(in_prompt(name), one)) != one:
            raise UserError(
                f'{where} gives "{key}" the name "{name}", which "{other}" has; give each class a name of its own.'
            )
        names[one] = name
    if missing := [one for one in classes if one not in names]:
        source = "class_names" if isinstance(given, Mapping) else given
        raise UserError(
            f"{source} has no name for {counted(len(missing), 'class')} of {place}: {abbreviate(missing)}; add them."
        )
    return [names[one] for one in classes]


def _pairs(given: str | Path | Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield where a class is named, the class and its name."""
    if isinstance(given, Mapping):
        yield from (("class_names", str(key), str(name)) for key, name in given.items())
        return
    path = Path(given)
    if path.suffix.lower() != ".csv" or not path.is_file():
        raise UserError(f"Expected the class names in {FORM}, got {path}, which is none or is not there.")
    for line, row in read_csv(path, COLUMNS, COLUMNS, FORM)[1].items():
        yield f"{path} line {line}", row["class"], row["name"].strip()


def suggest_names(classes: Sequence[str]) -> list[str]:
    """Return cleaned class names: without numbers, WordNet IDs and words like "class" in front, words apart.

    A bare WordNet ID becomes ImageNet's name of it. A name that would be empty or another's stays as it is.
    """
    names = list(classes)
    known = packaged_names() if any(map(WORDNET_ID.fullmatch, names)) else {}
    for prefix in PREFIXES:
        rests = [name[found.end() :] if (found := prefix.match(name)) else "" for name in names]
        if all(re.match(r"[^\W\d]", rest) for rest in rests):
            names = rests
    names = [" ".join(CAMEL.sub(" ", known.get(name, name)).replace("_", " ").split()) for name in names]
    alike = Counter(map(in_prompt, names))
    return [
        name if in_prompt(name) and alike[in_prompt(name)] == 1 else one
        for name, one in zip(names, classes, strict=True)
    ]


def save_names(classes: Sequence[str], names: Sequence[str], out: Path) -> None:
    """Write a file of class names, which must not exist."""
    if out.exists():
        raise UserError(f"{out} is already there; choose another file (--out), or remove it.")
    text = io.StringIO()
    rows: Any = zip(classes, names, strict=True)
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    with writing(out), atomic_write(out) as part:
        part.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")
