"""The keys of runs of every method stay what they were, so that a new version goes on with an old results folder.

``python -m tests.golden.test_keys`` writes ``keys.json``. Do that only where runs are meant to be done again.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from fastcoop.backbones import backbone_from_spec
from fastcoop.grids.grid import read_grid
from fastcoop.grids.planning import plan_runs
from fastcoop.methods import METHODS
from fastcoop.sweeps.loading import load_grid, open_features
from tests.golden.study import write_backbone, write_features

KEYS = Path(__file__).with_name("keys.json")
NOT_HERE = {
    "finetune_image_encoder",
    "prolip",
    "tcp",
}  # they read images, features before the projection, or a deep tower
CONTEXTS = {"context_length": 3, "class_specific": [False, True], "epochs": 2}
FAST = {
    "context_length": 3,
    "schedule": ["fast", "fast-half", {"steps": 5, "ridge": 0.01}],
    "pull": ["prompt", "none"],
}
METHODS_AND_SETTINGS = [{name: None} for name in METHODS if name not in NOT_HERE] + [
    {"coop": CONTEXTS | {"class_position": ["end", "mid", "front"], "precision": ["float32", "bfloat16"]}},
    {"coop": FAST},
    {"coop": {"context_length": 3, "epochs": 4, "select": "best_val"}},
    {"coop": {"init": "a photo of a", "epochs": 2}},
    {"kgcoop": {"schedule": "fast"}},
    {"tcp": {"layer": 1}},
    {"linear_probe": {"solver": "converged"}},
    {"zero_shot": {"prompt": "a photo of a {}."}},
    {"tip_adapter": {"selection": ["fixed", "few_val", "full_val"]}},
]  # fmt: skip


def keys(folder: Path) -> dict[str, str]:
    """The keys of runs of all methods on imported features, by method, settings, shots and seed."""
    spec = str(write_backbone(folder / "golden"))
    store = write_features(folder, backbone_from_spec(spec, device="cpu"))
    found = {}
    for methods in METHODS_AND_SETTINGS:
        grid = {
            "backbones": spec,
            "datasets": str(store),
            "shots": [1, 4],
            "seeds": 1,
            "views": 0,
            "methods": methods,
        }
        loaded = load_grid(read_grid(grid), None, "cpu")
        open_features(loaded, folder / "cache")
        for run in plan_runs(loaded.runs()):
            settings = run.settings.model_dump_json(exclude_unset=True)
            found[f"{run.method} {settings}, {run.shots} shots, seed {run.seed}"] = run.key
    return found


def test_keys_of_every_method_are_what_they_were(tmp_path: Path) -> None:
    assert keys(tmp_path) == json.loads(KEYS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        KEYS.write_text(json.dumps(keys(Path(temporary)), indent=1) + "\n", encoding="utf-8")
