"""Few-shot subsets by the official rule: drawn, or read from the files of an earlier draw.

Files are the official code's pickles, JSON of the same content, and the pairs of .jsonl files in which the few-shot
splits of 2SFS (Farina et al., CVPR 2025) are published. `write_draw` writes such a pair.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.checks import whole_number
from fastcoop.datasets.dataset import Dataset, Item, Items, Split, rows_in_whole, trainable_rows, warn_once
from fastcoop.datasets.files import normalized
from fastcoop.datasets.splits import read_items
from fastcoop.errors import UserError, abbreviate, writing
from fastcoop.files import atomic_write, read_json, reading, refuse_foreign, unpickle
from fastcoop.memo import memoize

MAX_VAL_SHOTS = 4
JSONL_KEYS = ("_impath", "_label", "_domain", "_classname")


@dataclass(frozen=True, eq=False)
class FewShot:
    """A few-shot subset.

    Attributes:
        train: int64 indices into ``dataset.splits["train"]``, class by class.
        val: int64 indices into ``dataset.splits["val"]``, at most four per class.
    """

    train: np.ndarray
    val: np.ndarray


def few_shot(dataset: Dataset, shots: int | str, seed: int, read: bool = True) -> FewShot:
    """Return the training and validation images for ``shots`` per class and ``seed``.

    A subset in ``dataset.fewshot_dir`` is read: the official code's ``shot_K-seed_S.pkl``, else the published
    ``shot_K-seed_S_train.jsonl`` and ``_val.jsonl``, else a JSON file. Otherwise one stream of Python's ``random``,
    seeded with ``seed``, draws the training and then the validation set, class by class in order of first image.
    Nothing is written: the same arguments draw the same images. All images of a class with fewer are used, with a
    warning. Training images that are validation images too (ImageNet's) are not drawn. The subset of half a dataset's
    classes is the whole dataset's, restricted to images of these classes: the official base-to-new rule.

    Args:
        dataset: The dataset.
        shots: Training images per class, or "all".
        seed: Seed of the draw.
        read: Whether a subset in a file is read, or always drawn.

    Raises:
        UserError: The dataset has no training images, ``shots`` is neither positive nor "all", or a file of a subset
            is damaged or of another split.
    """
    if not (isinstance(shots, str) and shots == "all"):
        shots = whole_number(shots, 'shots (or "all")', 1)
    seed = whole_number(seed, "the seed")
    if dataset.whole is not None:
        whole = few_shot(dataset.whole, shots, seed, read)
        return FewShot(_in_half(dataset, "train", whole.train), _in_half(dataset, "val", whole.val))
    if "train" not in dataset.splits:
        raise UserError(f"Dataset {dataset.name} has only test images; nothing can be trained on it.")
    train, val = dataset.splits["train"], dataset.splits.get("val", Split((), np.zeros(0, np.int64)))
    rows = _drawable(dataset)[0]
    if isinstance(shots, str):
        return FewShot(rows.copy(), np.arange(len(val), dtype=np.int64))
    counts = np.bincount(train.labels[rows], minlength=len(dataset.class_names)).tolist()
    named = zip(dataset.class_names, counts, strict=True)
    if small := [f"{name} ({count})" for name, count in named if count < shots]:
        warn_once(
            f"{dataset.name} has classes with fewer than {shots} training images, all used: {abbreviate(small, 5)}."
        )
    subset = _read_subset(dataset, shots, seed) if read else {}
    if "val" in subset:
        return FewShot(subset["train"], subset["val"])
    if not subset:
        drawn = _drawn(dataset, shots, seed)
        return FewShot(drawn.train.copy(), drawn.val.copy())  # callers may change them
    # ImageNet's official subsets have no validation set: the one drawn here shares no image with them.
    used = {train.paths[row] for row in subset["train"]}
    val_drawn = _draw(_drawable(dataset)[2], min(shots, MAX_VAL_SHOTS), random.Random(seed))
    unused = [row for row in val_drawn if val.paths[row] not in used]
    return FewShot(subset["train"], np.array(unused, np.int64))


@memoize(4096)  # of few numbers; caching and runs, over every backbone, share them
def _drawn(dataset: Dataset, shots: int, seed: int) -> FewShot:
    rng, (rows, classes, val_classes) = random.Random(seed), _drawable(dataset)
    return FewShot(rows[_draw(classes, shots, rng)], _draw(val_classes, min(shots, MAX_VAL_SHOTS), rng))


def validation_images(dataset: Dataset, train: np.ndarray, shots: int | str, seed: int) -> np.ndarray:
    """Return rows of the validation split, int64 (n,), none of which is among ``train``, a subset's training rows.

    Unlike ``FewShot.val``, they are not four per class at most but ``shots`` (or "all"), and are drawn from a stream of
    their own.
    """
    if "val" not in dataset.splits:
        return np.zeros(0, np.int64)
    val, images = dataset.splits["val"], dataset.splits["train"].paths
    if isinstance(shots, str):
        rows = np.arange(len(val), dtype=np.int64)
    elif dataset.whole is not None:
        whole = validation_images(dataset.whole, np.zeros(0, np.int64), shots, seed)
        rows = _in_half(dataset, "val", whole)
    else:
        rows = _draw(_drawable(dataset)[2], shots, random.Random(f"validation {seed}"))
    used = {images[row] for row in train}
    return np.array([row for row in rows if val.paths[row] not in used], dtype=np.int64)


def _in_half(half: Dataset, split: str, drawn: np.ndarray) -> np.ndarray:
    """Turn rows of the whole dataset's split into rows of the split of half its classes."""
    rows = rows_in_whole(half, split)
    return np.searchsorted(rows, drawn[np.isin(drawn, rows)]).astype(np.int64)


@memoize(1)
def _drawable(dataset: Dataset) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Return the training rows that may be drawn, the places among them of each class, and each class's val rows,
    for all draws: listing ImageNet's 1.28 million images by class takes longer than a draw."""
    rows, val = trainable_rows(dataset.splits), dataset.splits.get("val")
    labels = dataset.splits["train"].labels[rows]
    return rows, _by_class(labels), _by_class(val.labels) if val else []


def _by_class(labels: np.ndarray) -> list[np.ndarray]:
    """Return the positions of each class's labels; classes are in order of first appearance."""
    _, first, counts = np.unique(labels, return_index=True, return_counts=True)
    classes = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    return [classes[label] for label in np.argsort(first)]


def _draw(classes: list[np.ndarray], shots: int, rng: random.Random) -> np.ndarray:
    """Draw ``shots`` positions of every class, or all where there are fewer."""
    drawn = [some[rng.sample(range(len(some)), shots)] if len(some) >= shots else some for some in classes]
    return np.concatenate([*drawn, np.zeros(0, np.int64)]).astype(np.int64)


def _read_subset(dataset: Dataset, shots: int, seed: int) -> dict[str, np.ndarray]:
    """Read the rows of a subset from the official code's pickle, .jsonl or JSON; {} where there is none of them.
    Pickles and .jsonl of ImageNet have no "val". A JSON with the digest of another split is ignored."""
    path = dataset.fewshot_dir / f"shot_{shots}-seed_{seed}.pkl"
    if path.is_file():
        return _locate(dataset, _read_pickle(path), path)
    pair = {key: _jsonl_path(path.parent, shots, seed, key) for key in ("train", "val")}
    if pair["train"].is_file():
        items = {key: _read_jsonl(one) for key, one in pair.items() if one.is_file()}
        return _locate(dataset, items, pair["train"])
    path = path.with_suffix(".json")
    content = read_json(path) if path.is_file() else {"digest": None}
    if isinstance(content, dict) and content.get("digest", dataset.digest) != dataset.digest:
        return {}
    return _locate(dataset, read_items(path, required=("train",)), path)


def write_draw(dataset: Dataset, shots: int | str, seed: int, folder: Path) -> list[Path]:
    """Write a few-shot subset as ``shot_K-seed_S_train.jsonl`` and, with validation images, ``_val.jsonl``.

    Each line is a JSON object of an image, with the names of the official code: its path, beginning with the dataset's
    root, its label, domain (0) and class name. `few_shot` reads the files back.

    Raises:
        UserError: As `few_shot`, or the files cannot be written, or are there with other content.
    """
    subset, written = few_shot(dataset, shots, seed), []
    for key, rows in (("train", subset.train), ("val", subset.val)):
        if len(rows):
            path, labels = _jsonl_path(folder, shots, seed, key), dataset.splits[key].labels[rows].tolist()
            images = zip(map(str, dataset.files(key, rows)), labels, strict=True)
            records = (
                dict(zip(JSONL_KEYS, (*one, 0, dataset.class_names[one[1]]), strict=True)) for one in images
            )
            text = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
            content = text.encode("utf-8", "surrogateescape")
            refuse_foreign(path, partial(_holds, content))
            with writing(path):
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as part:
                    part.write_bytes(content)
            written.append(path)
    return written


def _holds(content: bytes, path: Path) -> bool:
    return path.read_bytes() == content


def _jsonl_path(folder: Path, shots: int | str, seed: int, key: str) -> Path:
    return folder / f"shot_{shots}-seed_{seed}_{key}.jsonl"


def _read_jsonl(path: Path) -> list[Item]:
    items = []
    with reading(path, "a .jsonl file"):
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    # Not splitlines(), which also splits at characters that names may have, such as U+2028.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        try:
            items.append(_item(json.loads(line)))
        except (ValueError, RecursionError):
            raise UserError(
                f"{path} line {number} should be a JSON object with {', '.join(JSONL_KEYS)}; delete the file, or "
                "download it again."
            ) from None
    return items


def _item(record: Any) -> Item:
    """Return the item of an image by the attributes of the official code's class, ``Datum``."""
    match record:
        case {"_impath": str(image), "_label": int(label), "_classname": str(name)}:
            return image, label, name
    raise ValueError("an entry is not a path, a label and a class name")


def _read_pickle(path: Path) -> Items:
    with reading(path, "a pickle"):
        data = path.read_bytes()
    try:
        content = unpickle(data)
        keys = ("train", "val") if "val" in content else ("train",)
        return {key: [_item(datum.state) for datum in content[key]] for key in keys}
    except Exception:  # a damaged pickle may raise any exception
        raise UserError(f"{path} is not an official few-shot subset, or damaged; delete it.") from None


def _locate(dataset: Dataset, items: Items, source: Path) -> dict[str, np.ndarray]:
    """Return the rows of the items, found by the ends of their paths, since the data root may have been another."""
    located = {}
    for key, part in items.items():
        if key not in dataset.splits:
            if part:
                raise UserError(
                    f"{source} has {key} images, but {dataset.name} has no {key} split; delete it."
                )
            continue
        split = dataset.splits[key]
        # The file may come from a system that composes letters differently; a path as written has priority.
        rows = {normalized(path): row for row, path in enumerate(split.paths)}
        rows |= {path: row for row, path in enumerate(split.paths)}
        found = [_find(path, rows) for path, _, _ in part]
        for (path, label, _), row in zip(part, found, strict=True):
            if row is None or split.labels[row] != label:
                raise UserError(
                    f"{source} was drawn from another split: {path} with label {label} is not in the "
                    f"{key} split of {dataset.name}; delete it, or use the split file that it was drawn from."
                )
        located[key] = np.array(found, np.int64)
    drawn = set(dataset.splits["train"].labels[located["train"]].tolist())
    if not drawn:
        raise UserError(f"{source} has no training images; delete it, and a subset is drawn.")
    if absent := [name for label, name in enumerate(dataset.class_names) if label not in drawn]:
        warn_once(f"{source} has no training image of {abbreviate(absent)}, which runs on it do not learn.")
    return located


def _find(path: str, rows: dict[str, int]) -> int | None:
    """Find the image whose path ``path`` ends with: as written, with backslashes as separators, or composed."""
    forms = (path, path.replace("\\", "/"))
    for form in dict.fromkeys((*forms, *map(normalized, forms))):
        parts = form.split("/")
        for start in range(len(parts)):
            if (found := rows.get("/".join(parts[start:]))) is not None:
                return found
    return None
