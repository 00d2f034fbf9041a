"""The feature store: images through the frozen image tower once, kept in one HDF5 file, read many times."""

from typing import TYPE_CHECKING

from fastcoop.memo import late_names

if TYPE_CHECKING:
    from fastcoop.features.cache import UnreadableImages, cache_all, cache_features
    from fastcoop.features.check import StoreReport, check_store
    from fastcoop.features.imported import import_features
    from fastcoop.features.pictures import PictureFinder
    from fastcoop.features.store import (
        FeatureStore,
        find_dataset,
        find_datasets,
        open_current,
        open_if_there,
        store_path,
    )
    from fastcoop.features.store_file import StoreMeta, StoreVersion
else:
    __getattr__ = late_names(__name__)

__all__ = [
    "FeatureStore", "PictureFinder", "StoreMeta", "StoreReport", "StoreVersion", "UnreadableImages", "cache_all",
    "cache_features", "check_store", "find_dataset", "find_datasets", "import_features", "open_current",
    "open_if_there", "store_path",
]  # fmt: skip
