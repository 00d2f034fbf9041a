"""Settings of runs as results are compared by them: equal where they are written differently but make the same run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

# Settings that older results lack, with their default, and one that only records a number.
DEFAULTS = {"select": "last", "precision": "float32", "solver": "official"}
# Values that runs of `selection: fixed` have where none are given and that they do not record.
FIXED = {
    "prolip": {"learning_rate": 1e-5},
    "cross_modal": {"learning_rate": 1e-3, "weight_decay": 0.01, "batch_size": 8},
}
RECORDS_ONLY = "val_accuracy"
DIGITS = 6  # of values that a run recorded in float32


def plain_settings(run: Any) -> dict[str, Any]:
    """Return the settings of a run without those that are written differently but mean the same.

    Left out are settings that are None, defaults that older results lack, and a setting that records a number only.
    The columns stand for settings that they resolve: ``epochs``, ``selection``, and a fast ``schedule`` with its
    ``pull``. Values that a run did not choose (``selection: fixed``) are those that it recorded or that its method
    fixes, given or not.

    Args:
        run: a row of a results table, as a named tuple; ``settings`` is JSON, or a mapping.
    """
    given = _mapping(run.settings)
    found = {name: one for name, one in given.items() if one is not None and one != DEFAULTS.get(name)}
    found.pop(RECORDS_ONLY, None)
    epochs, schedule, selection = (getattr(run, name, None) for name in ("epochs", "schedule", "selection"))
    if "epochs" in given and epochs is not None and not math.isnan(epochs):
        found["epochs"] = int(epochs)
    if "schedule" in given and isinstance(schedule, str) and schedule:
        found = {name: one for name, one in found.items() if name not in ("schedule", "pull")}
        if schedule.startswith("fast"):
            found["schedule"] = schedule
    if "selection" in given and isinstance(selection, str):
        found["selection"] = selection
    if found.get("selection") != "imagenet_val":
        found.pop("tuned_on", None)
    if found.get("selection") == "fixed":
        recorded = _mapping(getattr(run, "extra", None))
        found |= {name: float(f"{recorded[name]:.{DIGITS}g}") for name in given if name in recorded}
        method, shots = getattr(run, "method", ""), getattr(run, "shots", None)
        found = {**FIXED.get(method, {}), **found}
        if method == "prolip" and isinstance(shots, int | float) and found.get("lmbda") == 1 / shots > 0:
            del found["lmbda"]  # the default, but for "all" shots
    return found


def _mapping(given: Any) -> Mapping[str, Any]:
    """Return a mapping, or the one that JSON holds; {} for nothing."""
    if isinstance(given, Mapping):
        return given
    found: Mapping[str, Any] = json.loads(given) if isinstance(given, str) else {}
    return found
