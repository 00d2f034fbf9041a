"""The projection of Figure 3, and the study in miniature: every part is there, and adds up."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcoop.bench import Bench, figure
from fastcoop.bench.study import measure_study
from fastcoop.cli import main
from fastcoop.prompts import PromptLayout
from tests.engine.conftest import tiny_backbone
from tests.pretend_gpu import pretend_gpu
from tests.small_world import write_backbone, write_dataset

NAMES = ["cat", "cat fish", "dog", "a big lion"]
RATE = {"end": 1e9, "mid": 2e9, "class-specific": 4e9}
ROW = {"classes": 4, "official_image_s": 0.32, "official_text_s": 2.0}
PARTS = ["caching", "linear probes", "trainings", "tests", "report", "all"]


@pytest.mark.parametrize("gpu", [nullcontext, pretend_gpu])
def test_figure_3_is_projected_by_part(monkeypatch: pytest.MonkeyPatch, gpu) -> None:
    monkeypatch.setattr(figure, "paper_class_names", lambda: {"eurosat": NAMES, "imagenet": NAMES[:3]})
    monkeypatch.setattr(figure, "CONTEXT_LENGTH", 2)
    layouts = {
        "end": PromptLayout(2),
        "mid": PromptLayout(2, "mid"),
        "class-specific": PromptLayout(2, "end", True),
    }
    monkeypatch.setattr(figure, "LAYOUTS", layouts)
    monkeypatch.setattr(figure, "PROBE_CLASSES", 3)
    monkeypatch.setattr(figure, "SCORED", (64, 10))
    monkeypatch.setattr(figure, "PHOTOS", 3)
    monkeypatch.setattr(figure, "report", lambda results, out: None)
    if gpu is pretend_gpu:  # which is slow; these two parts are the CPU's in any case
        monkeypatch.setattr(figure, "FAST_RUNS", 1)
        monkeypatch.setattr(figure, "_probe_seconds", lambda backbone: 1.0)
        monkeypatch.setattr(figure, "_report_seconds", lambda: 1.0)
    bench = Bench({}, [ROW | {"layout": layout, "flops_per_s": rate} for layout, rate in RATE.items()])
    with gpu():
        backbone = tiny_backbone(torch.float32)
        if gpu is pretend_gpu:
            backbone.model.to("cuda")
        found = figure.project_figure(backbone, bench).set_index("part")
        step = {
            name: figure.plan_training(backbone, [figure._shape(NAMES, name, 1, "eurosat")]) for name in RATE
        }
    assert list(found.index) == PARTS
    hours = found.drop(index="all")
    np.testing.assert_allclose(hours.sum(), found.loc["all"])
    assert (found.drop(columns="official") > 0).all().all()
    assert hours.fast.drop("trainings").tolist() == hours.paper.drop("trainings").tolist()
    # Batches of all images where there are fewer than 32: an epoch is a step.
    steps = {"eurosat": 50 + 100 + 100 + 200 + 2 * 200, "imagenet": 4 * 50 + 50}
    images = {"eurosat": 8100, "imagenet": 50000}
    training = sum(3 * 4 * steps[name] * (0.32 + 0.5 * n) for name, n in (("eurosat", 4), ("imagenet", 3)))
    testing = 60 * 0.01 * sum(images.values())
    assert found.official.trainings == pytest.approx(training / 3600)
    assert found.official.tests == pytest.approx(testing / 3600)
    assert step["end"].flops / 50 == step["end"].runs[0].tree.flops
    eurosat = sum(3 * steps["eurosat"] * step[name].flops / 50 / RATE[name] for name in ("end", "mid"))
    assert found.paper.trainings > eurosat / 3600


def test_a_study_in_miniature_has_all_parts(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data" / "colours")
    tiny = {
        "backbones": str(write_backbone(tmp_path / "tiny")),
        "datasets": "colours",
        "shots": 1,
        "seeds": 1,
    }
    coop = {"fast": {"context_length": 1, "schedule": "fast"}, "paper": {"context_length": 1, "epochs": 1}}
    parts = measure_study(tiny | {"views": 0}, coop, data_root=tmp_path / "data").set_index("part")
    assert list(parts.index) == [
        "caching", "zero-shot", "linear probes", "training steps", "planning, tests, records", "report"
    ]  # fmt: skip
    assert (parts > 0).all().all()
    np.testing.assert_allclose(parts[["share, fast", "share, paper"]].sum(), 1)


def test_other_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--measure", "everything"])
    assert ended.value.code == 2
    assert 'Only "study" can be measured, not "everything".' in capsys.readouterr().err
