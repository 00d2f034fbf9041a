"""Settings of runs as results are compared by them: equal where they are written differently but make the same run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

# Settings that older results lack, with their default, and one that only records a number.
DEFAULTS = {"select": "last", "precision": "float32", "solver": "official"}
RECORDS_ONLY = "val_accuracy"


def plain_settings(run: Any) -> dict[str, Any]:
    """Return the settings of a run without those that are written differently but mean the same.

    Left out are settings that are None, defaults that older results lack, and a setting that records a number only.
    The columns stand for settings that they resolve: ``epochs``, ``selection``, and a fast ``schedule`` with its
    ``pull``.

    Args:
        run: a row of a results table, as a named tuple; ``settings`` is JSON, or a mapping.
    """
    given: Mapping[str, Any] = json.loads(run.settings) if isinstance(run.settings, str) else run.settings
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
    return found
