"""Items beside the paper's figures: base to new, transfer, nearest words; and the commands that supply what is
missing."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from fastcoop.grids import read_grid
from fastcoop.plugins import Registry
from fastcoop.reports.frames import Missing
from fastcoop.reports.items import (
    ITEMS,
    OWN,
    base_to_new,
    cross_dataset,
    figure1,
    figure3,
    figure5b,
    table1,
    table2,
    table3,
    table4,
    table5,
)
from fastcoop.reports.study import study_of
from fastcoop.reports.table import Table
from tests.reports.made_up_results import coop, results, run, store_words, whole_study

ROOT = Path(__file__).parents[2]


def cells(table: Table) -> dict[tuple[str, ...], dict]:
    return dict(table.rows)


def halves(families=("pets", "cars"), seeds=(1, 2)) -> pd.DataFrame:
    rows = []
    for place, family in enumerate(families):
        for half in ("base", "new"):
            tested = {"backbone": "b", "dataset": f"{family}:{half}"}
            zero = 60.0 if half == "base" else 70.0
            rows.append(
                run(**tested, source=f"{family}:base", method="zero_shot", shots=0, seed=0, accuracy=zero)
            )
            for seed in seeds:
                for length, lost in ((16, 20.0), (4, 5.0)):
                    accuracy = 80.0 + place + seed if half == "base" else 70.0 - lost - seed
                    trained = {**tested, "source": f"{family}:base", "shots": 16, "seed": seed}
                    rows.append(coop(**trained, context_length=length, accuracy=accuracy))
    return pd.DataFrame(rows)


def test_base_to_new_has_both_halves_and_their_harmonic_mean(tmp_path):
    (part,) = base_to_new.ITEM.make(study_of(halves(), tmp_path))
    found = cells(part.table)
    own = found["pets", "CoOp (M=16, end)"]
    assert (own["base"].mean, own["new"].mean) == (81.5, 48.5)
    assert own["harmonic mean"].mean == pytest.approx(statistics.harmonic_mean([81.5, 48.5]))
    per_seed = [statistics.harmonic_mean([81.0, 49.0]), statistics.harmonic_mean([82.0, 48.0])]
    assert own["harmonic mean"].std == pytest.approx(statistics.stdev(per_seed))
    assert own["base"].runs == 2
    mean = found["Average over 2 datasets", "CoOp (M=16, end)"]
    assert (mean["base"].mean, mean["new"].mean) == (82.0, 48.5)
    assert mean["harmonic mean"].mean == pytest.approx(statistics.harmonic_mean([82.0, 48.5]))
    assert mean["base"].std == pytest.approx(statistics.stdev([81.5, 82.5]))
    assert found["cars", "Zero-shot CLIP"]["new"].best
    assert found["cars", "CoOp (M=4, end)"]["base"].best


def test_base_to_new_is_no_few_shot_result(tmp_path):
    study = study_of(pd.concat([results(datasets=("pets",)), halves(("pets",))]), tmp_path)
    (part,) = figure3.ITEM.make(study)
    assert {names[0] for names, _ in part.table.rows} == {"pets"}
    assert len(base_to_new.ITEM.make(study)) == 1


def test_one_half_alone_is_no_base_to_new(tmp_path):
    frame = halves()
    with pytest.raises(Missing, match="tested on both halves"):
        base_to_new.ITEM.make(study_of(frame[frame.dataset.str.endswith(":base")], tmp_path))


def test_runs_without_one_of_the_halves_are_counted_below_the_table(tmp_path):
    frame = halves()
    (part,) = base_to_new.ITEM.make(study_of(frame, tmp_path))
    assert not any(note.startswith("Left out") for note in part.table.notes)
    left = (frame.dataset == "pets:new") & (frame.seed == 2) & (frame.context_length == 16)
    (part,) = base_to_new.ITEM.make(study_of(frame[~left], tmp_path))
    assert "Left out: 1 run without an accuracy on one of the halves." in part.table.notes
    assert cells(part.table)["pets", "CoOp (M=16, end)"]["base"].runs == 1


def test_zero_shot_clip_alone_is_no_base_to_new(tmp_path):
    """Such as in the slice of another schedule, which nothing learned on half of the classes by."""
    frame = halves()
    with pytest.raises(Missing, match="no run learned on the first half"):
        base_to_new.ITEM.make(study_of(frame[frame.method == "zero_shot"], tmp_path))


def test_coop_on_half_of_the_classes_is_none_of_table_2(tmp_path):
    ensemble = run(
        backbone="b", dataset="pets", source="pets", method="ensemble", shots=0, seed=0, accuracy=60.0
    )
    study = study_of(pd.concat([halves(("pets",)), pd.DataFrame([ensemble])]), tmp_path)
    with pytest.raises(Missing, match="CoOp on all classes of a dataset at 16 shots"):
        table2.ITEM.make(study)


def test_averages_over_different_datasets_are_told_in_table_2(tmp_path):
    frame = whole_study()
    frame = frame[frame.dataset.isin(["objects", "textures", "digits"])]
    (part,) = table2.ITEM.make(study_of(frame, tmp_path))
    assert not any("different datasets" in note for note in part.table.notes)
    lacking = {"demo-vit": "digits", "demo-resnet": "textures"}
    left_out = frame.backbone.map(lacking) == frame.dataset
    (part,) = table2.ITEM.make(study_of(frame[~left_out], tmp_path))
    assert (
        "The averages of the backbones are over different datasets (demo-resnet: objects, digits; demo-vit: objects, "
        "textures)." in part.table.notes
    )


NAMES = {"objects": ["cat", "dog", "owl"], "sketch": ["cat", "dog"], "weather": ["sun"], "digits": ["one"]}


def moved() -> pd.DataFrame:
    rows = []
    for dataset, accuracy in (("objects", 80.0), ("weather", 50.0), ("digits", 40.0), ("sketch", 60.0)):
        tested = {"backbone": "b", "dataset": dataset}
        rows.append(
            run(**tested, source="objects", method="zero_shot", shots=0, seed=0, accuracy=accuracy - 1)
        )
        for seed in (1, 2):
            trained = {**tested, "source": "objects", "shots": 16, "seed": seed}
            rows += [coop(**trained, context_length=m, accuracy=accuracy + seed + m) for m in (4, 16)]
    return pd.DataFrame(rows)


def test_transfer_has_a_row_per_source_and_method_and_the_mean_of_its_targets(tmp_path):
    (part,) = cross_dataset.ITEM.make(study_of(moved(), tmp_path, NAMES))
    assert part.table.columns == ("on the source", "weather", "digits", "mean of targets")
    found = cells(part.table)
    row = found["objects", "CoOp (M=16, end)"]
    assert (row["on the source"].mean, row["weather"].mean, row["digits"].mean) == (97.5, 67.5, 57.5)
    assert row["mean of targets"].mean == pytest.approx(62.5)
    assert row["mean of targets"].std == pytest.approx(statistics.stdev([62.0, 63.0]))
    assert found["objects", "Zero-shot CLIP"]["mean of targets"].mean == 44.0
    assert next(iter(found)) == ("objects", "Zero-shot CLIP")


def test_the_mean_of_targets_is_of_all_of_them_or_not_given(tmp_path):
    frame = moved()
    one = (frame.dataset == "digits") & (frame.context_length == 4)
    (part,) = cross_dataset.ITEM.make(study_of(frame[~one], tmp_path, NAMES))
    found = cells(part.table)
    assert found["objects", "CoOp (M=4, end)"]["mean of targets"] == ""
    assert found["objects", "CoOp (M=16, end)"]["mean of targets"].mean == pytest.approx(62.5)
    assert any("where one of them has no number, there is no mean" in note for note in part.table.notes)
    (part,) = cross_dataset.ITEM.make(study_of(frame[~(one & (frame.seed == 2))], tmp_path, NAMES))
    row = cells(part.table)["objects", "CoOp (M=4, end)"]
    shown = [row[name].mean for name in ("weather", "digits")]
    assert row["mean of targets"].mean == pytest.approx(statistics.mean(shown)), (
        "the mean of what stands beside it"
    )


def test_what_was_not_tested_elsewhere_has_no_row_among_transfers():
    probe = {"backbone": "b", "source": "objects", "method": "linear_probe", "shots": 16, "seed": 1}
    probes = [run(**probe, dataset="objects", accuracy=99.0), run(**probe, dataset="sketch", accuracy=9.0)]
    study = study_of(pd.concat([moved(), pd.DataFrame(probes)]), Path("results"), NAMES)
    (part,) = cross_dataset.ITEM.make(study)
    methods = [method for _, method in cells(part.table)]
    assert methods == ["Zero-shot CLIP", "CoOp (M=16, end)", "CoOp (M=4, end)"]
    assert cells(part.table)["objects", "Zero-shot CLIP"]["on the source"].best is False
    assert cells(part.table)["objects", "CoOp (M=16, end)"]["on the source"].best is True


def of_lengths(column: str, lengths: dict[str, int]) -> pd.DataFrame:
    """Zero-shot prompts, an ensemble and CoOp with a context length of its own, for each value of a column."""
    rows = []
    for name, length in lengths.items():
        tested = {"backbone": "b", "dataset": "pets"} | {column: name}
        for method, prompt in (("zero_shot", "a {}."), ("zero_shot", "the {}."), ("ensemble", None)):
            settings = json.dumps({"prompt": prompt})
            rows.append(run(**tested, method=method, shots=0, seed=0, accuracy=50.0, settings=settings))
        rows.append(coop(**tested, shots=16, seed=1, accuracy=50.0 + length, context_length=length))
    return pd.DataFrame(rows)


def test_figure_1_shows_each_dataset_at_the_context_length_that_it_names():
    frame = of_lengths("dataset", {"pets": 16, "cars": 4})
    (part,) = figure1.ITEM.make(study_of(frame, Path("results")))
    learned = [
        (dataset, cells["accuracy"].mean) for (dataset, name), cells in part.table.rows if "M=16" in name
    ]
    assert learned == [("pets", 66.0)]


@pytest.mark.parametrize("item", [table2, figure5b])
def test_backbones_are_compared_at_the_context_length_that_is_named(item):
    frame = of_lengths("backbone", {"one": 16, "two": 16, "three": 4})
    (part,) = item.ITEM.make(study_of(frame, Path("results")))
    (cells,) = (cells for (_, name), cells in part.table.rows if "M=16" in name)
    assert {backbone: cell.mean for backbone, cell in cells.items() if cell} == {"one": 66.0, "two": 66.0}
    assert "Left out, since CoOp was run in another setting there: three." in part.table.notes


def test_a_whisker_of_figure_1_ends_inside_its_panel():
    rows = [run(backbone="b", dataset="pets", method="zero_shot", shots=0, seed=0, accuracy=50.0 + i,
                settings=json.dumps({"prompt": prompt})) for i, prompt in enumerate(("a {}.", "the {}."))]  # fmt: skip
    rows += [
        coop(backbone="b", dataset="pets", shots=16, seed=seed, accuracy=20.0 * seed) for seed in (1, 2, 3)
    ]
    (part,) = figure1.ITEM.make(study_of(pd.DataFrame(rows), Path("results")))
    (axis,) = part.figure.axes
    assert axis.get_xlim()[1] > 40 + 20  # mean and standard deviation


def test_random_and_word_starts_are_rivals_side_by_side():
    rows = [coop(backbone="b", dataset="pets", shots=1, seed=seed, context_length=4, init=init, accuracy=mean + seed)
            for init, mean in (("random", 60.0), ("a photo of a", 61.0)) for seed in (1, 2)]  # fmt: skip
    (part,) = table3.ITEM.make(study_of(pd.DataFrame(rows), Path("results")))
    assert part.table.title.startswith("Random and word initialization at 1 shot (")
    ((_, row),) = part.table.rows
    assert (row["random"].best, row["“a photo of a”"].best) == (False, True)


def test_each_nearest_word_stands_beside_its_chance_and_what_is_nearer_is_marked(tmp_path):
    frame = results(datasets=("pets",), shots=(16,), seeds=(1,))
    store_words(tmp_path, frame, chance=1.01)
    unified, summary, classes = table4.ITEM.make(study_of(frame, tmp_path))
    rows = cells(unified.table)
    assert rows[("1",)]["pets"] == "cat (0.900 / 1.010) *"  # 0.9 is below 90% of 1.01
    assert rows[("3",)]["pets"] == "of (0.920 / 1.010)"
    assert rows[("chance",)]["pets"] == "1.010"
    assert rows[("initial context",)]["pets"] == "0.700"

    assert (summary.suffix, classes.suffix) == ("-csc", "-csc-classes")
    row = cells(summary.table)[("pets",)]
    assert (row["classes"], row["chance"], row["initial context"]) == ("2", "1.010", "0.700")
    assert row["most frequent"] == "cat (12), hu- (10), of (10)"  # of 16 vectors of two classes
    row = cells(classes.table)["pets", "boxer"]
    assert row["nearest words"].startswith("cat*, hu-, of, cat")
    assert row["mean distance"] == "0.975"


def test_words_by_cosine_are_said_to_be(tmp_path):
    frame = results(datasets=("pets",), shots=(16,), seeds=(1,))
    store_words(tmp_path, frame)
    for path in (tmp_path / "nearest_words").iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"metric": "cosine"}))
    assert all("1 - cosine" in part.table.notes[0] for part in table4.ITEM.make(study_of(frame, tmp_path)))


def test_a_probe_of_less_effort_is_named_so(tmp_path):
    frame = results(datasets=("pets",))
    label = "Linear probe CLIP (100 iterations, 2 search steps)"
    frame.loc[frame.method == "linear_probe", "label"] = label
    (part,) = figure3.ITEM.make(study_of(frame, tmp_path))
    name = "Linear probe (100 iterations, 2 search steps)"
    assert name in {names[1] for names, _ in part.table.rows}
    assert name in [text.get_text() for text in part.figure.legends[0].get_texts()]


def test_the_papers_numbers_are_not_shown_for_other_shots(tmp_path):
    common = {"backbone": "RN50", "dataset": "imagenet", "seed": 1}
    for shots, printed in ((16, 62.95), (4, None)):
        rows = [coop(**common, shots=shots, accuracy=60.0)]
        rows.append(run(**common, shots=shots, method="text_bias", accuracy=59.0))
        (part,) = table5.ITEM.make(study_of(pd.DataFrame(rows), tmp_path))
        shown = cells(part.table).get(("imagenet", "CoOp (M=16, end), as printed in the paper"))
        assert (shown and shown["accuracy"].mean) == printed


@pytest.mark.parametrize("item", ITEMS.values(), ids=lambda item: item.name)
def test_what_would_supply_an_item_is_a_command_that_runs(item, tmp_path):
    (tmp_path / "datasets.json").write_text('{"my pets": {"classes": 3}, "b": {"classes": 4}}')
    study = study_of(results(datasets=("my pets", "b")), tmp_path)
    words = shlex.split(item.command(study))
    assert words[0] == "fastcoop"
    assert str(tmp_path) in words
    if words[1] == "interpret":
        assert words[-2:] == ["--backbone", "demo-resnet"]
    elif words[1] == "evaluate":  # tests runs on their own datasets
        assert words[words.index("--targets") + 1] == "my pets,b"
    elif item.name != "table6":  # which runs the results' own grid again
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        grid = read_grid(ROOT / words[2], overrides)
        assert "demo-resnet" in grid.backbones
        assert {re.sub(":.*", "", name) for name in grid.datasets} <= {"my pets", "b"}


def test_the_commands_name_backbones_as_the_grid_did(tmp_path):
    (tmp_path / "grid.yaml").write_text("backbones: [path/to/clip]\ndatasets: data/pets\n")
    study = study_of(results(datasets=("pets",), backbone="clip"), tmp_path)
    command = next(item.command(study) for item in ITEMS.values() if item.name == "figure3")
    assert "backbones=path/to/clip" in command
    assert "datasets=data/pets" in command


@pytest.mark.parametrize(
    ("own", "shipped", "views", "recipe"),
    [("", "field_fewshot", 8, "current"), ("views: 10", "field_fewshot", 10, "current"),
     ("views: 0\nrecipe: official-2021", "fig3", 0, "official-2021")],
)  # fmt: skip
def test_a_command_has_the_features_of_the_other_runs(own, shipped, views, recipe, tmp_path):
    """Runs of a grid with other views would be a second curve."""
    (tmp_path / "grid.yaml").write_text(f"backbones: RN50\ndatasets: pets\n{own}\n")
    study = study_of(results(datasets=("pets",)), tmp_path)
    item = next(item for item in ITEMS.values() if f"/{shipped}.yaml" in item.command(study))
    words = shlex.split(item.command(study))
    grid = read_grid(ROOT / words[2], [words[i + 1] for i, word in enumerate(words) if word == "--set"])
    assert (grid.views, grid.recipe) == (views, recipe)
    assert ("--set views" in item.command(study)) == (views != (10 if shipped == "field_fewshot" else 8))


def test_a_command_for_halves_names_a_dataset_that_has_them(tmp_path):
    item = next(item for item in ITEMS.values() if item.name == "base_to_new")
    for classes, named in ((4, "many"), (3, "DATASET")):
        (tmp_path / "datasets.json").write_text(
            json.dumps({"few": {"classes": 2}, "many": {"classes": classes}})
        )
        study = study_of(results(datasets=("few", "many")), tmp_path)
        words = shlex.split(item.command(study))
        assert f"datasets={named}:base" in words
        assert f"targets={{{named}:base: [{named}:new]}}" in words


@pytest.mark.parametrize(
    "names", [("2020",), ("no", "2020-01-01"), ("a,b",), ("it's", "x: y", "[z"), ("$(touch x)", "a#b c")]
)
@pytest.mark.parametrize("folder", ["my $(touch x) results", "it's", "-dash", '"', "a;b&c", "line\nbreak"])
def test_commands_are_safe_to_paste(names, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = study_of(results(datasets=names, shots=(16,)), Path(folder))
    for item in ITEMS.values():
        command = item.command(study)
        assert "\n" not in command
        shown = ["bash", "-c", f"fastcoop() {{ printf '%s\\0' \"$@\"; }}; {command.partition(' && ')[0]}"]
        words = subprocess.run(shown, capture_output=True, text=True).stdout.split("\0")
        assert words[words.index("--results") + 1 if "--results" in words else 1] == (
            f"./{folder}" if folder.startswith("-") else folder
        )
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        if overrides and item.name != "base_to_new":
            assert set(read_grid(ROOT / words[1], overrides).datasets) <= set(names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("item", ITEMS.values(), ids=lambda item: item.name)
def test_commands_leave_out_what_the_datasets_have_nothing_for(item, tmp_path):
    """Neither validation images, that choose a probe's C, nor images behind imported features."""
    (tmp_path / "datasets.json").write_text('{"pets": {"classes": 4, "train": 9, "val": null, "test": 9}}')
    (tmp_path / "grid.yaml").write_text("backbones: demo-resnet\ndatasets: cache/pets.h5\n")
    words = shlex.split(item.command(study_of(results(datasets=("pets",)), tmp_path)))
    if words[1] in ("interpret", "evaluate") or item.name == "table6":
        return
    options = {name: [b for a, b in pairwise(words) if a == name] for name in ("--set", "--only")}
    grid = read_grid(ROOT / words[2], options["--set"], options["--only"])
    assert not {"linear_probe", "finetune_image_encoder"} & set(grid.methods)
    assert all(getattr(one.settings, "learning_rate", 0.1) != "validation" for one in grid.runs())


PACKAGE = """
from fastcoop.reports.item import Exhibit, Item
from fastcoop.reports.table import Table

def make(study):
    table = Table("Seeds", ("dataset",), ("seeds",), unit="")
    for name, runs in study.runs.groupby("dataset"):
        table.add((name,), {"seeds": str(runs.seed.nunique())})
    return [Exhibit("", "", None, table)]

ITEM = Item("seeds", "Seeds", "Number of seeds.", make, lambda study: "fastcoop sweep GRID.yaml")
"""


def test_a_package_adds_items(tmp_path, monkeypatch):
    info = tmp_path / "seeds_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: seeds-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fastcoop.report_items]\nseeds = seeds_package:ITEM\n")
    (tmp_path / "seeds_package.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    found = Registry(ITEMS.group, ITEMS.kind, OWN, ITEMS._prepare)
    assert list(found) == [*OWN, "seeds"]
    (exhibit,) = found["seeds"].make(study_of(results(datasets=("pets",)), tmp_path))
    assert exhibit.table.rows == [(("pets",), {"seeds": "4"})]


def test_shifted_targets_of_zero_shot_runs_with_other_settings(tmp_path):
    rows = []
    for dataset, settings in (("pets", "{}"), ("sketch", '{"views": 8}'), ("sketch", "{}")):
        tested = {"backbone": "b", "dataset": dataset, "settings": settings}
        rows.append(run(**tested, method="zero_shot", shots=0, seed=0, accuracy=50.0))
        rows.append(coop(**tested, source="pets", shots=16, seed=1, accuracy=60.0))
    (exhibit,) = table1.ITEM.make(study_of(pd.DataFrame(rows), tmp_path))
    assert {names[0] for names, _ in exhibit.table.rows} == {"Zero-shot CLIP", "CoOp (M=16, end)"}
