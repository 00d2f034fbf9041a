"""Fine-tuning the image encoder reads image files again, which must be those of the run's key."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcoop.methods import METHODS, Data, finetune_image_encoder
from fastcoop.results import load_results
from fastcoop.sweeps import sweep
from tests.advice import follows
from tests.methods.conftest import job
from tests.small_world import write_backbone, write_dataset


@follows("changed after its features were computed; run the same command again")
def test_images_that_change_during_a_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(tmp_path / "data" / "colours", train=2, val=1, test=2)
    picture = next((data / "train").rglob("*.png"))
    grid = {
        "backbones": str(write_backbone(tmp_path / "tiny")), "datasets": "colours", "shots": 2, "seeds": 1, "views": 0,
        "methods": {"finetune_image_encoder": {"epochs": 1, "learning_rate": 1e-4}},
    }  # fmt: skip
    places = {"data_root": tmp_path / "data", "cache": tmp_path / "cache", "results": tmp_path / "results"}
    train = finetune_image_encoder._train

    def change_and_train(*arguments):
        Image.fromarray(255 - np.asarray(Image.open(picture))).save(picture)
        return train(*arguments)

    with monkeypatch.context() as changing:
        changing.setattr(finetune_image_encoder, "_train", change_and_train)
        (error,) = sweep(grid, **places, jobs=1).failed.values()
    assert f"{picture.name} changed after its features" in error
    assert sweep(grid, **places, jobs=1).finished == 1
    assert (load_results(places["results"]).status == "done").all()


def test_a_run_is_kept_where_no_validation_image_can_be_read(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data" / "colours", train=2, val=1, test=2)
    for picture in (data / "val").rglob("*.png"):
        picture.write_bytes(b"no picture")
    grid = {
        "backbones": str(write_backbone(tmp_path / "tiny")), "datasets": "colours", "shots": 1, "seeds": 1, "views": 0,
        "methods": {"finetune_image_encoder": {"epochs": 1}},
    }  # fmt: skip
    places = {"data_root": tmp_path / "data", "cache": tmp_path / "cache", "results": tmp_path / "results"}
    summary = sweep(grid, **places, jobs=1, skip_unreadable=True)
    assert (summary.finished, summary.failed) == (1, {})
    assert "val_accuracy" not in json.loads(load_results(places["results"]).extra[0])


def test_a_sweep_says_what_reading_images_costs(data: Data) -> None:
    runs = [job(data, "finetune_image_encoder", seed=seed, epochs=3) for seed in (1, 2)]
    (sentence,) = METHODS["finetune_image_encoder"].notes(runs)
    assert "2 runs, one after the other, with 36 images forward and backward" in sentence
    assert "and 54 forward" in sentence
