"""Tables of the field's methods: protocols, marks, published rows and both definitions of H."""

from __future__ import annotations

import csv
import json
import sqlite3
import statistics
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from fastcoop.reports import field
from fastcoop.reports.best import best_methods
from fastcoop.reports.frames import Missing
from fastcoop.reports.items import base_to_new, field_fewshot, figure3, table1
from fastcoop.reports.study import read_study, study_of
from fastcoop.reports.style import drawing, name_of
from fastcoop.reports.table import Cell
from fastcoop.results.database import DATABASE
from fastcoop.results.store import open_store
from tests.advice import follows
from tests.reports.made_up_results import coop, results, run
from tests.results.test_store import record

GAINS = {
    "tip_adapter": ("few_val", 1.0), "gda": ("few_val", 2.0), "clap": ("fixed", 3.0),
    "tip_adapter_f": ("official", 9.0),
}  # fmt: skip
ON_TEST = "Tip-Adapter-F (chosen on TEST LABELS)"


def fewshot(backbone: str = "ViT-B-16", datasets: tuple[str, ...] = ("pets", "cars")) -> pd.DataFrame:
    rows = []
    for place, dataset in enumerate(datasets):
        common = {"backbone": backbone, "dataset": dataset}
        rows.append(run(**common, method="zero_shot", shots=0, seed=0, accuracy=50.0))
        for method, (selection, gain) in GAINS.items():
            for shots in (1, 16):
                for seed in (1, 2, 3):
                    rows.append(
                        run(
                            **common, method=method, shots=shots, seed=seed, seconds=0.5 * shots, selection=selection,
                            accuracy=50 + gain * shots**0.5 + place + seed,
                            settings=json.dumps({"selection": selection}),
                            extra=json.dumps({"trained_parameters": 1024.0 * (1 + place)}),
                        )
                    )  # fmt: skip
    return pd.DataFrame(rows)


def test_the_few_shot_table_names_protocols_marks_two_and_has_published_rows(tmp_path: Path) -> None:
    study = study_of(fewshot(), tmp_path)
    with drawing(study.runs.series):
        shots, cost = field_fewshot.ITEM.make(study)
    assert shots.figure is not None
    assert cost.figure is not None
    caches, probes = ([text.get_text() for text in axis.get_legend().texts] for axis in shots.figure.axes)
    assert [" ".join(name.split()) for name in caches] == ["Zero-shot CLIP", "Tip-Adapter", ON_TEST, "GDA"]
    assert probes == ["Zero-shot CLIP", "CLAP"]
    rows, average = dict(shots.table.rows), "Average over 2 datasets"
    clap, official = rows[average, "CLAP"], rows[average, ON_TEST]
    assert clap["16 shots"].mean == pytest.approx(50 + 3 * 4 + 0.5 + 2)
    assert clap["16 shots"].std == pytest.approx(1.0)
    assert (clap["chosen on"], official["chosen on"]) == ("fixed", "TEST LABELS (official)")
    assert clap["16 shots"].best
    assert not official["16 shots"].best  # choices on test labels do not compete
    assert not official["16 shots"].second
    assert rows[average, "GDA"]["16 shots"].second
    assert not rows[average, "Tip-Adapter"]["16 shots"].second
    assert ON_TEST in {names[0] for names, _ in cost.table.rows}
    assert ON_TEST in cost.charts[0].looks
    assert ON_TEST in shots.charts[0].looks
    for _, cells in best_methods(shots.charts[0], "best").rows:
        assert ON_TEST not in " ".join(map(str, cells.values()))
    assert (clap["parameters"], clap["seconds"]) == ("1,024 to 2,048", "8")
    published = {names[1]: cells for names, cells in shots.table.rows if names[0] == field.PUBLISHED}
    assert published["MaPLe, trains the image tower"]["16 shots"].mean == 81.79
    assert published["SD-LoRA, trains the image tower"]["chosen on"] == "TEST LABELS (official)"
    assert published["ProKeR"]["source"] == "CLIP-SVD's README"
    assert not any(
        cell.best or cell.second
        for cells in published.values()
        for cell in cells.values()
        if hasattr(cell, "best")
    )
    assert shots.table.to_html().count("<tr class=ref>") == len(published)
    assert r"\textcolor{gray}{81.79}" in shots.table.to_latex()
    assert "<u>" in shots.table.to_markdown()
    assert "the second best underlined" in shots.table.footnotes()[0]


def test_runs_on_earlier_images_of_a_dataset_have_their_calibration_error(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for key in ("a", "b"):
            record(store, key)
    with closing(sqlite3.connect(tmp_path / DATABASE)) as db, db:
        db.execute("UPDATE scores SET images = key || ?", ["0" * 63])
    study = read_study(tmp_path)
    assert set(study.runs.dataset) == {"colours", "colours (a0000000)"}
    for _, runs in study.runs.groupby("dataset"):
        assert field.facts(study, runs)["ECE"] == "0.00"


def test_runs_chosen_on_test_labels_say_so_beside_the_same_runs_chosen_otherwise(tmp_path: Path) -> None:
    both = pd.concat([fewshot("b", ("pets",)), fewshot("b", ("cars",))], ignore_index=True)
    few = {"selection": "few_val", "settings": json.dumps({"selection": "few_val"}), "key": "few"}
    official = both[both.method == "tip_adapter_f"]
    runs = pd.concat([both, official[official.dataset == "pets"].assign(**few)], ignore_index=True)
    names = set(map(name_of, study_of(runs, tmp_path).runs.series))
    assert {ON_TEST, "Tip-Adapter-F (selection few val)"} <= names  # most were chosen on test labels


def test_another_backbone_has_no_published_rows(tmp_path: Path) -> None:
    study = study_of(fewshot("demo-resnet"), tmp_path)
    with drawing(study.runs.series):
        shots, _ = field_fewshot.ITEM.make(study)
    assert {names[0] for names, _ in shots.table.rows} == {"Average over 2 datasets", "pets", "cars"}
    assert "source" not in shots.table.columns


@follows("there is no run of one of the field's methods; add one, such as tip_adapter")
def test_a_study_of_the_papers_methods_has_no_field_table(tmp_path: Path) -> None:
    paper = results(datasets=("pets",))
    with pytest.raises(Missing, match="add one, such as tip_adapter"):
        field_fewshot.ITEM.make(study_of(paper, tmp_path))
    study = study_of(pd.concat([paper, fewshot("demo-resnet", ("pets",))]), tmp_path)
    with drawing(study.runs.series):
        assert field_fewshot.ITEM.make(study)
        (part,) = figure3.ITEM.make(study)
    assert not any("Tip" in names[1] for names, _ in part.table.rows)  # Figure 3 is the paper's


def test_curves_run_from_few_shots_to_many_in_whatever_order_runs_finished(tmp_path: Path) -> None:
    study = study_of(fewshot("demo-resnet", ("pets",))[::-1], tmp_path)
    with drawing(study.runs.series):
        shots, _ = field_fewshot.ITEM.make(study)
    curves = [list(line.get_xdata()) for axis in shots.figure.axes for line in axis.lines]
    assert [1, 2] in curves  # of 1 and 16 shots
    assert all(x == sorted(x) for x in curves)


def test_curves_of_a_method_with_several_context_lengths_name_the_one_that_is_drawn(tmp_path: Path) -> None:
    rows = [
        coop(backbone="b", dataset="pets", shots=shots, seed=1, context_length=length, accuracy=50.0 + length)
        for length in (16, 32)
        for shots in (1, 16)
    ]
    frame = pd.concat([fewshot("b", ("pets",)), pd.DataFrame(rows)], ignore_index=True)
    study = study_of(frame, tmp_path)
    with drawing(study.runs.series):
        curves, cost = field_fewshot.ITEM.make(study)
    assert "CoOp (M=32, end)" in curves.charts[0].looks
    assert {name: cells["accuracy"].mean for (name,), cells in cost.table.rows}["CoOp (M=32, end)"] == 82.0


def test_both_definitions_of_h(tmp_path: Path) -> None:
    halves = {"pets": (90.0, 60.0), "cars": (60.0, 90.0)}
    rows = [
        run(
            backbone="ViT-B-16", dataset=f"{name}:{half}", source=f"{name}:base", method="clap", shots=16, seed=seed,
            accuracy=value + above, selection="fixed",
        )
        for name, pair in halves.items() for half, value in zip(("base", "new"), pair, strict=True)
        for seed, above in ((1, 1.0), (2, -1.0))
    ]  # fmt: skip
    (part,) = base_to_new.ITEM.make(study_of(pd.DataFrame(rows), tmp_path))
    cells = dict(part.table.rows)["Average over 2 datasets", "CLAP"]
    assert cells["harmonic mean"].mean == pytest.approx(75.0)
    assert cells["harmonic mean"].std == pytest.approx(statistics.stdev([76, 74]))
    assert cells[base_to_new.MEAN_OF_H].mean == pytest.approx(statistics.harmonic_mean([90, 60]))
    of_seeds = [statistics.harmonic_mean(pair) for pair in ([91, 61], [89, 59])]
    assert cells[base_to_new.MEAN_OF_H].std == pytest.approx(statistics.stdev(of_seeds))
    published = dict(part.table.rows)[field.PUBLISHED, "GDA"]
    assert (published["base"].mean, published["new"].mean, published["harmonic mean"].mean) == (
        83.96,
        74.53,
        78.72,
    )


def test_base_to_new_averages_what_every_method_has_and_ranks_no_choice_on_test_labels(
    tmp_path: Path,
) -> None:
    rows = [
        run(
            backbone="b", dataset=f"{name}:{half}", source=f"{name}:base", method=method, shots=16, seed=seed,
            accuracy=lead + gain, selection=selection, settings=json.dumps({"selection": selection}), seconds=4.0,
            extra=json.dumps({"trained_parameters": 512.0}),
        )
        for method, (selection, gain) in GAINS.items() for name in ("pets", "cars", "birds") for seed in (1, 2)
        for half, lead in (("base", 50.0 + len(name)), ("new", 40.0))
        if (method, name) != ("gda", "birds")
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    (part,) = base_to_new.ITEM.make(study_of(frame, tmp_path))
    rows, average = dict(part.table.rows), "Average over 2 datasets"
    assert rows[average, "CLAP"]["base"].mean == 54.0 + 3.0
    assert [rows["birds", "CLAP"]["base"].mean, rows["birds", "CLAP"]["new"].mean] == [58.0, 43.0]
    assert ("birds", "GDA") not in rows
    assert any("birds" in note for note in part.table.notes)
    shown = ("Tip-Adapter", ON_TEST, "GDA", "CLAP")
    best = {
        name: [cell.best for cell in rows[average, name].values() if isinstance(cell, Cell)] for name in shown
    }
    second = {
        name: [cell.second for cell in rows[average, name].values() if isinstance(cell, Cell)]
        for name in shown
    }
    assert best == {name: [name == "CLAP"] * 4 for name in shown}
    assert second == {name: [name == "GDA"] * 4 for name in shown}
    assert (rows[average, "CLAP"]["parameters"], rows[average, "CLAP"]["seconds"]) == ("512", "4")
    frame = frame[(frame.method != "gda") | frame.dataset.str.startswith("pets")]
    (part,) = base_to_new.ITEM.make(study_of(frame, tmp_path))
    assert {names[0] for names, _ in part.table.rows} == {
        "pets",
        "cars",
        "birds",
    }  # no average over one dataset


@pytest.mark.parametrize("methods", [("coop",), ("coop", "clap")])
def test_the_shift_table_of_the_fields_methods_has_published_rows(
    tmp_path: Path, methods: tuple[str, ...]
) -> None:
    rows = []
    for dataset in ("imagenet", "imagenet_a"):
        of_dataset = {
            "backbone": "ViT-B-16",
            "dataset": dataset,
            "source": "imagenet",
            "shots": 16,
            "seed": 1,
        }
        rows.append(coop(**of_dataset, accuracy=60.0))
        if "clap" in methods:
            rows.append(run(**of_dataset, method="clap", accuracy=50.0, selection="fixed"))
    (part,) = table1.ITEM.make(study_of(pd.DataFrame(rows), tmp_path))
    published = {names[0]: cells for names, cells in part.table.rows if "published" in names[0]}
    if methods == ("coop",):  # the paper's own table has the paper's numbers
        assert not published
    else:
        cells = published["CoOp, published"]
        assert (cells["imagenet (source)"].mean, cells["imagenet_a"].mean) == (71.51, 49.71)
        assert cells["source"] == "Awesome-Prompt-Adapter-Learning"
        assert "protocols" in part.table.notes[-1]


def test_the_shift_table_says_what_was_chosen_and_ranks_no_choice_on_test_labels(tmp_path: Path) -> None:
    rows = [
        run(
            backbone="b", dataset=dataset, source="photos", method=method, shots=16, seed=seed, selection=selection,
            accuracy=50 + gain, settings=json.dumps({"selection": selection}), seconds=4.0,
            extra=json.dumps({"trained_parameters": 512.0}),
        )
        for method, (selection, gain) in GAINS.items() for dataset in ("photos", "sketches") for seed in (1, 2)
    ]  # fmt: skip
    (part,) = table1.ITEM.make(study_of(pd.DataFrame(rows), tmp_path))
    cells = {cells["chosen on"]: cells for _, cells in part.table.rows}
    assert not cells["TEST LABELS (official)"]["sketches"].best
    assert not cells["TEST LABELS (official)"]["sketches"].second
    assert cells["fixed"]["sketches"].best
    assert [one["sketches"].second for _, one in part.table.rows].count(True) == 1
    assert (cells["fixed"]["parameters"], cells["fixed"]["seconds"]) == ("512", "4")
    assert any("not ranked" in note for note in part.table.notes)


def test_the_shift_table_has_a_row_for_each_initialization(tmp_path: Path) -> None:
    words, common = "a photo of a", {"backbone": "b", "source": "photos", "shots": 16, "method": "kgcoop"}
    rows = [
        coop(**common, dataset=dataset, seed=seed, init=init, accuracy=accuracy)
        for dataset in ("photos", "sketches")
        for seed in (1, 2)
        for init, accuracy in (("random", 50.0), (words, 70.0))
    ]
    rows += [row | {"method": "coop", "key": "c" + row["key"]} for row in rows if row["init"] == "random"]
    (part,) = table1.ITEM.make(study_of(pd.DataFrame(rows), tmp_path))
    shown = {names[0]: (cells["sketches"].mean, cells["sketches"].runs) for names, cells in part.table.rows}
    assert (shown["KgCoOp"], shown[f"KgCoOp, from “{words}”"]) == ((50.0, 2), (70.0, 2))


def test_published_numbers_are_each_there_once_with_a_source() -> None:
    path = Path(field.__file__).with_name("field_numbers.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    places = [
        tuple(row[name] for name in ("protocol", "backbone", "method", "source", "column")) for row in rows
    ]
    assert len(set(places)) == len(places) > 150
    for row in rows:  # sketches and adversarial images are harder
        assert row["source"]
        assert row["chosen_on"]
        assert (20 if row["protocol"] == "shift" else 40) < float(row["accuracy"]) < 90
    assert {row["method"] for row in rows} >= {"MaPLe", "PromptSRC", "CLIP-LoRA", "CLIP-SVD"}


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("zero_shot", {}, ""),
        ("coop", {"select": "last"}, "fixed"),
        ("coop", {"select": "best_val"}, "few_val"),
        ("text_transform", {"learning_rate": "validation"}, "few_val"),
        ("text_transform", {"learning_rate": 0.01}, "fixed"),
        ("linear_probe", {}, "few_val"),
    ],
)
def test_methods_without_a_selection_say_what_they_were_chosen_on(
    method: str, settings: dict[str, str], expected: str
) -> None:
    assert field.chosen_on(pd.DataFrame({"method": [method], "settings": [settings]})) == expected


def test_context_lengths_of_a_method_have_names_of_their_own(tmp_path: Path) -> None:
    common = {"backbone": "b", "dataset": "pets", "method": "kgcoop", "class_position": "end", "shots": 16}
    rows = [
        run(**common, init="random", seed=seed, context_length=length, accuracy=50.0 + length)
        for length in (4, 16) for seed in (1, 2)
    ]  # fmt: skip
    study = study_of(pd.DataFrame(rows), tmp_path)
    with drawing(study.runs.series):
        shots, *_ = field_fewshot.ITEM.make(study)
    shown = {names[1]: cells["16 shots"].mean for names, cells in shots.table.rows if names[0] == "pets"}
    assert shown == {"KgCoOp, M=16": 66.0, "KgCoOp, M=4": 54.0}


@pytest.mark.parametrize(("lengths", "expected"), [((4, 16, 32), 66.0), ((4, 32, 32), 82.0)])
def test_figure_3_averages_no_context_lengths_of_a_method_of_ones_own(
    tmp_path: Path, lengths: tuple[int, ...], expected: float
) -> None:
    """It draws CoOp's length, else the most frequent."""
    common = {"backbone": "demo-resnet", "dataset": "pets", "method": "mine", "shots": 16, "init": "random"}
    rows = [
        run(**common, seed=seed, context_length=length, accuracy=50.0 + length)
        for seed, length in enumerate(lengths)
    ]
    study = study_of(pd.concat([results(datasets=("pets",), shots=(16,)), pd.DataFrame(rows)]), tmp_path)
    with drawing(study.runs.series):
        (part,) = figure3.ITEM.make(study)
    (cells,) = (cells for names, cells in part.table.rows if names[1] == "mine")
    assert cells["16 shots"].mean == expected
