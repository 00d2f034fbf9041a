"""The feature store: images through the frozen image tower once, kept in one HDF5 file, read many times."""

from fastcoop.features.cache import cache_features
from fastcoop.features.store import FeatureStore, store_path

__all__ = ["FeatureStore", "cache_features", "store_path"]
