"""What a study gives stays what it was: run keys, rows of the results table, contexts after 20 steps.

Contexts are compared as closely as other machines' rounding allows; keys to the letter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.study import GOLDEN, study

ONE_IMAGE = 100 / 20  # of the study's test images, in percent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return study(Path(tmp_path_factory.mktemp("golden")))


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return dict(json.loads(GOLDEN.read_text(encoding="utf-8")))


def test_rows_of_the_results_are_what_they_were(found: dict[str, Any], golden: dict[str, Any]) -> None:
    assert len(found["rows"]) == len(golden["rows"])
    for row, known in zip(found["rows"], golden["rows"], strict=True):
        for column in ("accuracy", "macro_accuracy"):
            assert row.pop(column) == pytest.approx(known.pop(column), abs=ONE_IMAGE)
        assert row == known


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
def test_trained_contexts_are_what_they_were(
    found: dict[str, Any], golden: dict[str, Any], dtype: str, tolerance: float
) -> None:
    known = golden[f"contexts_{dtype}"]
    assert found[f"contexts_{dtype}"].keys() == known.keys()
    for layout, numbers in found[f"contexts_{dtype}"].items():
        assert numbers == pytest.approx(known[layout], rel=tolerance, abs=tolerance)
