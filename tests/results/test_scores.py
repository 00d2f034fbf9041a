"""What a score depends on is recorded with it: it is made again where that changed, and never taken for another's."""

from __future__ import annotations

import json
import math
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file

from fastcoop.errors import UserError
from fastcoop.features import cache_features
from fastcoop.methods import METHODS, Method, MethodSettings, Outcome, score
from fastcoop.reports import report
from fastcoop.results import load_contexts, load_failures, load_predictions, load_results, merge_results
from fastcoop.results.listing import list_runs
from fastcoop.results.read import load_run
from fastcoop.results.schema import VERSION
from fastcoop.results.tables import pair_folders, pair_labels
from fastcoop.sweeps import Summary, evaluate, sweep
from tests.advice import follows
from tests.small_world import write_dataset

pytestmark = pytest.mark.usefixtures("undrawn")
Sweep = Callable[..., Summary]
COOP = {"context_length": 2, "epochs": 2}
METHODS_OF_ALL = {
    "zero_shot": {"prompts": [None, "some {}."]},
    "ensemble": None,
    "linear_probe": {"iterations": 5},
    "text_bias": {"epochs": 2, "learning_rate": 0.1},
    "text_transform": {"epochs": 2, "learning_rate": 0.1},
    "coop": COOP,
}


@pytest.fixture
def folders(world: Path, tmp_path: Path) -> dict[str, Path]:
    """A copy of the world's pictures, with features and results of its own."""
    shutil.copytree(world / "data", tmp_path / "data")
    return {"data_root": tmp_path / "data", "cache": tmp_path / "cache", "results": tmp_path / "results"}


@pytest.fixture
def small(grid: dict[str, Any]) -> dict[str, Any]:
    return grid | {"shots": 1, "seeds": 1, "targets": {"colours": "shifted"}, "methods": METHODS_OF_ALL}


def confidences(folder: Path, dataset: str) -> dict[str, list[float]]:
    keys = load_results(folder).query("dataset == @dataset").key
    return {key: load_predictions(folder, key, dataset).confidence.tolist() for key in keys}


def say_prompt(folder: Path, prompt: str) -> None:
    (folder / "dataset.yaml").write_text(f"template: {json.dumps(prompt)}\n")


def test_a_target_whose_prompt_changed_is_tested_again(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(small, **folders).finished == 7
    before = confidences(folders["results"], "shifted")
    say_prompt(folders["data_root"] / "shifted", "qqq zzz {} www")
    monkeypatch.setattr("fastcoop.engine.train", lambda *_, **__: pytest.fail("trained again"))
    methods = load_results(folders["results"]).drop_duplicates("key").set_index("key")
    assert run(small, **folders, dry_run=True).done_before == 3
    assert run(small, **folders).finished == 4
    assert run(small, **folders).finished == 0
    monkeypatch.undo()
    run(small, **folders | {"results": folders["results"].with_name("clean")})
    after, clean = (
        confidences(folders["results"].with_name(name), "shifted") for name in ("results", "clean")
    )
    assert after == clean
    changed = {methods.label[key] for key in after if after[key] != before[key]}
    prompted = {"Zero-shot CLIP", "Prompt ensemble (7)", "Text bias", "Text transform"}
    assert prompted >= changed >= {"Zero-shot CLIP"}


def test_a_target_whose_pictures_changed_is_tested_again(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path]
) -> None:
    run(small, **folders, only=["zero_shot", "coop"])
    for path in (folders["data_root"] / "shifted").rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    (folders["cache"] / "tiny" / "shifted.h5").unlink()
    assert run(small, **folders, only=["zero_shot", "coop"]).finished == 3
    assert run(small, **folders, only=["zero_shot", "coop"]).finished == 0


def test_a_run_whose_training_images_changed_beside_their_center_learns_again(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path]
) -> None:
    """The test-time crop, whose features are in the run's key, is the same; augmented views are not."""
    images = list((folders["data_root"] / "colours" / "train").rglob("*.png"))
    for path in images:
        Image.open(path).resize((72, 24)).save(path)
    only = ["zero_shot", "coop"]
    coop = {"context_length": 2, "epochs": 3, "learning_rate": 0.1}
    grid = small | {"methods": {"zero_shot": None, "coop": coop}}
    assert run(grid, **folders, only=only).finished == 2
    first = folders["results"].with_name("first")
    shutil.copytree(folders["results"], first)
    grid |= {"targets": {}}
    key = load_results(folders["results"]).query("method == 'coop'").key.iloc[0]
    before = load_contexts(folders["results"], key)
    for path in images:
        wide = np.array(Image.open(path))
        wide[:, :20] = wide[:, -20:] = 255
        Image.fromarray(wide).save(path)
    assert run(grid, **folders, only=only, dry_run=True).done_before == 1
    assert run(grid, **folders, only=only).finished == 1
    assert run(grid, **folders, only=only).finished == 0
    clean = folders | {name: folders[name].with_name(f"clean-{name}") for name in ("results", "cache")}
    run(grid, **clean, only=only)
    after = load_contexts(folders["results"], key)
    assert np.array_equal(after, load_contexts(clean["results"], key))
    assert not np.array_equal(after, before)
    tested = load_results(folders["results"]).query("key == @key").dataset.tolist()
    assert tested == ["colours"], "what was learned from the old pictures was tested on shifted"
    with pytest.raises(UserError, match="learned from other images"):
        merge_results([first], folders["results"])


def test_tests_by_other_prompts_are_not_merged(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path]
) -> None:
    run(small, **folders, only=["zero_shot"])
    say_prompt(folders["data_root"] / "shifted", "qqq zzz {} www")
    other = folders["results"].with_name("other")
    run(small, **folders | {"results": other}, only=["zero_shot"])
    before = load_results(folders["results"])
    with pytest.raises(UserError, match=r"on shifted .* \(with other prompts\)"):
        merge_results([other], folders["results"])
    assert before.equals(load_results(folders["results"]))


def test_classes_of_one_name_are_all_shown(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path]
) -> None:
    names = folders["data_root"] / "colours" / "dataset.yaml"
    names.write_text("class_names: {green: grey}\n")
    run(small | {"targets": {}}, **folders, only=["zero_shot"])
    key = load_results(folders["results"]).key.iloc[0]
    assert len(load_run(folders["results"], key)["tests"]["colours"]["per_class"]) == 4


def test_runs_by_two_prompts_of_a_dataset_are_told_apart(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    small |= {"shots": [1, 2], "targets": {}}
    run(small, **folders)
    say_prompt(folders["data_root"] / "colours", "qqq zzz {} www")
    # Zero-shot CLIP, the ensemble, and two text learners at two shots.
    assert run(small, **folders).finished == 1 + 1 + 2 + 2
    table = load_results(folders["results"])
    zero = table[table.label == "Zero-shot CLIP"]
    prompts = ["a photo of a {}.", "qqq zzz {} www"]
    assert [json.loads(text)["dataset_prompt"] for text in zero.settings] == prompts
    assert [json.loads(text) for text in zero.prompts] == [[prompt] for prompt in prompts]
    with pytest.raises(UserError, match=r"2 runs of Zero-shot CLIP .* differ in dataset_prompt"):
        pair_labels(table, "Zero-shot CLIP", "CoOp (M=2, end)", "here")
    report(folders["results"], tmp_path / "report")
    figure = pd.read_csv(tmp_path / "report" / "figure3.csv")
    current = table[(table.label == "Zero-shot CLIP")].accuracy.iloc[-1]
    shown = figure[figure.method == "Zero-shot CLIP"]
    assert (shown["runs"] == 1).all()
    assert shown["mean"].tolist() == [pytest.approx(current)]


def test_two_folders_are_compared_by_settings_too(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    small |= {"targets": {}, "methods": {"coop": COOP | {"learning_rate": [0.002, 0.1]}}}
    run(small, **folders)
    table = load_results(folders["results"])
    assert table.label.nunique() == 1
    assert len(pair_folders(table, table)) == 2
    with pytest.raises(UserError, match=r"2 runs .* differ in learning_rate \(0.002 and 0.1\)"):
        pair_labels(table, table.label[0], table.label[0], "here")


@pytest.fixture
def two_of_a_name(world: Path, tmp_path: Path) -> Path:
    """Datasets a/colours and b/colours; results of runs over the first."""
    write_dataset(tmp_path / "a" / "colours")
    write_dataset(tmp_path / "b" / "colours", ("grey", "green"), train=1, val=1, test=3, seed=7)
    return tmp_path


@follows("whose test would replace it; give this one another name, under name: of its YAML")
def test_evaluate_refuses_another_dataset_of_a_tested_ones_name(
    run: Sweep, small: dict[str, Any], world: Path, two_of_a_name: Path
) -> None:
    small |= {"targets": {}, "methods": {"coop": COOP}}
    place = two_of_a_name
    mine = {"data_root": place / "a", "cache": place / "cache-a", "results": place / "results"}
    run(small, **mine)
    theirs = {"data_root": place / "b", "backbones": [str(world / "tiny")]}
    key = load_results(place / "results").key[0]
    for cache in ("cache-a", "cache-b"):
        said = r"called colours \(4 classes, 20 test images\).*under name: of its YAML"
        with pytest.raises(UserError, match=said):
            evaluate(place / "results", ["colours"], cache=place / cache, **theirs)
    assert len(load_predictions(place / "results", key).labels) == 20
    (place / "b" / "colours" / "dataset.yaml").write_text("name: others")  # as the refusal says
    (tested, *_) = evaluate(place / "results", ["colours"], cache=place / "cache-b", **theirs)
    assert (tested.dataset, tested.new) == ("others", True)
    with (
        closing(sqlite3.connect(place / "results" / "results.sqlite")) as db,
        db,
    ):  # as version 1 let evaluate do
        db.execute("DELETE FROM scores WHERE dataset = 'others'")
        db.execute("DELETE FROM tests WHERE dataset = 'others'")
        db.execute("INSERT INTO tests SELECT 'other', dataset, class_names, x'0000' FROM tests")
        db.execute("UPDATE scores SET test = 'other', predictions = x'0000', confidence = x'0000'")
    assert len(load_predictions(place / "results", key).labels) == 1
    assert run(small, **mine).finished == 1
    assert len(load_predictions(place / "results", key).labels) == 20


@follows("leave {} out of the targets, and sweep again for runs with today's features")
def test_evaluate_keeps_a_runs_own_test_where_its_pictures_changed(
    run: Sweep, small: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    """The same names of classes and files, in the same cache and in one of its own."""
    small |= {"targets": {}, "methods": {"coop": COOP}}
    write_dataset(tmp_path / "a" / "colours")
    write_dataset(tmp_path / "b" / "colours", seed=7)
    results = tmp_path / "results"
    run(small, data_root=tmp_path / "a", cache=tmp_path / "cache", results=results)
    before, tiny = confidences(results, "colours"), str(world / "tiny")
    for cache in ("cache-b", "cache-b", "cache"):
        with pytest.raises(UserError, match="tested on its own dataset colours with other features"):
            evaluate(results, ["colours"], data_root=tmp_path / "b", cache=tmp_path / cache, backbones=[tiny])
    assert confidences(results, "colours") == before
    places = {"data_root": world / "data", "cache": world / "cache", "backbones": [tiny]}
    assert len(evaluate(results, ["shifted"], **places)) == 1
    assert run(small, data_root=tmp_path / "b", cache=tmp_path / "cache", results=results).finished == 1
    assert len(confidences(results, "colours")) == 2


@pytest.mark.parametrize("method", ["coop", "linear_probe", "text_bias"])
def test_what_a_run_learned_is_refused_where_its_file_holds_something_else(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path], world: Path, method: str
) -> None:
    """One bit, numbers that are none, and the file of another run."""
    small |= {"targets": {}, "methods": {method: METHODS_OF_ALL[method]}, "seeds": [1, 2]}
    run(small, **folders)
    results = folders["results"]
    one, other = sorted((results / "contexts").iterdir())
    whole = one.read_bytes()
    bit = bytearray(whole)
    bit[-2] ^= 1
    with safe_open(one, "np") as file:
        header, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    nothing = {
        name: np.full_like(array, math.nan) for name, array in arrays.items() if array.dtype.kind == "f"
    }
    for content in (bytes(bit), save(arrays | nothing, header), other.read_bytes()):
        one.write_bytes(content)
        with pytest.raises(UserError, match="does not hold what was written for run"):
            run(small | {"targets": {"colours": "shifted"}}, **folders)
        with pytest.raises(UserError, match="does not hold what was written for run"):
            evaluate(**folders, targets=["shifted"], runs=[one.stem], backbones=[str(world / "tiny")])
    one.write_bytes(whole)
    run(small | {"targets": {"colours": "shifted"}}, **folders)
    assert load_results(results).accuracy.notna().all()


def test_datasets_that_share_a_name_are_refused(
    run: Sweep, small: dict[str, Any], world: Path, two_of_a_name: Path
) -> None:
    place = two_of_a_name
    write_dataset(place / "Colours", ("grey", "green"))
    small |= {"targets": {}, "methods": {"zero_shot": None}}
    where = {"data_root": place, "cache": place / "cache", "results": place / "results"}
    for pair, said in (
        (["a/colours", "b/colours"], '"a/colours" and "b/colours" are both called colours'),
        (["a/colours", "Colours"], "are both called Colours"),
        (["a/colours:base", "b/colours"], "are of two datasets called colours"),
    ):
        with pytest.raises(UserError, match=said):
            run(small | {"datasets": pair}, **where)
    run(small | {"datasets": "a/colours"}, **where)
    with pytest.raises(UserError, match="are both called colours"):
        evaluate(
            place / "results", ["a/colours", "b/colours"], data_root=place, backbones=[str(world / "tiny")]
        )


def test_merged_datasets_of_one_name_are_shown_apart(
    run: Sweep, small: dict[str, Any], two_of_a_name: Path
) -> None:
    place = two_of_a_name
    small |= {"targets": {}, "methods": {"zero_shot": None, "coop": COOP}}
    for name in ("a", "b"):
        run(small, data_root=place / name, cache=place / f"cache-{name}", results=place / f"results-{name}")
    assert merge_results([place / "results-a", place / "results-b"], place / "all") == 4
    report(place / "all", place / "report")
    figure = pd.read_csv(place / "report" / "figure3.csv")
    assert figure.dataset.nunique() == 3, "two datasets and their average"
    assert (figure[~figure.dataset.str.startswith("Average")]["runs"] == 1).all()


def test_runs_over_other_features_are_never_averaged_as_seeds(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    """Of another recipe, precision or number of views: the report shows a series of each."""
    small |= {"targets": {}, "methods": {"coop": COOP}}
    others = {
        "recipe official-2021": {"recipe": "official-2021"},
        "views 2": {"views": 2},
        "feature precision bfloat16": {},
    }
    pictures = folders["data_root"] / "colours"
    cache_features(world / "tiny", pictures, tmp_path / "cache-4", shots=1, seeds=4, precision="bfloat16")
    run(small | {"views": 8}, **folders)
    for number, change in enumerate(others.values(), 2):
        again = small | {"views": 8, "seeds": [number]} | change
        run(again, **folders | {"cache": tmp_path / f"cache-{number}"})
    report(folders["results"], tmp_path / "report")
    figure = pd.read_csv(tmp_path / "report" / "figure3.csv")
    shown = figure[figure.dataset == "colours"]
    assert sorted(shown["runs"]) == [1, 1, 1, 1]
    assert all(shown.method.str.contains(fact).sum() == 1 for fact in others)
    table = load_results(folders["results"])
    assert sorted(json.loads(text).get("views", 8) for text in table.settings) == [2, 8, 8, 8]
    run(
        small | {"views": 8, "seeds": 1, "recipe": "official-2021"},
        **folders | {"cache": tmp_path / "cache-2"},
    )
    assert set(list_runs(folders["results"]).recipe) == {"-", "official-2021"}
    with pytest.raises(UserError, match="differ in recipe"):
        pair_labels(load_results(folders["results"]), table.label[0], table.label[0], "here")


def test_backbones_of_one_name_are_told_apart(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    small |= {"targets": {}, "methods": {"coop": COOP}}
    run(small, **folders)
    shutil.copytree(world / "tiny", tmp_path / "tiny")
    weights = load_file(tmp_path / "tiny" / "open_clip_model.safetensors")
    weights = {name: np.asarray(np.float32(1.01) * one) for name, one in weights.items()}
    save_file(weights, tmp_path / "tiny" / "open_clip_model.safetensors")
    again = folders | {"cache": tmp_path / "cache-2"}
    run(small | {"seeds": [2], "backbones": str(tmp_path / "tiny")}, **again)
    report(folders["results"], tmp_path / "report")
    figures = [pd.read_csv(path) for path in (tmp_path / "report").glob("figure3*.csv")]
    assert [figure["runs"].max() for figure in figures] == [1, 1]
    table = load_results(folders["results"])
    run(small | {"backbones": str(tmp_path / "tiny")}, **again | {"results": tmp_path / "second"})
    with pytest.raises(UserError, match="the second was over other weights of the same name"):
        pair_folders(table, load_results(tmp_path / "second"))


def test_folders_over_other_pictures_of_a_name_are_not_compared(
    run: Sweep, small: dict[str, Any], tmp_path: Path
) -> None:
    small |= {"targets": {}, "methods": {"coop": COOP}}
    write_dataset(tmp_path / "a" / "colours")
    write_dataset(tmp_path / "b" / "colours", seed=3)
    write_dataset(tmp_path / "c" / "colours", test=6)
    tables = {}
    for name in "abc":
        place = {"cache": tmp_path / f"cache-{name}", "results": tmp_path / f"results-{name}"}
        run(small, data_root=tmp_path / name, **place)
        tables[name] = load_results(tmp_path / f"results-{name}")
    with pytest.raises(UserError, match="other pictures of the same names"):
        pair_folders(tables["a"], tables["b"])
    with pytest.raises(UserError, match="other images or classes of the same name"):
        pair_folders(tables["a"], tables["c"])


class OwnColumns(Method[MethodSettings]):
    """A method of somebody else's, with columns of its own."""

    name = "own"
    Settings = MethodSettings
    named = "alpha"

    def label(self, settings: MethodSettings) -> str:
        return "Own"

    def columns(self, job: Any, backbone: Any) -> dict[str, Any]:
        return {self.named: np.float32(0.5), "epochs": 3, "note": "=1+1", "lost": float("nan")}

    def run(self, backbone: Any, jobs: Any, done: Any, context: Any) -> None:
        for index, job in enumerate(jobs):
            logits = {data.name: np.eye(len(data.class_names))[data.test[1]] for data in job.tests}
            scores = {data.name: score(logits[data.name], data.test[1]) for data in job.tests}
            done(index, Outcome(scores, weights={"a": np.zeros(1)}, extra={"lost": float("nan")}))


def test_a_method_has_columns_of_its_own(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = OwnColumns()
    monkeypatch.setitem(METHODS, "own", own)
    small |= {"methods": ["zero_shot", "own"]}
    run(small, **folders)
    table = load_results(folders["results"]).drop_duplicates("key").set_index("method")
    assert (table.alpha["own"], table.epochs["own"], table.note["own"]) == (0.5, 3, "=1+1")
    assert table.alpha.isna()["zero_shot"]
    assert table.lost.isna().all()
    own.named = "seed"
    monkeypatch.setattr(own, "named", "seed")
    with pytest.raises(UserError, match='gives its runs a column "seed", which every run has; rename it'):
        run(small, **folders | {"results": folders["results"].with_name("other")})


V1 = Path(__file__).parent / "results_v1"


def test_results_of_version_1_are_read_extended_merged_and_reported(
    run: Sweep, small: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Written by version 0.1.0: a run of each method, and two of CoOp that diverged to NaN after their last loss."""
    old = tmp_path / "old"
    shutil.copytree(V1, old)
    content = (old / "results.sqlite").read_bytes()
    table = load_results(old)
    assert len(table) == 22
    lost = table.accuracy.isna()
    assert (lost.sum(), set(table.method[lost]), set(table.status[lost])) == (4, {"coop"}, {"diverged"})
    assert (load_predictions(old, table.key[lost].iloc[0], "shifted").predicted == -1).all()
    report(old, tmp_path / "report")
    assert "2 diverged runs left out" in (tmp_path / "report" / "figure3.md").read_text()
    assert (old / "results.sqlite").read_bytes() == content, "reading changes nothing"

    assert merge_results([old], tmp_path / "merged") == 11
    assert merge_results([old, tmp_path / "merged"], tmp_path / "merged") == 0
    pd.testing.assert_frame_equal(load_results(tmp_path / "merged"), table)
    assert (old / "results.sqlite").read_bytes() == content

    contexts = {path.stem: path.read_bytes() for path in (old / "contexts").iterdir()}
    run(small | {"seeds": [1, 2]}, **folders | {"results": old})
    assert all((old / "contexts" / f"{key}.safetensors").read_bytes() == was for key, was in contexts.items())
    with closing(sqlite3.connect(old / "results.sqlite")) as db, db:
        assert db.execute("PRAGMA user_version").fetchone() == (VERSION,)
    grown = load_results(old)
    assert set(grown.key) > set(table.key)
    same = grown.set_index(["key", "dataset"]).accuracy.loc[list(zip(table.key, table.dataset, strict=True))]
    assert np.array_equal(same, table.accuracy, equal_nan=True)
    assert run(small | {"seeds": [1, 2]}, **folders | {"results": old}).finished == 0
    assert load_failures(old).empty
    assert load_contexts(old, table.key[table.method == "coop"].iloc[0]).shape == (2, 16)
    report(old, tmp_path / "report")


STATES: dict[str, Callable[[], Any]] = {
    "default dtype": lambda: set_back(torch.set_default_dtype, torch.get_default_dtype(), torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "deterministic": lambda: set_back(torch.use_deterministic_algorithms, False, True),
    "float errors": lambda: np.errstate(all="raise"),
    "random state": lambda: set_back(seed_all, 0, 1),
    "threads": lambda: set_back(torch.set_num_threads, torch.get_num_threads(), 2),
    "low precision": lambda: set_back(torch.set_float32_matmul_precision, "highest", "medium"),
}


@contextmanager
def set_back(setter: Callable[[Any], Any], before: Any, within: Any) -> Iterator[None]:
    setter(within)
    try:
        yield
    finally:
        setter(before)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A grid, and results of it and of a test on another dataset, by nothing but defaults."""
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    grid = {
        "backbones": str(world / "tiny"), "datasets": "colours", "targets": {"colours": "shifted"}, "shots": 1,
        "seeds": 1, "views": 1,
        "methods": METHODS_OF_ALL | {"coop": COOP | {"select": "best_val", "init": ["random", "a photo"]}},
    }  # fmt: skip
    everything(world, grid, results)
    return grid, results


def everything(world: Path, grid: dict[str, Any], results: Path) -> None:
    places = {"data_root": world / "data", "cache": results.with_name("cache")}
    sweep(grid, results=results, jobs=1, **places)
    evaluate(results, ["other"], backbones=[grid["backbones"]], **places)


@pytest.mark.parametrize("state", STATES)
def test_what_the_caller_has_set_changes_no_number(
    world: Path, undisturbed: tuple[dict[str, Any], Path], tmp_path: Path, state: str
) -> None:
    """Features, runs and scores: the same keys, and the same bits under each."""
    grid, whole = undisturbed
    with STATES[state]():
        before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
        everything(world, grid, tmp_path / "results")
        after = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    columns = ["key", "dataset", "accuracy", "losses", "extra", "features", "prompts", "status"]
    one, two = (
        load_results(folder)[columns].sort_values(["key", "dataset"], ignore_index=True)
        for folder in (whole, tmp_path / "results")
    )
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    for key, dataset in zip(one.key, one.dataset, strict=True):
        said = [load_predictions(folder, key, dataset).confidence for folder in (whole, tmp_path / "results")]
        assert np.array_equal(*said)
    for path in (whole / "contexts").iterdir():
        learned = [load_file(path), load_file(tmp_path / "results" / "contexts" / path.name)]
        assert learned[0].keys() == learned[1].keys()
        assert all(np.array_equal(learned[0][name], learned[1][name]) for name in learned[0])
