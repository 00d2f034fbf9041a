"""That what is written in a figure can be read: nothing over another, nothing over an axis, whatever the names."""

from __future__ import annotations

import os
import signal
import warnings
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.artist import Artist
from PIL import Image

from fastcoop.reports import style
from fastcoop.reports.frames import Missing
from fastcoop.reports.items import ITEMS, figure1, figure3, figure4, figure5b
from fastcoop.reports.study import study_of
from fastcoop.reports.style import (
    LOOKS,
    columns_of,
    drawing,
    fitted,
    look,
    name_of,
    rank,
    save_figure,
    saving,
    shortened,
)
from tests.reports.made_up_results import coop, results, run, whole_study

GAINS = (21.0, 4.0, -1.0, -9.0)  # of datasets


def study(backbones):
    rows = []
    for strength, backbone in enumerate(backbones):
        for place, gain in enumerate(GAINS):
            common = {"backbone": backbone, "dataset": f"a_dataset_of_long_name_{place}"}
            zero = 50.0 + 3 * strength
            rows.append(run(**common, method="zero_shot", shots=0, seed=0, accuracy=zero))
            rows += [coop(**common, shots=16, seed=s, accuracy=zero + gain + 0.1 * s) for s in (1, 2, 3)]
    return study_of(pd.DataFrame(rows), Path("results"))


def test_methods_without_a_look_have_their_papers_names() -> None:
    assert name_of("kgcoop (lmbda 4.0)", 16) == "KgCoOp (lmbda 4.0)"
    assert name_of("some_method") == "some method"
    assert name_of("coop end", 16) == "CoOp (M=16, end)"


def test_no_two_methods_share_color_and_marker():
    """The figure of training costs has no lines that would tell them apart."""
    assert len({(one.color, one.marker) for one in LOOKS.values()}) == len(LOOKS)


def test_unknown_series_have_different_looks():
    others = [*(f"added_{number}" for number in range(8)), "coop end (learning_rate 0.01)"]
    with drawing(["coop end", *others]):
        looks = {(one.color, one.marker, one.line) for one in map(look, others)}
        assert len({one.color for one in map(look, others)}) == 8
        assert look("coop end") == LOOKS["coop end"]
    assert len(looks) == len(others)
    assert sorted([*reversed(others), "coop end", "zero_shot"], key=rank) == [
        *("zero_shot", "coop end", others[-1]), *others[:-1]
    ]  # fmt: skip
    assert look("added_7").color == look("added_1").color  # outside a report


def test_the_numbers_of_figure_4_stand_inside_its_axes():
    with drawing():
        (part,) = figure4.ITEM.make(study(["b"]))
        part.figure.draw_without_rendering()
    (axis,) = part.figure.axes
    assert [text.get_text() for text in axis.texts] == ["+21.2", "+4.2", "−0.8", "−8.8"]
    for text in axis.texts:
        box = text.get_window_extent()
        assert axis.bbox.x0 < box.x0
        assert box.x1 < axis.bbox.x1


@pytest.mark.parametrize(
    "names", [("RN50", "RN101", "ViT-B-32", "ViT-B-16"), ("RN50-quickgelu", "ViT-B-16-quickgelu", "x", "y"),
              tuple(f"ViT-{letter}-14-quickgelu" for letter in "BLHgGE")],
)  # fmt: skip
def test_neither_names_nor_numbers_of_figure_5b_run_into_each_other(names):
    with drawing():
        (part,) = figure5b.ITEM.make(study(names))
        part.figure.draw_without_rendering()
    (axis,) = part.figure.axes
    numbers = [text.get_window_extent() for text in axis.texts]
    assert len(numbers) == 2 * len(names)
    assert not any(one.overlaps(other) for one, other in combinations(numbers, 2))
    labels = axis.get_xticklabels()
    boxes = [label.get_window_extent() for label in labels]
    # Slanted names overlap only as boxes.
    assert labels[0].get_rotation() or not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert bool(labels[0].get_rotation()) == ("ViT-B-32" not in names)


def test_a_legend_fills_its_lines():
    assert [columns_of(entries, 3) for entries in range(1, 8)] == [1, 2, 3, 2, 3, 3, 3]


@pytest.mark.parametrize(("shots", "bars"), [((16,), 1), ((1, 16), 0)])
def test_a_lone_point_of_figure_3_shows_its_spread_as_a_bar(shots, bars):
    common = {"backbone": "b", "dataset": "pets"}
    rows = [coop(**common, shots=n, seed=s, accuracy=60.0 + s) for n in shots for s in (1, 2, 3)]
    (part,) = figure3.ITEM.make(study_of(pd.DataFrame(rows), Path("results")))
    (axis,) = part.figure.axes
    assert [len(drawn.get_segments()) for drawn in axis.collections if hasattr(drawn, "get_segments")] == [
        1
    ] * bars


@pytest.mark.parametrize(("gain", "span"), [(0.3, 4.0), (30.0, 30.0)])
def test_differences_within_noise_do_not_fill_a_panel(gain, span):
    common = {"backbone": "b", "dataset": "pets"}
    rows = [run(**common, method="zero_shot", shots=0, seed=0, accuracy=50.0)]
    rows += [coop(**common, shots=16, seed=seed, accuracy=50.0 + gain) for seed in (1, 2, 3)]
    (part,) = figure3.ITEM.make(study_of(pd.DataFrame(rows), Path("results")))
    low, high = part.figure.axes[0].get_ylim()
    assert span <= high - low < 1.2 * span
    assert low < 50.0
    assert high > 50.0 + gain


LONG = "a name so long that no panel, no legend and no axis of any figure could ever hold all of it, "
STRANGE = (
    "$x^2$ & 50 %",
    "\\frac{a}{b} _x_ {y}",
    "猫 😀 e\u0301",
    "a\nb\x1b[31m",
    "W" * 90,
    "$",
    "#",
    "=1",
    "_",
    "x\0",
)


def renamed(frame: pd.DataFrame, column: str, names: dict[str, str]) -> pd.DataFrame:
    others = {"source": frame.source.map(names)} if column == "dataset" else {}
    return frame.assign(**{column: frame[column].map(names)}, **others)


def long_names() -> pd.DataFrame:
    frame = whole_study(seeds=(1, 2))
    for column in ("dataset", "backbone"):
        frame = renamed(frame, column, {name: f"{LONG}{name}" for name in frame[column].unique()})
    return frame


def strange_names() -> pd.DataFrame:
    frame = whole_study(seeds=(1, 2))
    frame = renamed(frame, "dataset", dict(zip(frame.dataset.unique(), STRANGE, strict=False)))
    return renamed(frame, "backbone", {"demo-resnet": "$\\alpha$_1", "demo-vit": "猫/$"})


def one_dataset() -> pd.DataFrame:
    frame = results(datasets=("objects",))
    label = "Linear probe (100 iterations, 6 values of C)"
    return frame.assign(label=frame.label.where(frame.method != "linear_probe", label))


def many_methods() -> pd.DataFrame:
    rows = [
        run(backbone="b", dataset="pets", method=f"_my_{'very_' * number}long_one", shots=n, seed=1, accuracy=50.0)
        for number in range(9) for n in (1, 16)
    ]  # fmt: skip
    return pd.concat([results(datasets=("pets",), backbone="b"), pd.DataFrame(rows)], ignore_index=True)


@pytest.mark.parametrize("frame", [one_dataset, many_methods, long_names, strange_names])
def test_nothing_runs_out_of_a_picture(frame, tmp_path, monkeypatch):
    monkeypatch.setattr(style, "METADATA", {"png": {}})  # the other files show the same
    made = study_of(frame(), Path("results"))
    drawn = 0
    with warnings.catch_warnings(), drawing():
        warnings.simplefilter("error", UserWarning)  # a layout that found no room
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        for item in ITEMS.values():
            with suppress(Missing):
                for part in item.make(made)[:1]:
                    if part.figure is None:
                        continue
                    path, *_ = save_figure(part.figure, tmp_path / item.name)
                    image = np.asarray(Image.open(path).convert("L"))
                    for edge in (image[:, :2], image[:, -2:], image[:2], image[-2:]):
                        assert not (edge < 128).any(), item.name
                    assert max(image.shape) < 2000
                    drawn += 1
    assert drawn >= 2


def test_long_names_keep_both_ends():
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 7) == "abc…ijk"
    assert fitted("a\nb", 2) == "a\\nb"
    assert fitted("word " * 400, 2.0).count("\n") <= 2


@pytest.mark.parametrize("letter", ["W", "M", "A_", "HAM 10000 ", "i"])
def test_titles_of_wide_letters_do_not_run_into_each_other(letter):
    frame = whole_study(seeds=(1, 2))
    frame = frame[frame.backbone == "demo-vit"]  # the other one's figures have the same titles
    names = {name: (letter * 70)[:69] + str(n) for n, name in enumerate(frame.dataset.unique())}
    frame = renamed(frame, "dataset", names)
    with drawing():
        for item in (figure1.ITEM, figure3.ITEM):
            for part in item.make(study_of(frame, Path("results"))):
                part.figure.draw_without_rendering()
                boxes = [axis.title.get_window_extent() for axis in part.figure.axes if axis.get_title()]
                assert len(boxes) > 4
                assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_wide_names_leave_the_bars_of_figure_4_their_room():
    frame = whole_study(seeds=(1, 2))
    frame = renamed(frame, "dataset", {n: f"{'W' * 60}{k}" for k, n in enumerate(frame.dataset.unique())})
    with drawing():
        for part in figure4.ITEM.make(study_of(frame, Path("results"))):
            part.figure.draw_without_rendering()
            (axis,) = part.figure.axes
            assert axis.bbox.width > 0.4 * part.figure.bbox.width


class Deadly(Artist):
    """Kills every process that draws it but one."""

    def __init__(self, survivor: int):
        super().__init__()
        self.survivor = survivor

    def draw(self, renderer):
        if os.getpid() != self.survivor:
            os.kill(os.getpid(), signal.SIGKILL)


def write_figures(folder: Path, jobs: int, *artists: Artist, count: int = 1) -> list[Path]:
    made, paths = study(["A"]), []
    with drawing(made.runs.series), saving(made.runs.series, jobs) as save:
        for number in range(count):
            (part,) = figure4.ITEM.make(made)
            for artist in artists:
                part.figure.add_artist(artist)
            paths += save(part.figure, folder / f"figure{number}")
    return paths


@pytest.mark.parametrize(
    ("artists", "count"),
    [((), 4), ((Deadly(os.getpid()),), 1)],
    ids=["this_one_draws_the_last", "a_process_dies"],
)
def test_other_processes_draw_the_same_files(tmp_path, artists, count):
    (tmp_path / "other").mkdir()
    paths = write_figures(tmp_path, 1)
    others = write_figures(tmp_path / "other", 2, *artists, count=count)
    assert others[: len(paths)] == [tmp_path / "other" / path.name for path in paths]
    assert [path.read_bytes() for path in others] == count * [path.read_bytes() for path in paths]
    assert set((tmp_path / "other").iterdir()) == set(others)


def test_an_error_of_writing_is_raised(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        write_figures(tmp_path / "missing", 2)
