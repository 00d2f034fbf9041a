"""The feature store: images through the frozen image tower once, kept in one HDF5 file, read many times."""

from fastcoop.features.cache import cache_features
from fastcoop.features.check import StoreReport, check_store
from fastcoop.features.imported import import_features
from fastcoop.features.store import FeatureStore, store_path

__all__ = ["FeatureStore", "StoreReport", "cache_features", "check_store", "import_features", "store_path"]
