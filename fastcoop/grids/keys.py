"""The key of a run: a digest of everything that determines its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from fastcoop.methods import METHODS, Data, RunSpec

RESULTS_VERSION = (
    1  # increased when a change of the code changes results: runs of older versions are done again
)


class RunKeys:
    """Makes the keys of many runs. What runs have in common is computed once.

    Targets are not part of a key: they are further tests of the same run. Before the features of a run are cached, its
    key is a provisional one.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[tuple[Any, ...], str]] = {}

    def of(self, run: RunSpec) -> str:
        """Return the sha256 hex of everything that determines a run's result, as JSON with sorted keys."""
        data, model, subset, method = run.data, run.model, run.subset, METHODS[run.method]
        sizes = (len(subset.train), len(subset.val)) if subset else None
        inputs = self._json((data, model), (), lambda: _inputs(run))
        settings = self._json(
            (run.settings, data, model),
            (run.method, run.shots, sizes),  # `Method.key_settings` does not depend on the seed
            lambda: method.key_settings(run, model),
        )
        drawn = self._json((data, subset), (), lambda: subset and _subset_digests(data, subset))
        text = (
            f'{inputs[:-1]}, "method": "{run.method}", "recipe": {RESULTS_VERSION}, "seed": {run.seed}, '
            f'"settings": {settings}, "shots": {json.dumps(run.shots)}, "subset": {drawn}}}'
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _json(self, objects: tuple[Any, ...], values: tuple[Any, ...], make: Callable[[], Any]) -> str:
        """Return the JSON of what is made of some objects, which are the same if they are identical, and values."""
        key = *map(id, objects), *values
        if key not in self._known:
            self._known[key] = (
                objects,
                json.dumps(make(), sort_keys=True),
            )  # kept, so that their ids stay theirs
        return self._known[key][1]


def _inputs(run: RunSpec) -> dict[str, Any]:
    features = run.data.store.digest if run.data.store else [run.data.name]
    return {"backbone": run.model.digest, "dataset": run.data.dataset.digest, "features": features}


def _subset_digests(data: Data, subset: Any) -> list[str | None]:
    """Return digests of a subset's training images, validation images and training features (None if not cached)."""
    features = data.store.train_digest(subset.train) if data.store else None
    return [_digest(subset.train), _digest(subset.val), features]


def _digest(indices: np.ndarray) -> str:
    return hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
