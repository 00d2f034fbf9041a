"""Methods and datasets of installed packages: found in worker processes too; a bad one is one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastcoop.datasets import load_dataset, official
from fastcoop.errors import UserError
from fastcoop.methods import METHODS
from fastcoop.plugins import Registry
from fastcoop.results import load_results
from tests.advice import follows
from tests.small_world import write_backbone, write_dataset

METHOD = '''
import os
import numpy as np
from fastcoop.methods import Method, MethodSettings, Outcome, score

class Settings(MethodSettings):
    guess: int = 0

class Constant(Method[Settings]):
    """Predict one class for every image."""
    name = "constant"
    Settings = Settings
    def label(self, settings):
        return f"Constant ({settings.guess})"
    def run(self, backbone, jobs, done, context):
        for index, job in enumerate(jobs):
            (data,) = job.tests
            logits = np.zeros((len(data.test[1]), len(data.class_names)))
            logits[:, job.settings.guess] = 1.0
            done(index, Outcome({data.name: score(logits, data.test[1])}, extra={"process": float(os.getpid())}))
'''


DATASET = """
from fastcoop.datasets import Download, OfficialDataset

def read(home):
    items = [(f"{name}{i}.jpg", label, name) for label, name in enumerate(("crow", "wren")) for i in range(2)]
    return {"train": items[::2], "test": items[1::2]}

BIRDS = OfficialDataset(
    name="birds", title="Birds", folder="birds-1.0", images="jpg", template="a photo of a {}, a bird.",
    counts=(2, 2, None, 2), read=read, downloads=(Download("birds.zip from the authors", "birds-1.0/jpg"),),
)
"""


def install(
    folder: Path, package: str, entries: str, code: str = "", group: str = "fastcoop.methods"
) -> None:
    """Lay out a package as pip does."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entries}\n")
    (folder / f"{package}.py").write_text(code)


def registry(**own: object) -> Registry[Any]:
    return Registry("fastcoop.methods", "method", own, METHODS._prepare)


def test_a_packages_method_and_dataset_run_in_worker_processes(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(site, "constant_package", "constant = constant_package:Constant", METHOD)
    install(site, "birds_package", "birds = birds_package:BIRDS", DATASET, "fastcoop.datasets")
    write_dataset(tmp_path / "data" / "colours")
    pictures = tmp_path / "data" / "birds-1.0" / "jpg"
    pictures.mkdir(parents=True)
    for name in ("crow0", "crow1", "wren0", "wren1"):
        Image.new("RGB", (16, 16), "brown").save(pictures / f"{name}.jpg")
    write_backbone(tmp_path / "tiny")
    (tmp_path / "grid.yaml").write_text(
        "backbones: tiny\ndatasets: [colours, birds]\nshots: 1\nseeds: [1, 2]\nviews: 0\n"
        "methods: {constant: {guess: [0, 1]}}\n"
    )
    command = [sys.executable, "-m", "fastcoop.cli", "sweep", "grid.yaml", "--jobs", "2"]
    path = os.pathsep.join([str(site), *sys.path])
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=True)
    rows = load_results(tmp_path / "results" / "grid")
    assert set(rows.label) == {"Constant (0)", "Constant (1)"}
    assert len(rows) == 8
    assert (rows.accuracy == rows.dataset.map({"colours": 25, "birds": 50})).all()


def test_objects_are_imported_when_they_are_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "lazy_package", "constant = lazy_package:Constant\nother = nowhere:Other", METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    methods = registry(coop=1)
    assert methods["coop"] == 1
    assert list(methods) == ["coop", "constant", "other"]
    assert "constant" in methods
    assert "absent" not in methods
    assert len(methods) == 3
    assert "lazy_package" not in sys.modules
    assert methods["constant"].name == "constant"
    with pytest.raises(KeyError):
        methods["absent"]


@follows('The {} "{}" of the package {} cannot be used ({}: {}); repair or uninstall the package.')
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("constant = bad_package:Absent", "AttributeError"),
        ("constant = nowhere:Constant", "ModuleNotFoundError"),
        ("constant = bad_package:Settings", "expected a fastcoop.methods.Method, got Settings"),
        ("named = bad_package:Constant", 'its attribute name is "constant"'),
    ],
)
def test_a_bad_package_is_one_sentence_until_it_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, message: str
) -> None:
    install(tmp_path, "bad_package", entry, METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_package", raising=False)
    name = entry.partition(" ")[0]
    with pytest.raises(
        UserError, match=f'^The method "{name}" of the package bad_package cannot be used .*{message}'
    ):
        registry()[name]
    assert registry(coop=1)["coop"] == 1
    install(tmp_path, "bad_package", "constant = bad_package:Constant", METHOD)
    assert registry()["constant"].name == "constant"


@follows("both provide the")
def test_a_name_of_two_packages_is_one_sentence_until_one_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for package in ("first_package", "second_package"):
        install(tmp_path / package, package, f"constant = {package}:Constant", METHOD)
        monkeypatch.syspath_prepend(tmp_path / package)
    with pytest.raises(UserError, match=r'both provide the method "constant"; uninstall one of them'):
        registry()["constant"]
    assert registry(constant=1)["constant"] == 1
    assert list(registry(constant=1)) == ["constant"]
    assert "is not used: fastcoop has its own" in caplog.text
    (tmp_path / "first_package" / "first_package-1.0.dist-info" / "entry_points.txt").unlink()
    assert registry()["constant"].name == "constant"


def test_a_packages_dataset_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {name: official.OFFICIAL[name] for name in ("dtd", "eurosat")}
    install(
        tmp_path,
        "birds_package",
        "birds = birds_package:BIRDS\nother = birds_package:read",
        DATASET,
        "fastcoop.datasets",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(official, "OFFICIAL", Registry("fastcoop.datasets", "dataset", own, official._check))
    with pytest.raises(
        UserError, match=r"Birds is not in .*get birds\.zip from the authors and extract it in"
    ):
        load_dataset("birds", tmp_path)
    (tmp_path / "birds-1.0" / "jpg").mkdir(parents=True)
    for name in ("crow0", "crow1", "wren0", "wren1"):
        (tmp_path / "birds-1.0" / "jpg" / f"{name}.jpg").touch()
    birds = load_dataset("birds", tmp_path)
    assert (birds.class_names, birds.title) == (("crow", "wren"), "Birds")
    assert birds.splits["test"].paths == ("crow1.jpg", "wren1.jpg")
    with pytest.raises(
        UserError, match=r'"other" of the package birds_package cannot be used .*OfficialDataset'
    ):
        load_dataset("other", tmp_path)
