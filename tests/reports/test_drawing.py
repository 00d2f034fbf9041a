"""That what is written in a figure can be read: nothing over another, nothing over an axis, whatever the names."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest

from fastcoop.reports.items import figure3, figure4, figure5b
from fastcoop.reports.study import study_of
from fastcoop.reports.style import columns_of, drawing
from tests.reports.made_up_results import coop, run

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


def test_the_numbers_of_figure_4_stand_inside_its_axes():
    with drawing():
        (part,) = figure4.make(study(["b"]))
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
        (part,) = figure5b.make(study(names))
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
    (part,) = figure3.make(study_of(pd.DataFrame(rows), Path("results")))
    (axis,) = part.figure.axes
    assert [len(drawn.get_segments()) for drawn in axis.collections if hasattr(drawn, "get_segments")] == [
        1
    ] * bars
