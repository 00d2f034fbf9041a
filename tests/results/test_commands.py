"""Results as a user looks into them: the commands, and other programs' readers."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from fastcoop.cli import main
from fastcoop.errors import UserError
from fastcoop.reports.comparison import compare_results
from fastcoop.results import calibration_error, load_failures, load_predictions, load_results, merge_results
from fastcoop.results.store import open_store
from fastcoop.results.tables import pair_folders, pair_labels, select_rows
from fastcoop.sweeps import sweep
from tests.reports.made_up_results import coop, run

FAILURES = """CREATE TABLE IF NOT EXISTS failures (
    key TEXT PRIMARY KEY, backbone TEXT NOT NULL, dataset TEXT NOT NULL, method TEXT NOT NULL, label TEXT NOT NULL,
    shots NOT NULL, seed INTEGER NOT NULL, settings TEXT NOT NULL, error TEXT NOT NULL, failed TEXT NOT NULL
)"""


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One zero-shot run, two probes and eight of CoOp, tested on a target too. Read only."""
    results = tmp_path_factory.mktemp("looked-into") / "results"
    coop = {"context_length": 2, "class_position": ["end", "mid"], "epochs": 2}
    grid = {
        "backbones": str(world / "tiny"), "datasets": "colours", "shots": [1, "all"], "seeds": [1, 2], "views": 1,
        "targets": {"colours": "shifted"},
        "blocks": {
            "one": {"methods": {"coop": coop, "zero_shot": None}},
            "two": {"methods": "linear_probe", "seeds": 1},
        },
    }  # fmt: skip
    sweep(grid, data_root=world / "data", cache=world / "cache", results=results, jobs=1)
    return results


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A command: (exit code, standard output, standard error)."""

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["results", *map(str, arguments)])
        said = capsys.readouterr()
        return (stopped.value.code if isinstance(stopped.value.code, int) else 0), said.out, said.err

    return command


def rows(said: tuple[int, str, str]) -> list[dict[str, Any]]:
    assert said[0] == 0, said[2]
    return json.loads(said[1])


def conditions(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--where", text)]


def test_list_shows_what_is_asked_for(folder: Path, call: Callable) -> None:
    assert len(rows(call("list", folder, "--json"))) == 2 * (1 + 2 + 8)
    found = rows(
        call("list", folder, *conditions("method=coop", "dataset=shifted", "shots=all", "seed=1"), "--json")
    )
    assert {(row["label"], row["source"], row["seed"]) for row in found} == {
        ("CoOp (M=2, end)", "colours", 1), ("CoOp (M=2, mid)", "colours", 1),
    }  # fmt: skip
    two = [*conditions("method=zero_shot,linear_probe", "status=done", "backbone=tiny"), "--json"]
    assert {row["label"] for row in rows(call("list", folder, *two))} == {
        "Zero-shot CLIP",
        "Linear probe CLIP",
    }
    code, out, _ = call("list", folder, *conditions("label=CoOp (M=2, mid)", "dataset=colours"))
    assert code == 0
    said, header, *runs = out.splitlines()
    assert said == "backbone tiny, dataset colours, status done"
    assert header.split() == ["key", "label", "shots", "seed", "accuracy", "seconds"]
    assert len(runs) == 4
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = call("list", folder, "--where", "seed=9")
    assert (code, out) == (0, "No run meets this.\n")
    assert rows(call("list", folder, "--where", "seed=9", "--json")) == []


def test_list_is_sorted(folder: Path, call: Callable) -> None:
    found = rows(call("list", folder, "--where", "dataset=colours", "--json"))
    assert [(row["label"], row["shots"], row["seed"]) for row in found] == [
        *((f"CoOp (M=2, {where})", shots, seed) for where in ("end", "mid") for shots in (1, "all") for seed in (1, 2)),
        *((row["label"], shots, 1) for row, shots in zip(found[8:], (1, "all"), strict=False)),
        ("Zero-shot CLIP", 0, 0),
    ]  # fmt: skip
    assert [row["dataset"] for row in rows(call("list", folder, "--json"))] == ["colours"] * 11 + [
        "shifted"
    ] * 11


def test_failed_runs_are_listed_with_their_error(
    folder: Path, call: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(folder / "results.sqlite")) as db, db:
        db.execute(FAILURES)
        db.execute(
            "INSERT INTO failures VALUES ('f1', 'tiny', 'colours', 'coop', 'L', 4, 3, '{}', 'no room', 'now')"
        )
    try:
        (row,) = rows(call("list", folder, "--where", "status=failed", "--json"))
        assert (row["key"], row["error"], row["accuracy"]) == ("f1", "no room", None)
        for condition, count in (("shots=1", 0), ("shots=4", 1)):
            assert call("export", folder, tmp_path / "runs.csv", "--where", condition)[0] == 0
            assert caplog.text.count("1 run(s) that failed or were tested on nothing") == count
        with closing(sqlite3.connect(folder / "results.sqlite")) as db, db:
            db.execute(
                "UPDATE failures SET (dataset, shots, seed, settings, failed) = (SELECT dataset, shots, seed, settings,"
                " finished FROM runs WHERE method = 'coop' LIMIT 1)"
            )
        assert load_failures(folder).empty  # done again, on features that were computed again
        merge_results(folder, tmp_path / "all")
        assert "not merged" not in caplog.text
        with closing(sqlite3.connect(folder / "results.sqlite")) as db, db:
            db.execute("UPDATE failures SET failed = '9999'")
        assert len(load_failures(folder)) == 1
    finally:
        with closing(sqlite3.connect(folder / "results.sqlite")) as db, db:
            db.execute("DELETE FROM failures")


TABLE = pd.DataFrame(
    {
        "label": ["CoOp (M=4, end)", "CoOp (M=4, mid)", "Zero-shot", "CoOp (M=16, end)"],
        "shots": [1, "all", 0, 16],
        "accuracy": [10.0, 20.5, 30.0, float("nan")],
        "init": ["random", "a photo", None, "random"],
        "class_specific": [False, True, False, False],
        "epochs": [200.0, float("nan"), float("nan"), 50.0],
        "settings": [
            '{"learning_rate": 0.002, "epochs": "paper"}',
            '{"learning_rate": 0.01, "epochs": 20}',
            "{}",
            '{"learning_rate": 0.002}',
        ],
    }
)


@pytest.mark.parametrize(
    ("conditions", "left"),
    [
        (["shots=16"], [3]),
        (["shots=1,all"], [0, 1]),
        (["shots>1"], [1, 3]),
        (["shots!=0"], [0, 1, 3]),
        (["accuracy<20.5"], [0]),
        (["accuracy >= 20.5"], [1, 2]),
        (["label=CoOp (M=4, end)"], [0]),
        (["init=none"], [2]),
        (["init!=random"], [1, 2]),
        (["class_specific=true"], [1]),
        (["learning_rate=0.0020"], [0, 3]),
        (["learning_rate=none"], [2]),
        (["shots>0", "learning_rate<0.005", "accuracy>0"], [0]),
        (["epochs=200"], [0]),
        (["epochs=20"], [1]),
    ],
)
def test_conditions(conditions: list[str], left: list[int]) -> None:
    assert select_rows(TABLE, conditions).index.tolist() == left


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("shots", "should be NAME=VALUE"),
        ("shot=1", 'no column or setting "shot". Did you mean "shots"'),
        ("learning_rat=1", 'Did you mean "learning_rate"'),
        ("accuracy<many", '"many", which is not a number'),
    ],
)
def test_what_is_no_condition_is_said(condition: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_rows(TABLE, [condition])
    assert select_rows(TABLE.iloc[:0], ["learning_rate=1"]).empty, "no run has any setting"


def test_show_tells_all_of_a_run(folder: Path, call: Callable) -> None:
    key = load_results(folder).query("method == 'coop' and shots == 'all'").key.iloc[0]
    (run,) = [rows(call("show", folder, key[:14], "--json"))]
    assert (run["key"], run["settings"]["context_length"], len(run["losses"])) == (key, 2, 2)
    assert Path(run["contexts"]).is_file()
    assert set(run["tests"]["shifted"]["per_class"]) == {"green", "grey"}
    table = load_results(folder).set_index(["key", "dataset"])
    assert run["tests"]["colours"]["accuracy"] == table.accuracy[key, "colours"]
    code, out, _ = call("show", folder, key)
    assert code == 0
    assert "on shifted:" in out
    assert f"{run['losses'][0]} in the first of 2 epochs" in out
    for wrong, message in (("zzz", "no run"), ("", "more than one run")):
        code, _, err = call("show", folder, wrong)
        assert (code, message in err) == (2, True)


def test_two_labels_are_compared_dataset_by_dataset(folder: Path, call: Callable) -> None:
    labels = ["--labels", "CoOp (M=2, end)", "CoOp (M=2, mid)"]
    groups = rows(call("compare", folder, *labels, "--json"))
    assert [group["shots"] for group in groups] == [1, "all"]
    table = load_results(folder)
    for group in groups:
        means = table[table.shots == group["shots"]].groupby(["label", "dataset"]).accuracy.mean()
        own = group["datasets"][0]
        assert (own["dataset"], own["runs"]) == ("colours", 2)
        assert own["first"] == pytest.approx(means[labels[1], "colours"])
        assert own["difference"] == pytest.approx(means[labels[2], "colours"] - means[labels[1], "colours"])
        assert group["datasets"][1]["dataset"] == "colours > shifted"
        assert group["difference"] == pytest.approx(sum(row["difference"] for row in group["datasets"]) / 2)
    zero = rows(call("compare", folder, "--labels", "Zero-shot CLIP", "CoOp (M=2, mid)", "--json"))
    assert [(group["shots"], group["pairs"]) for group in zero] == [(1, 4), ("all", 4)]
    code, out, _ = call("compare", folder, *labels, "--where", "dataset=colours")
    assert code == 0
    assert "CoOp (M=2, mid) - CoOp (M=2, end), tiny, 1 shot" in out
    assert out.count("too few runs for a test") == 2  # two seeds of one dataset
    one = call("compare", folder, *labels, "--where", "dataset=colours", "--where", "seed=1", "--json")
    assert [group["p"] for group in rows(one)] == [None, None]
    code, _, err = call("compare", folder, "--labels", "CoOp (M=2, end)", "CoOp (M=2, front)")
    assert code == 2
    assert 'Did you mean "CoOp (M=2, ' in err
    code, _, err = call("compare", folder)
    assert (code, "Give either" in err) == (2, True)


def test_targets_of_one_dataset_are_no_datasets_of_the_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five places of one source, each with the same runs: seeds are what varies."""
    rows = [
        coop(backbone="b", dataset=f"target {place}", source="objects", shots=16, seed=seed, label=label, features=None,
             accuracy=50.0 + gain * (place + seed))
        for place in range(5) for seed in (1, 2, 3) for label, gain in (("one", 0.0), ("two", 1.0))
    ]  # fmt: skip
    monkeypatch.setattr("fastcoop.reports.comparison.load_results", lambda folder: pd.DataFrame(rows))
    (group,) = compare_results(tmp_path, labels=("one", "two"))
    assert (group["over"], group["pairs"], len(group["datasets"])) == ("seeds", 15, 5)
    assert group["difference"] == pytest.approx(4.0)
    # The seeds' gains are 3, 4 and 5 on the mean of targets, which is all that the test may know.
    assert group["p"] == pytest.approx(ttest_1samp([3.0, 4.0, 5.0], 0).pvalue)


def test_a_method_that_learns_nothing_is_compared_on_every_dataset(tmp_path: Path) -> None:
    """Zero-shot CLIP was run on the target itself, CoOp was tested there."""
    common = {"backbone": "b", "features": None}
    rows = [
        run(**common, dataset=name, method="zero_shot", label="zero", shots=0, seed=0, accuracy=50.0)
        for name in ("objects", "sketch")
    ]
    rows += [
        coop(**common, dataset=name, source="objects", label="coop", shots=16, seed=seed, accuracy=60.0)
        for name in ("objects", "sketch") for seed in (1, 2)
    ]  # fmt: skip
    for labels, difference in ((("zero", "coop"), 10.0), (("coop", "zero"), -10.0)):
        pairs = pair_labels(pd.DataFrame(rows), *labels, where=tmp_path)
        assert sorted(zip(pairs.dataset, pairs.seed, strict=True)) == [
            ("objects", 1), ("objects", 2), ("sketch", 1), ("sketch", 2),
        ]  # fmt: skip
        assert set(pairs["second"] - pairs["first"]) == {difference}
    again = {**common, "dataset": "sketch", "source": "objects", "method": "zero_shot", "label": "zero"}
    rows.append(run(**again, shots=0, seed=0, accuracy=50.0))
    assert len(pair_labels(pd.DataFrame(rows), "zero", "coop", where=tmp_path)) == 4
    second = [row | {"label": "other prompt"} for row in rows if row["method"] == "zero_shot"]
    pairs = pair_labels(pd.DataFrame(rows + second), "zero", "other prompt", where=tmp_path)
    assert sorted(zip(pairs.dataset, pairs.source, strict=True)) == [
        ("objects", "objects"), ("sketch", "objects"), ("sketch", "sketch"),
    ]  # fmt: skip
    rows[-1]["accuracy"] = 48.0  # such as by an earlier prompt of the dataset
    with pytest.raises(UserError, match=r"on sketch \(50\.00% and 48\.00%\).*such as source=sketch"):
        pair_labels(pd.DataFrame(rows), "zero", "coop", where=tmp_path)


TESTED = {"backbone": "b", "dataset": "objects", "label": "one", "shots": 16, "features": None}


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("test", ("a", "b"), "tested on other images or classes of the same name"),
        ("images", ("a", "b"), "tested on other pictures of the same names"),
        ("backbone_digest", ("a", "b"), "over other weights of the same name"),
        ("prompts", ('["a {}"]', '["{}"]'), "tested by other prompts"),
        ("settings", ('{"recipe": "current"}', '{"recipe": "official-2021"}'), "features of another recipe"),
    ],
)
def test_runs_that_were_tested_otherwise_are_no_pair(
    column: str, values: tuple[str, str], reason: str, tmp_path: Path
) -> None:
    """Unless one of them does not tell, as older results."""
    one = pd.DataFrame([coop(**TESTED, seed=seed, accuracy=50.0) for seed in (1, 2)]).assign(
        **{column: values[0]}
    )
    other = one.assign(label="two", accuracy=60.0, **{column: values[1]})
    both = pd.concat([one, other])
    if column == "prompts":  # two labels may be two prompts
        assert len(pair_labels(both, "one", "two", tmp_path)) == 2
    else:
        with pytest.raises(UserError, match=reason):
            pair_labels(both, "one", "two", tmp_path)
    if column != "settings":  # else they are other runs
        with pytest.raises(UserError, match=reason):
            pair_folders(one, other)
        assert len(pair_folders(one, other.assign(**{column: None}))) == 2


@pytest.mark.parametrize(
    ("column", "named"),
    [
        ("test", "test"), ("images", "images"), ("prompts", "prompts"), ("backbone_digest", "key"),
        ("macro_accuracy", "key"),
    ],
)  # fmt: skip
def test_a_run_that_is_there_twice_is_one_unless_its_tests_differ(column: str, named: str) -> None:
    one = pd.DataFrame([coop(**TESTED, seed=1, accuracy=50.0)]).assign(**{column: "1"})
    twice = pd.concat([one, one.assign(key="again")])
    assert len(pair_folders(twice, one)) == 1
    with pytest.raises(UserError, match=rf"^2 runs of one on objects, 16 shots,.* differ in {named} \("):
        pair_folders(pd.concat([one, one.assign(key="again", **{column: "2"})]), one)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"settings": '{"views": 8, "learning_rate": 0.01}'}, "learning_rate 0.01 and default"),
        ({"schedule": "quick: 5 epochs"}, "schedule paper and quick: 5 epochs"),
        ({"settings": '{"views": 8, "dataset_prompt": "a type of {}.", "epochs": 50}', "epochs": 50}, ""),
    ],
)
def test_one_label_with_other_settings_on_another_dataset_is_named(
    changed: dict[str, Any], named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        coop(**TESTED | {"label": label, "dataset": dataset}, seed=1, accuracy=50.0)
        for dataset in ("objects", "scenes") for label in ("one", "two")
    ]  # fmt: skip
    rows[-1] |= changed
    assert len(pair_labels(pd.DataFrame(rows), "one", "two", tmp_path)) == 2
    assert [record.message for record in caplog.records] == (
        [f"Runs of two have {named}, on different datasets or at different shots; choose one with --where."]
        if named else []
    )  # fmt: skip


def test_runs_without_an_accuracy_are_no_pair() -> None:
    one = pd.DataFrame([coop(**TESTED, seed=seed, accuracy=50.0) for seed in (1, 2)])
    lost = one.assign(accuracy=[50.0, float("nan")])
    assert pair_folders(one, lost).seed.tolist() == [1]


def test_two_folders_are_compared_run_by_run(folder: Path, call: Callable, tmp_path: Path) -> None:
    merge_results([folder], tmp_path / "other")
    with closing(sqlite3.connect(tmp_path / "other" / "results.sqlite")) as db, db:
        db.execute("UPDATE scores SET accuracy = accuracy + 3 WHERE dataset = 'colours'")
    groups = rows(call("compare", folder, tmp_path / "other", "--where", "method=coop", "--json"))
    assert len(groups) == 4
    for group in groups:
        assert [row["difference"] for row in group["datasets"]] == pytest.approx([3, 0])
        assert (group["p"], group["over"]) == (
            None,
            "seeds",
        )  # two seeds: their two targets test the same runs
    said = call("compare", folder, tmp_path / "other", "--where", "method=coop")[1]
    assert said.count("too few runs for a test") == 4
    with closing(sqlite3.connect(tmp_path / "other" / "results.sqlite")) as db, db:
        db.execute("UPDATE runs SET seed = seed + 10")
    code, _, err = call("compare", folder, tmp_path / "other", "--where", "method=coop")
    assert (code, "No run of one folder has the method" in err) == (2, True)


def test_pandas_reads_exports_and_the_store_with_nothing_of_ours(
    folder: Path, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = load_results(folder)
    assert call("export", folder, tmp_path / "runs.csv")[0] == 0
    csv = pd.read_csv(tmp_path / "runs.csv")
    assert csv.key.tolist() == table.key.tolist()
    assert csv.accuracy.tolist() == table.accuracy.tolist()
    assert set(csv.shots) == {"0", "1", "all"}
    with closing(sqlite3.connect(f"file:{folder / 'results.sqlite'}?mode=ro", uri=True)) as db, db:
        sql = pd.read_sql("SELECT * FROM results", db)
    computed = {"calibration_error", "trained_parameters"}
    assert set(sql.columns) - {"columns"} == set(csv.columns) - computed
    errors = [
        calibration_error(load_predictions(folder, key, dataset))
        for key, dataset in zip(table.key, table.dataset, strict=True)
    ]
    assert csv.calibration_error.tolist() == pytest.approx(errors)
    assert max(errors) > 0
    assert sorted(sql.accuracy) == sorted(csv.accuracy)
    assert call("export", folder, tmp_path / "coop.parquet", "--where", "method=coop")[0] == 0
    parquet = pd.read_parquet(tmp_path / "coop.parquet")
    assert parquet.key.tolist() == table[table.method == "coop"].key.tolist()
    code, _, err = call("export", folder, tmp_path / "runs.xlsx")
    assert (code, ".csv or .parquet" in err) == (2, True)
    code, _, err = call("export", folder, tmp_path / "nowhere" / "runs.csv")
    assert (code, "cannot be written" in err) == (2, True)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "fastparquet", None)
    code, _, err = call("export", folder, tmp_path / "more.parquet")
    assert (code, "needs pyarrow" in err) == (2, True)
    assert {path.name for path in tmp_path.iterdir()} == {"runs.csv", "coop.parquet"}


def test_merging_names_conflicts_and_brings_what_is_said_of_datasets(
    folder: Path, call: Callable, tmp_path: Path
) -> None:
    said = rows(call("merge", folder, "--into", tmp_path / "all", "--json"))
    assert said["added"] == 11
    assert json.loads((tmp_path / "all" / "datasets.json").read_text()).keys() == {"colours", "shifted"}
    assert (tmp_path / "all" / "grid.yaml").read_text() == (folder / "grid.yaml").read_text()
    with closing(sqlite3.connect(tmp_path / "all" / "results.sqlite")) as db, db:
        db.execute("UPDATE scores SET images = NULL")  # as of a store that did not know them
    assert merge_results(folder, tmp_path / "all") == 0
    with closing(sqlite3.connect(tmp_path / "all" / "results.sqlite")) as db, db:
        db.execute("UPDATE scores SET predictions = x'00'")
    with pytest.raises(UserError, match=r"% in .* but .*% in .* \(with other predictions\)"):
        merge_results(folder, tmp_path / "all")
    with closing(sqlite3.connect(tmp_path / "all" / "results.sqlite")) as db, db:
        db.execute("UPDATE scores SET accuracy = 1")
    code, _, err = call("merge", folder, "--into", tmp_path / "all")
    assert code == 2
    assert err.count("is 1.00% in") == 5
    assert "and 17 more" in err


def test_merging_brings_files_that_the_folder_has_lost(folder: Path, tmp_path: Path) -> None:
    assert merge_results(folder, tmp_path / "all") == 11
    files = sorted((tmp_path / "all" / "contexts").iterdir())
    lost, changed = files[0], files[1]
    whole = lost.read_bytes()
    lost.unlink()
    changed.write_bytes(b"kept as it is")
    assert merge_results(folder, tmp_path / "all") == 0
    assert lost.read_bytes() == whole
    assert changed.read_bytes() == b"kept as it is"


def test_merging_stops_at_a_damaged_description_and_copies_any_grid(
    folder: Path, call: Callable, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "grid.yaml").write_bytes(b"# caf\xe9")
    (tmp_path / "other" / "datasets.json").write_bytes(b'{"colours": {"tr')
    code, _, err = call("merge", tmp_path / "other", "--into", tmp_path / "all")
    assert (code, "datasets.json cannot be read" in err) == (2, True)
    assert not (tmp_path / "all").exists()
    (tmp_path / "other" / "datasets.json").unlink()
    assert call("merge", tmp_path / "other", "--into", tmp_path / "all")[0] == 0
    assert (tmp_path / "all" / "grid.yaml").read_bytes() == b"# caf\xe9"


def test_merging_keeps_the_files_of_merged_runs_where_the_description_is_damaged(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "datasets.json").write_text("{")
    with pytest.raises(UserError, match=r"datasets\.json cannot be read"):
        merge_results(folder, tmp_path / "all")
    assert len(load_results(tmp_path / "all")) == len(load_results(folder))
    kept, expected = (
        sorted(one.name for one in (at / "contexts").iterdir()) for at in (tmp_path / "all", folder)
    )
    assert kept == expected


def test_merging_brings_nearest_words_and_tells_of_failures(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    merge_results(str(folder), source)
    (source / "nearest_words").mkdir()
    (source / "nearest_words" / "k.json").write_text("{}")
    with closing(sqlite3.connect(source / "results.sqlite")) as db, db:
        db.execute("INSERT INTO failures VALUES ('f1', 'b', 'd', 'coop', 'L', 4, 3, '{}', 'no room', 'now')")
    assert merge_results(source, tmp_path / "all") == 11
    assert (tmp_path / "all" / "nearest_words" / "k.json").read_text() == "{}"
    assert "1 run(s) of" in caplog.text
    assert f"`fastcoop results list {source} --where status=failed` shows them" in caplog.text


@pytest.mark.parametrize(
    ("damage", "commands"),
    [
        ("UPDATE scores SET per_class = '[50.0, 1'", ("list", "export", "compare", "merge", "show")),
        ("UPDATE runs SET extra = CAST(zeroblob(9) AS TEXT)", ("list", "export", "compare", "merge", "show")),
        ("UPDATE runs SET settings = '[]'", ("list", "export", "compare", "merge", "show")),
        ("UPDATE scores SET accuracy = 'fifty'", ("list", "export", "compare", "merge")),
        ("UPDATE scores SET predictions = x'00'", ("export",)),
        ("UPDATE scores SET predictions = x'ff00' || substr(predictions, 3)", ("export",)),
        ("UPDATE scores SET confidence = x'0000'", ("export",)),
    ],
)
def test_values_that_the_disk_has_damaged_are_one_sentence(
    folder: Path, call: Callable, tmp_path: Path, damage: str, commands: tuple[str, ...]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    key = load_results(folder).key[0]
    with closing(sqlite3.connect(damaged / "results.sqlite")) as db, db:
        db.execute(damage)
    words: dict[str, list[str | Path]] = {
        "list": [], "export": [tmp_path / "runs.csv"], "compare": [folder], "show": [key],
        "merge": ["--into", tmp_path / "merged"],
    }  # fmt: skip
    for command in commands:
        code, out, err = call(command, damaged, *words[command])
        assert (code, out, len(err.splitlines())) == (2, "", 1), command
        assert "results.sqlite is damaged (" in err, command
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_folder_in_place_of_the_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.sqlite").mkdir()
    with pytest.raises(UserError, match="cannot be used as a results store"), open_store(tmp_path):
        pass
