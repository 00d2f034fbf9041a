"""A dataset as methods read it: class names, few-shot subsets and cached features."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fastcoop.datasets import Dataset, FewShot, few_shot
from fastcoop.datasets.dataset import test_digest
from fastcoop.datasets.files import in_prompt
from fastcoop.errors import UserError
from fastcoop.features.image_files import files_digest
from fastcoop.memo import memoize
from fastcoop.methods.scores import unit

if TYPE_CHECKING:  # it imports torch
    from fastcoop.features import FeatureStore

DEFAULT_VIEWS = 8  # augmented views per training image
KEPT_BYTES = 1 << 30  # of training features, which runs of equal shots and seed share

Labelled = tuple[np.ndarray, np.ndarray]  # features (n, dim) or (n, views, dim), and labels (n,)


@dataclass(eq=False)
class Data:
    """A dataset, and the features of its images by one backbone. Everything is read when it is first used.

    Attributes:
        dataset: Class names, template and splits.
        store: The features; None if runs are only planned.
        views: Augmented views per training image, besides the test-time crop, that runs may learn from.
        recipe: Name of the image transforms, if there is no store that has it.
        text_features: float32 (classes, dim), of any length, in place of those of hand-written prompts; None otherwise.
    """

    dataset: Dataset
    store: FeatureStore | None
    views: int = DEFAULT_VIEWS
    recipe: str = "current"
    text_features: np.ndarray | None = None
    _train: OrderedDict[tuple[bytes, str], Labelled] = field(default_factory=OrderedDict, repr=False)

    @property
    def name(self) -> str:
        return self.dataset.name

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    @property
    def test_digest(self) -> str:
        """SHA-256 hex digest of the test images: the dataset's digest, unless some images could not be read."""
        return test_digest(self.dataset, self._skipped("test"))

    @property
    def test_features(self) -> str | None:
        """SHA-256 hex digest of the test features; None if they are not cached."""
        return self.store.meta.sha256.get("test") if self.store else None

    @property
    def test_images(self) -> str | None:
        """SHA-256 hex digest over the digests of the test images' files; None if the store does not have them all.

        Unlike the features, files are the same on every machine.
        """
        return self._files_digest("test")

    def train_files(self, subset: FewShot) -> str | None:
        """Return the same for the training images of a few-shot subset."""
        return self._files_digest("train", self.readable("train", subset.train))

    def _files_digest(self, split: str, images: np.ndarray | None = None) -> str | None:
        """Return the digest over the files of a split, or of some of its images in any order."""
        if self.store is None or split not in self.store.splits:
            return None
        files, index = self.store.files(split), self.store.indices(split)
        if images is not None:
            if not np.isin(images, index).all():
                return None
            files = files[np.searchsorted(index, images)]
        return files_digest(files)

    def _skipped(self, split: str) -> list[int]:
        """Return the images of a split that could not be read when its features were cached."""
        return list(self.store.meta.skipped.get(split, ())) if self.store else []

    def readable(self, split: str, rows: np.ndarray) -> np.ndarray:
        """Return those of a split's images that could be read when its features were cached."""
        skipped = self._skipped(split)
        return rows[~np.isin(rows, skipped)] if skipped else rows

    @memoize(4096)  # planned runs keep their subsets, so dropping them here would free nothing
    def subset(self, shots: int | str, seed: int) -> FewShot:
        """Return the few-shot subset, which is the same for all methods."""
        return few_shot(self.dataset, shots, seed)

    def train(self, subset: FewShot, kind: str = "coop") -> Labelled:
        """Return features float32 (n, 1 + views, dim), where view 0 is the test-time crop, and labels int64 (n,).

        Args:
            subset: The few-shot subset.
            kind: One of the method's ``kinds``: "coop", "tip", "flip" or "pre".
        """
        features, labels = self._stored(subset, kind)
        return features.astype(np.float32), labels

    def train_views(self, subset: FewShot, kind: str = "coop") -> Labelled:
        """Return features of the views that the official code learns from: the augmented ones, if there are any.

        They are in the store's dtype, not normalized, and the same memory for every call, so that runs can share them.
        """
        features, labels = self._stored(subset, kind)
        return features[:, 1:] if features.shape[1] > 1 else features, labels

    def _stored(self, subset: FewShot, kind: str) -> Labelled:
        if not self.views and kind != "pre":  # the test-time crop alone, which every store has
            kind = "coop"
        key = subset.train.tobytes(), kind
        if key not in self._train:
            assert self.store is not None
            features = self.store.train(subset.train, kind=kind, as_stored=True)
            # Imported features have other views in place of the mirrored crop, which is one, as run keys have it.
            features = features[:, : 1 + (min(1, self.views) if kind == "flip" else self.views)]
            self._train[key] = features.numpy(), self.store.train_labels(subset.train).numpy()
            while len(self._train) > 1 and sum(f.nbytes for f, _ in self._train.values()) > KEPT_BYTES:
                self._train.popitem(last=False)
        self._train.move_to_end(key)
        return self._train[key]

    def validation(self, subset: FewShot, kind: str = "coop") -> Labelled:
        """Return features float32 (n, dim) and labels (n,) of a subset's validation images."""
        assert self.store is not None
        features, labels = self.split("val", kind)
        drawn = np.isin(self.store.indices("val"), subset.val)  # images skipped as unreadable have no row
        return features[drawn], labels[drawn]

    @cached_property
    def test(self) -> Labelled:
        """Features float32 (n, dim) and labels int64 (n,) of all test images."""
        return self.split("test")

    @cached_property
    def unit_test(self) -> np.ndarray:
        """Test features float32 (n, dim), of length 1."""
        return unit(self.test[0])

    @cached_property
    def test_before(self) -> np.ndarray:
        """Test features float32 (n, before), before the image tower's projection."""
        return self.split("test", "pre")[0]

    def split(self, name: str, kind: str = "coop") -> Labelled:
        """Return features float32 (n, dim), at the test-time crop, and labels of all images of "val" or "test"."""
        assert self.store is not None
        features, labels = self.store.split(name, kind)
        return np.asarray(features, dtype=np.float32), np.asarray(labels)


def class_rows(labels: Sequence[int] | np.ndarray, source: Data, target: Data) -> np.ndarray:
    """Return the row of each class of ``target``, int (classes,), among rows learned on ``source``; -1 for none.

    Args:
        labels: int (rows,), the label in ``source`` that each row belongs to.
        source, target: The datasets, whose classes are matched by `matching_classes`.
    """
    rows = np.full(len(source.class_names), -1)
    rows[labels] = np.arange(len(labels))
    return rows[matching_classes(source, target)]


def known_classes(source: Data, target: Data) -> np.ndarray:
    """Return, for each class of ``target``, the label of the same class in ``source``, int (classes,); -1 for none.

    Classes are the same if their WordNet IDs are, where both datasets have them, or else their names, without regard
    to case, underscores and surrounding space. A class whose name is another's too has none.
    """
    return np.array(_known(*_comparable(source, target)))


def matching_classes(source: Data, target: Data) -> list[int]:
    """Return the same, where each class of ``target`` has to be among those of ``source``.

    Raises:
        UserError: A class of the target is not among the source's, or several classes share a name.
    """
    here, there = _comparable(source, target)
    labels = _known(here, there)
    if -1 in labels:
        missing = labels.index(-1)
        one, name = there[missing], target.class_names[missing]
        problem = f'its class "{name}" is not among {source.name}\'s classes, which the weights belong to'
        for place, classes in ((source.name, here), (target.name, there)):
            if one in here and (count := classes.count(one)) > 1:
                problem = f'{place} has {count} classes called "{name}"; give its classes names of their own'
        raise UserError(f"What was learned on {source.name} cannot be tested on {target.name}: {problem}.")
    return list(labels)


def _comparable(source: Data, target: Data) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the classes of both datasets as WordNet IDs, or else as plain names."""
    here, there = source.dataset.class_ids, target.dataset.class_ids
    if here and there:
        return here, there
    return _plain_names(source.class_names), _plain_names(target.class_names)


@lru_cache(maxsize=256)
def _known(here: tuple[str, ...], there: tuple[str, ...]) -> tuple[int, ...]:
    """Return the place in ``here`` of each of ``there``; -1 for none, and for those that are in either twice."""
    if here == there:
        return tuple(range(len(there)))
    several = {one for names in (here, there) for one, count in Counter(names).items() if count > 1}
    labels = {one: label for label, one in enumerate(here) if one not in several}
    return tuple(labels.get(one, -1) for one in there)


@lru_cache(maxsize=256)
def _plain_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return class names for comparisons: lower case, NFC, underscores as spaces, no surrounding space."""
    return tuple(map(in_prompt, names))
