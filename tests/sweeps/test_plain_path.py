"""A study on the demo's objects with two models whose prompts share nothing: one like SigLIP, one with a BERT."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

import fastcoop as fc
from fastcoop.backbones import backbone_from_spec
from fastcoop.demo import world
from fastcoop.demo.world import DatasetPlan, build_world
from fastcoop.errors import UserError
from fastcoop.reports.items import field_fewshot, figure3
from fastcoop.reports.study import read_study
from fastcoop.results import load_results
from fastcoop.sweeps import interpret, sweep
from tests.advice import follows
from tests.engine.plain_towers import write_plain
from tests.tokenizers import WORDS

GRID = {
    "datasets": "objects",
    "shots": [1, 2],
    "seeds": [1],
    "views": 0,
    "methods": {
        "zero_shot": None,
        "coop": {"context_length": 2, "class_specific": [False, True], "epochs": "3 steps"},
        "kgcoop": {"init": "a photo", "epochs": 1},
        "prograd": {"context_length": 4, "epochs": 1},
        "cocoop": {"init": "a photo", "epochs": 1},
    },
}


@pytest.fixture
def specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    objects = next(one for one in world.plan() if one.name == "objects")
    members = {
        split: {name: keys[:3] for name, keys in sorted(classes.items())[:3]}
        for split, classes in objects.members.items()
    }
    few = DatasetPlan(objects.name, objects.template, objects.variation, members)
    monkeypatch.setattr(world, "plan", lambda: [few])
    build_world(tmp_path / "data")
    names = " ".join([*members["test"], objects.template]).replace("_", " ").replace("{}.", "").split()
    words = list(dict.fromkeys([*WORDS, *names]))
    return [str(write_plain(tmp_path / kind, kind, words)) for kind in ("siglip", "bert")]


@follows("which {} does not have: {}; export with --format safetensors")
def test_a_study_runs_from_features_to_figure_3(tmp_path: Path, specs: list[str]) -> None:
    folders = {"data_root": tmp_path / "data", "cache": tmp_path / "cache", "results": tmp_path / "results"}
    summary = sweep({"backbones": specs} | GRID, jobs=1, **folders)
    assert (summary.runs, summary.failed) == (2 + 2 * 2 * 5, {})
    found = load_results(folders["results"])
    assert found.accuracy.between(0, 100).all()
    assert set(found.status) == {"done"}
    for spec in specs:
        assert len(interpret(folders["results"], backbone_from_spec(spec))) > 0
    run = found[(found.method == "coop") & (found.backbone == "bert")].iloc[0]
    export = partial(fc.export_run, folders["results"], run.key, backbone=specs[1])
    for kind in ("safetensors", "classifier"):
        export(kind, tmp_path / kind)
    assert {"text_features"} <= set(load_file(tmp_path / "classifier"))
    with pytest.raises(UserError, match=r"causal text tower, which bert does not have.*--format safetensors"):
        export("coop", tmp_path / "coop")
    more = GRID | {
        "backbones": specs,
        "seeds": [2],
        "methods": {"coop": {"context_length": 2, "epochs": "3 steps"}},
    }
    said = "\n".join(sweep(more, jobs=1, dry_run=True, **folders).forecast.lines())
    assert (
        "siglip  prompts on the plain path (its attention is not causal): 48 positions per run and step"
        in said
    )
    assert said.count("its tokenizer drops their full stop") == 1

    study = read_study(folders["results"])
    for item in (figure3.ITEM, field_fewshot.ITEM):  # also where, by chance, all accuracies are equal
        drawn = item.make(study)
        assert len(drawn) >= len(specs)
        for number, exhibit in enumerate(drawn):
            if exhibit.figure is not None:
                exhibit.figure.savefig(tmp_path / f"{item.name}-{number}.png")
    assert len(list(tmp_path.glob("figure3-*.png"))) == len(specs)
