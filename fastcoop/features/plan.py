"""What a store lacks: the images to encode, the views of them, and how they are cut into chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastcoop.datasets import Dataset
from fastcoop.datasets.dataset import SPLITS
from fastcoop.errors import UserError
from fastcoop.features.store import FeatureStore
from fastcoop.features.store_file import BEFORE, FEATURES, FLIP, KINDS, StoreMeta, View, views_by_array

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone

CROPS_PER_CHUNK = 256
PACKAGES = ("fastcoop", "torch", "open_clip_torch", "pillow", "numpy", "h5py")  # that features depend on


@dataclass(frozen=True, eq=False)
class Encoding:
    """How the images of a dataset are encoded; see `cache_features`."""

    backbone: Backbone
    dataset: Dataset
    recipe: str = "current"
    view_seed: int = 0
    views: int = 0
    dtype: str = "float16"
    precision: str | None = "float32"  # None: that of the present store, or float32
    kinds: Mapping[str, int] = field(default_factory=dict)  # as `views_by_array` takes them

    @property
    def on_gpu(self) -> bool:
        """Whether the backbone is on a GPU."""
        return self.backbone.device.type == "cuda"

    @property
    def before_dim(self) -> int:
        """Size of features before the projection; 0 if they are not wanted."""
        return self.backbone.image_projection.before_dim if BEFORE in self.kinds else 0

    def arrays(self, split: str) -> dict[str, tuple[View, ...]]:
        """Return the arrays of features of a split, and the views of an image that each holds."""
        return views_by_array(split, self.views, self.kinds)

    @property
    def compute_dtype(self) -> str:
        """The dtype that the backbone computes in, such as "float32"."""
        return str(self.backbone.dtype).removeprefix("torch.")

    def meta(self, skipped: Mapping[str, Sequence[int]], difference: float | None = None) -> StoreMeta:
        """Return the description of a store of these features, without digests of its contents. ``difference`` is
        the `precision_difference` of the store."""
        backbone, dataset = self.backbone, self.dataset
        return StoreMeta(
            backbone=backbone.name, backbone_digest=backbone.digest, dim=backbone.embed_dim,
            dataset=dataset.name, dataset_digest=dataset.digest,
            class_names=dataset.class_names, template=dataset.template,
            recipe=self.recipe, view_seed=self.view_seed, views=self.views, dtype=self.dtype,
            expected={split: len(images) for split, images in dataset.splits.items()},
            skipped=skipped, sha256={},
            versions={name: metadata.version(name) for name in PACKAGES}, compute_dtype=self.compute_dtype,
            precision=self.precision or "float32", precision_difference=difference, kinds=self.kinds,
            before_dim=self.before_dim,
        )  # fmt: skip


class Chunk(NamedTuple):
    """Images of one split, and the views of them to encode."""

    split: str
    rows: tuple[int, ...]  # ascending indices into the split
    views: Sequence[View]
    before: bool = False  # whether to keep the features before the projection too
    # By array: its number of stored views, and those to add.
    adds: Mapping[str, tuple[int, Sequence[View]]] = {}

    @property
    def crops(self) -> int:
        """Number of crops to encode."""
        return len(self.rows) * len(self.views)

    @property
    def is_new(self) -> bool:
        """Whether nothing of these images is stored yet."""
        return FEATURES in self.adds and self.adds[FEATURES][0] == 0


@dataclass(frozen=True, eq=False)
class EncodingPlan:
    """What to encode for a store."""

    encoding: Encoding  # with the views and dtype of the finished store
    store: FeatureStore | None  # the present store
    chunks: list[Chunk] = field(default_factory=list)
    # By split: ascending indices of all images to store, and those left out earlier.
    index: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[str, np.ndarray] = field(default_factory=dict)

    def chunks_of(self, split: str) -> list[Chunk]:
        """Return the chunks of a split."""
        return [chunk for chunk in self.chunks if chunk.split == split]


def plan_encoding(
    encoding: Encoding, subsets: Iterable[np.ndarray], store: FeatureStore | None, leave_skipped: bool
) -> EncodingPlan:
    """Return what a store lacks: of the training images those in ``subsets``, of the other splits all images.

    If more views or kinds are asked for than the store has, they are added to every image; none is ever removed. With
    ``leave_skipped``, images that could not be read earlier are not tried again. A UserError names settings that cannot
    be mixed with the store's.
    """
    present = "float32" if store is None else store.meta.precision
    encoding = replace(encoding, precision=encoding.precision or present)
    plan = EncodingPlan(encoding if store is None else _reconcile(store, encoding), store)
    for split in (name for name in SPLITS if name in encoding.dataset.splits):
        wanted, arrays = np.arange(len(encoding.dataset.splits[split])), plan.encoding.arrays(split)
        if split == "train":
            wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *subsets]))
        have = skipped = np.zeros(0, np.int64)
        if store is not None and split in store.splits:
            have = store.indices(split)
            if leave_skipped:
                skipped = store.skipped(split)
            plan.chunks.extend(cut_chunks(split, have, arrays, store.meta.arrays(split)))
        new = np.setdiff1d(wanted, np.union1d(have, skipped))
        plan.chunks.extend(cut_chunks(split, new, arrays))
        plan.index[split], plan.skipped[split] = np.union1d(have, new), skipped
    return plan


def _reconcile(store: FeatureStore, asked: Encoding) -> Encoding:
    """Return how to encode more for a store."""
    meta = store.meta
    dtype = "float32" if meta.dtype == "float32" else asked.dtype  # a float32 store serves both
    for what, stored, value in (
        ("recipe", meta.recipe, asked.recipe),
        ("view seed", meta.view_seed, asked.view_seed),
        ("a backbone in", meta.compute_dtype, asked.compute_dtype),
        ("products in", meta.precision, asked.precision),
        ("features in", meta.dtype, dtype),
    ):
        if stored != value:
            raise UserError(
                f"{store.path} was made with {what} {stored} and {value} was asked for; "
                "use another cache folder or move the file away."
            )
    counts = {kind: [one[kind] for one in (meta.kinds, asked.kinds) if kind in one] for kind in KINDS}
    kinds = {kind: max(views) for kind, views in counts.items() if views}
    return replace(asked, dtype=meta.dtype, views=max(meta.views, asked.views), kinds=kinds)


def view_counts(kinds: Sequence[str], views: int) -> dict[str, Any]:
    """Return the ``views`` and ``kinds`` of an `Encoding` with ``views`` augmented views of each kind."""
    further = {kind: 1 if kind == FLIP else views for kind in KINDS[1:] if kind in kinds}
    return {"views": views if "coop" in kinds else 0, "kinds": further}


def cut_chunks(
    split: str,
    rows: np.ndarray,
    arrays: Mapping[str, Sequence[View]],
    stored: Mapping[str, Sequence[View]] = {},
) -> list[Chunk]:
    """Cut images of a split into chunks of at most `CROPS_PER_CHUNK` crops, or of one image.

    ``rows`` are ascending indices into the split. Of the views of ``arrays``, each is encoded once, unless the arrays
    hold it already: ``stored`` has the first of their views.
    """
    held = {array: len(stored.get(array, ())) for array in arrays}
    adds = {
        array: (held[array], views[held[array] :]) for array, views in arrays.items() if views[held[array] :]
    }
    views = tuple(dict.fromkeys(view for _, added in adds.values() for view in added))
    if not views:
        return []
    size = max(1, CROPS_PER_CHUNK // len(views))
    cut = (tuple(rows[start : start + size].tolist()) for start in range(0, len(rows), size))
    return [Chunk(split, images, views, BEFORE in adds, adds) for images in cut]
