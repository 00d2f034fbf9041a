"""Files of few-shot subsets, which are only read: the official code's pickles, and JSON of the same content."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.datasets.dataset import Dataset, Item, warn_once
from fastcoop.datasets.files import abbreviate, normalized, reading
from fastcoop.datasets.splits import read_items, read_json
from fastcoop.errors import UserError

DATUM = ("dassl.data.datasets.base_dataset", "Datum")


def read_subset(dataset: Dataset, shots: int, seed: int) -> dict[str, np.ndarray]:
    """Read the subset of ``shots`` and ``seed`` from the official code's pickle, else from JSON.

    Returns:
        Indices into the splits "train" and "val" (the latter not in ImageNet's pickles); {} if there is neither file,
        or only a JSON with the digest of another split.

    Raises:
        UserError: The file is damaged, names images that the split does not have, or, a pickle, asks for anything but
            lists, dictionaries and the official code's ``Datum``.
    """
    path = dataset.fewshot_dir / f"shot_{shots}-seed_{seed}.pkl"
    if path.is_file():
        return _locate(dataset, _read_pickle(path), path)
    path = path.with_suffix(".json")
    if not path.is_file():
        return {}
    content = read_json(path)
    if isinstance(content, dict) and content.get("digest", dataset.digest) != dataset.digest:
        return {}
    return _locate(dataset, read_items(path, required=("train",)), path)


def _read_pickle(path: Path) -> dict[str, list[Item]]:
    try:
        with reading(path, "a pickle"):
            data = path.read_bytes()
        content = _DatumUnpickler(io.BytesIO(data)).load()
        keys = ("train", "val") if "val" in content else ("train",)
        return {key: [_item(datum) for datum in content[key]] for key in keys}
    except UserError:
        raise
    except _Forbidden as error:
        raise UserError(
            f"{path} wants to load {error}, which no few-shot subset needs; it was not opened. "
            "Delete it if you do not know where it comes from."
        ) from None
    except Exception as error:  # a damaged pickle may raise any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is not a few-shot subset of the official code ({reason}); delete it."
        ) from None


def _locate(dataset: Dataset, items: dict[str, list[Item]], source: Path) -> dict[str, np.ndarray]:
    """Find items by the ends of their paths, since the data root may have been another."""
    located = {}
    for key, part in items.items():
        if key not in dataset.splits:
            if part:
                raise UserError(
                    f"{source} has {key} images, but {dataset.name} has no {key} split; delete it."
                )
            continue
        split = dataset.splits[key]
        index = {path: number for number, path in enumerate(split.paths)}
        forms = Counter(normalized(path) for path in index if not path.isascii())
        # The file may come from a system that composes letters differently.
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
    if not drawn:
        raise UserError(f"{source} has no training images; delete it, and a subset is drawn.")
    absent = [name for label, name in enumerate(dataset.class_names) if label not in drawn]
    if absent:
        warn_once(f"{source} has no training image of {abbreviate(absent)}, which runs on it do not learn.")
    return located


def _find(path: str, index: dict[str, int]) -> int | None:
    """Find the image whose path ``path`` ends with: as written, with backslashes as separators, or composed."""
    forms = (path, path.replace("\\", "/"))
    for form in dict.fromkeys((*forms, *map(normalized, forms))):
        parts = form.split("/")
        for start in range(len(parts)):
            if (found := index.get("/".join(parts[start:]))) is not None:
                return found
    return None


class _Forbidden(Exception):
    """The pickle asked for this global."""


class _Datum:
    """Replaces the official code's class; takes plain attributes and does nothing."""

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
