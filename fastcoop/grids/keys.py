"""The key of a run: a digest of everything that determines its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from fastcoop.methods import METHODS, RunSpec

RESULTS_VERSION = 1  # increased when a change of the code changes results: older runs are done again


class RunKeys:
    """Makes the keys of many runs. What runs have in common is computed once.

    Targets are not part of a key: they are further tests of the same run. Before the features of a run are cached, its
    key is a provisional one.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[tuple[Any, ...], str]] = {}

    def of(self, run: RunSpec) -> str:
        """Return the sha256 hex of everything that determines a run's result, as JSON with sorted keys."""
        method, data, model, subset = METHODS[run.method], run.data, run.model, run.subset
        store = data.store

        def inputs() -> dict[str, Any]:
            features = store.digest if store else [data.name]
            found = {"backbone": model.digest, "dataset": data.dataset.digest, "features": features}
            return found | ({"pre": store and store.before_digest} if "pre" in method.kinds else {})

        def drawn() -> list[str | None] | None:
            """Digests of training images, validation images and training features (None if not cached)."""
            features = store.train_digest(subset.train) if subset and store else None
            return [_digest(subset.train), _digest(subset.val), features] if subset else None

        sizes: tuple[int, ...] | None = None  # of the draw: settings depend on nothing else of the seed
        if subset:
            sizes = len(subset.train), len(subset.val), len(data.readable("train", subset.train))
        given = (run.settings, data, model), (run.method, run.shots, sizes)
        settings = self._json(*given, lambda: method.key_settings(run, model))
        text = (
            f'{self._json((data, model), method.kinds, inputs)[:-1]}, "method": "{run.method}", '
            f'"recipe": {RESULTS_VERSION}, "seed": {run.seed}, "settings": {settings}, '
            f'"shots": {json.dumps(run.shots)}, "subset": {self._json((data, subset), (), drawn)}'
        )
        if (rows := method.read_draw(run)) is not None:
            text += f', "tuned_on": "{_digest(rows)}"'
        text += "}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _json(self, objects: tuple[Any, ...], values: tuple[Any, ...], make: Callable[[], Any]) -> str:
        """Return the JSON of what is made of some objects, which are the same if they are identical, and values."""
        key = *map(id, objects), *values
        if key not in self._known:  # the objects are kept, so that no other gets the ID of one
            self._known[key] = objects, json.dumps(make(), sort_keys=True)
        return self._known[key][1]


def _digest(indices: np.ndarray) -> str:
    return hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
