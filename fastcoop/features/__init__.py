"""The feature store: images through the frozen image tower once, kept in one HDF5 file, read many times."""

from fastcoop.features.cache import cache_all, cache_features
from fastcoop.features.check import StoreReport, check_store
from fastcoop.features.imported import import_features
from fastcoop.features.store import FeatureStore, find_dataset, store_path

__all__ = [
    "FeatureStore",
    "StoreReport",
    "cache_all",
    "cache_features",
    "check_store",
    "find_dataset",
    "import_features",
    "store_path",
]
