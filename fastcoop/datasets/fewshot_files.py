"""The files that keep few-shot subsets, only read: the official code's pickles, and JSON of the same content."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.datasets.dataset import Dataset, Item, warn_once
from fastcoop.datasets.files import normalized, reading, some
from fastcoop.datasets.splits import read_items, read_json
from fastcoop.errors import UserError

DATUM = ("dassl.data.datasets.base_dataset", "Datum")
Indices = dict[str, np.ndarray]  # "train" and, but for ImageNet's official ones, "val"


def subset_path(dataset: Dataset, shots: int, seed: int, suffix: str) -> Path:
    """Where the subset of ``shots`` and ``seed`` is kept, by the official code's naming."""
    return dataset.fewshot_dir / f"shot_{shots}-seed_{seed}.{suffix}"


def read_official(dataset: Dataset, shots: int, seed: int) -> Indices | None:
    """The subset in the official code's pickle, as indices into the splits; None if there is no such file.

    The pickle may build nothing but lists, dictionaries and the official code's ``Datum``.

    Raises:
        UserError: it asks for anything else, is damaged, or names images that the split does not have.
    """
    path = subset_path(dataset, shots, seed, "pkl")
    if not path.is_file():
        return None
    try:
        with reading(path, "a pickle"):
            data = path.read_bytes()
        content = _DatumUnpickler(io.BytesIO(data)).load()
        keys = ("train", "val") if "val" in content else ("train",)  # ImageNet's have no val
        items = {key: [_item(datum) for datum in content[key]] for key in keys}
    except UserError:
        raise
    except _Forbidden as error:
        raise UserError(
            f"{path} wants to load {error}, which no few-shot subset needs; it was not opened. "
            "Delete it if you do not know where it comes from."
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its next byte happens to mean
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is not a few-shot subset of the official code ({reason}); delete it."
        ) from None
    return _located(dataset, items, path)


def read_saved(dataset: Dataset, shots: int, seed: int) -> Indices | None:
    """The subset kept as JSON; None if there is none, or if its digest is another split's.

    Raises:
        UserError: it is malformed, or names images that the split does not have.
    """
    path = subset_path(dataset, shots, seed, "json")
    if not path.is_file():
        return None
    content = read_json(path)
    if isinstance(content, dict) and content.get("digest", dataset.digest) != dataset.digest:
        return None
    return _located(dataset, read_items(path, required=("train",)), path)


def _located(dataset: Dataset, items: dict[str, list[Item]], source: Path) -> Indices:
    """Find items by the ends of their paths, wherever the data root was when they were written.

    Raises UserError for images that the split does not have, and where there is no training image.
    """
    located = {}
    for key, part in items.items():
        if key not in dataset.splits and not part:
            continue
        if key not in dataset.splits:
            raise UserError(f"{source} has {key} images, but {dataset.name} has no {key} split; delete it.")
        split = dataset.splits[key]
        index = {path: number for number, path in enumerate(split.paths)}
        forms = Counter(normalized(path) for path in index if not path.isascii())
        # The file may have been written where letters are composed otherwise.
        index |= {
            form: index[path] for path in index if forms[form := normalized(path)] == 1 and form not in index
        }
        numbers = [_find(path, index) for path, _, _ in part]
        for number, (path, label, _) in zip(numbers, part, strict=True):
            if number is None or split.labels[number] != label:
                raise UserError(
                    f"{source} was drawn from another split: {path} with label {label} is not in the "
                    f"{key} split of {dataset.name}; delete it, or use the split file that it was drawn from."
                )
        located[key] = np.array(numbers, dtype=np.int64)
    drawn = set(dataset.splits["train"].labels[located["train"]].tolist())
    absent = [name for label, name in enumerate(dataset.class_names) if label not in drawn]
    if not drawn:
        raise UserError(f"{source} has no training images; delete it, and a subset is drawn.")
    if absent:
        warn_once(f"{source} has no training image of {some(absent)}, which runs on it do not learn.")
    return located


def _find(path: str, index: dict[str, int]) -> int | None:
    """The image of the split whose path ends ``path``: as it is written, else with backslashes as separators, else
    with its letters composed."""
    forms = (path, path.replace("\\", "/"))
    for written in dict.fromkeys((*forms, *map(normalized, forms))):
        parts: Sequence[str] = written.split("/")
        candidates = ("/".join(parts[start:]) for start in range(len(parts)))
        found = next((index[candidate] for candidate in candidates if candidate in index), None)
        if found is not None:
            return found
    return None


class _Forbidden(Exception):
    """The pickle asked for this global."""


class _Datum:
    """Stands in for the official code's class; takes plain attributes and does nothing."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.item = (state["_impath"], state["_label"], state["_classname"])


class _DatumUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) != DATUM:
            raise _Forbidden(f"{module}.{name}")
        return _Datum


def _item(datum: _Datum) -> Item:
    path, label, name = datum.item
    if not (isinstance(path, str) and isinstance(label, int) and isinstance(name, str)):
        raise TypeError("an entry is not a path, a label and a class name")
    return path, label, name
