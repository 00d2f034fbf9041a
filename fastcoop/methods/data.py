"""A dataset as methods read it: class names, few-shot subsets and cached features."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fastcoop.datasets.files import normalized
from fastcoop.errors import UserError
from fastcoop.methods.scores import unit

if TYPE_CHECKING:
    from fastcoop.datasets import Dataset, FewShot
    from fastcoop.features import FeatureStore

DEFAULT_VIEWS = 8  # augmented views per training image
KEPT_BYTES = 1 << 30  # of training features, kept because runs of equal shots and seed share them


@dataclass(eq=False)
class Data:
    """A dataset, and the features of its images by one backbone. Everything is read when it is first used.

    Attributes:
        dataset: Class names, template and splits.
        store: The features; None if runs are only planned.
        views: Augmented views per training image, besides the test-time crop, that runs may learn from.
        recipe: Name of the image transforms, if there is no store that has it.
        text_features: float32 (classes, dim), of length 1, in place of those of hand-written prompts; None otherwise.
    """

    dataset: Dataset
    store: FeatureStore | None
    views: int = DEFAULT_VIEWS
    recipe: str = "current"
    text_features: np.ndarray | None = None
    _subsets: dict[tuple[int | str, int], FewShot] = field(default_factory=dict, repr=False)
    _train: OrderedDict[bytes, tuple[np.ndarray, np.ndarray]] = field(default_factory=OrderedDict, repr=False)

    @property
    def name(self) -> str:
        return self.dataset.name

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    @property
    def test_digest(self) -> str:
        """sha256 hex of the test images: the dataset's digest, unless some images could not be read."""
        skipped = self.store.meta.skipped.get("test", ()) if self.store else ()
        if not len(skipped):
            return self.dataset.digest
        return hashlib.sha256(f"{self.dataset.digest} without {list(skipped)}".encode()).hexdigest()

    @property
    def test_features(self) -> str | None:
        """sha256 hex of the test features; None if they are not cached."""
        return self.store.meta.sha256.get("test") if self.store else None

    @property
    def test_images(self) -> str | None:
        """sha256 hex over the digests of the test images' files; None if the store does not have them all.

        Unlike the features, files are the same on every machine.
        """
        return self._files_digest("test")

    def train_files(self, subset: FewShot) -> str | None:
        """Return the same for the training images of a few-shot subset."""
        return self._files_digest("train", self.readable("train", subset.train))

    def _files_digest(self, split: str, images: np.ndarray | None = None) -> str | None:
        """Return sha256 hex over the digests of the files of a split, or of some of its images in any order."""
        from fastcoop.features.image_files import UNKNOWN

        if self.store is None or split not in self.store.splits:
            return None
        files, index = self.store.files(split), self.store.indices(split)
        if images is not None:
            if not np.isin(images, index).all():
                return None
            files = files[np.searchsorted(index, images)]
        known = (files["size"] != UNKNOWN).all()
        return hashlib.sha256(files["sha256"].tobytes()).hexdigest() if known else None

    def subset(self, shots: int | str, seed: int) -> FewShot:
        """Return the few-shot subset, which is the same for all methods."""
        from fastcoop.datasets import few_shot

        if (shots, seed) not in self._subsets:
            self._subsets[shots, seed] = few_shot(self.dataset, shots, seed)
        return self._subsets[shots, seed]

    def train(self, subset: FewShot) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 (n, 1 + views, dim), view 0 the test-time crop, and labels int64 (n,)."""
        key = subset.train.tobytes()
        if key not in self._train:
            assert self.store is not None
            features = np.asarray(self.store.train(subset.train, views=True), dtype=np.float32)
            features = features[:, : 1 + self.views]
            self._train[key] = (features, np.asarray(self.store.train_labels(subset.train)))
            while len(self._train) > 1 and sum(f.nbytes for f, _ in self._train.values()) > KEPT_BYTES:
                self._train.popitem(last=False)
        self._train.move_to_end(key)
        return self._train[key]

    def readable(self, split: str, rows: np.ndarray) -> np.ndarray:
        """Return those of a split's images that were not skipped as unreadable."""
        skipped = self.store.meta.skipped.get(split, ()) if self.store else ()
        return rows[~np.isin(rows, np.asarray(skipped, dtype=np.int64))]

    def validation(self, subset: FewShot) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 (n, dim) and labels (n,) of a subset's validation images."""
        assert self.store is not None
        features, labels = self._split("val")
        # Rows are the split's images without those skipped as unreadable.
        drawn = np.isin(self.store.indices("val"), subset.val)
        return features[drawn], labels[drawn]

    @cached_property
    def test(self) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 (n, dim) and labels int64 (n,) of all test images."""
        return self._split("test")

    @cached_property
    def unit_test(self) -> np.ndarray:
        """Test features float32 (n, dim), of length 1."""
        return unit(self.test[0])

    def _split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        assert self.store is not None
        features, labels = self.store.split(name)
        return np.asarray(features, dtype=np.float32), np.asarray(labels)


def matching_classes(source: Data, target: Data) -> list[int]:
    """Return, for each class of ``target``, the label of the same class in ``source``.

    Classes are the same if their WordNet IDs are, where both datasets have them, or else their names, without regard
    to case, underscores and surrounding space.

    Raises:
        UserError: A class of the target is not among the source's, or several classes share a name.
    """
    ids = source.dataset.class_ids, target.dataset.class_ids
    here, there = ids if all(ids) else (source.class_names, target.class_names)
    return list(_matching(here, there, target.class_names, not all(ids), source.name, target.name))


@lru_cache(maxsize=256)
def _matching(
    here: tuple[str, ...],
    there: tuple[str, ...],
    names: tuple[str, ...],
    by_name: bool,
    source: str,
    target: str,
) -> tuple[int, ...]:
    """The place in ``here`` of each of ``there``, whose classes are called ``names``."""
    if by_name:
        here, there = (tuple(map(plain_name, one)) for one in (here, there))
    if here == there:
        return tuple(range(len(there)))
    labels = {one: label for label, one in enumerate(here)}
    for one, name in zip(there, names, strict=True):
        if one not in labels:
            raise UserError(
                f"What was learned on {source} cannot be tested on {target}: its class "
                f'"{name}" is not among {source}\'s; only unified contexts and zero-shot carry over.'
            )
        if there.count(one) > 1:
            raise UserError(
                f"What was learned on {source} cannot be tested on {target}: {target} has "
                f'{there.count(one)} classes called "{name}"; give its classes names of their own.'
            )
        if here.count(one) > 1:
            raise UserError(
                f"What was learned on {source} cannot be tested on {target}: {source} has "
                f'{here.count(one)} classes called "{name}"; give its classes names of their own.'
            )
    return tuple(labels[one] for one in there)


def plain_name(name: str) -> str:
    """Return a class name for comparisons: lower case, NFC, underscores as spaces, no surrounding space."""
    return " ".join(normalized(name).replace("_", " ").lower().split())
