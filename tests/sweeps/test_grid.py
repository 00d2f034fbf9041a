"""Grid files: what they say, and what is said about them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastcoop.errors import UserError
from fastcoop.sweeps import read_grid

TEXT = """\
backbones: [RN50, ViT-B/16]
datasets: dtd
shots: [1, all]
methods:
  - coop:
      context_length: [4, 16]
      epochs: {1: 5, all: 9}
  - zero_shot
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(TEXT)
    return path


def test_a_file_reads_as_written_with_defaults(file: Path) -> None:
    grid = read_grid(file)
    assert grid.backbones == ("RN50", "ViT-B/16")
    assert grid.datasets == ("dtd",)
    assert grid.shots == (1, "all")
    assert grid.seeds == (1, 2, 3)
    assert [name for name, _ in grid.methods] == ["zero_shot", "coop"]  # what is quick first
    assert [one.context_length for one in grid.runs_of("coop")] == [4, 16]
    assert grid.runs_of("coop")[0].epochs == {1: 5, "all": 9}


def test_values_given_on_the_command_line_win(file: Path) -> None:
    grid = read_grid(file, ["shots=2,4", "seeds=7", "methods.coop.epochs=3", "datasets=a,b"], ["coop"])
    assert (grid.shots, grid.seeds, grid.datasets) == ((2, 4), (7,), ("a", "b"))
    assert [name for name, _ in grid.methods] == ["coop"]
    assert {one.epochs for one in grid.runs_of("coop")} == {3}


def test_a_mapping_is_not_changed_by_overrides() -> None:
    given = {"backbones": "a", "datasets": "b", "methods": {"coop": {"epochs": 1}}}
    read_grid(given, ["methods.coop.epochs=2"])
    assert given["methods"] == {"coop": {"epochs": 1}}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("datasets:", "dataset:", r'Line 2: Unknown setting "dataset" .* Did you mean "datasets"'),
        ("- zero_shot", "- zeroshot", r'Line 8: There is no method "zeroshot". Did you mean "zero_shot"'),
        ("context_length", "contextlength", r'Line 6: .*Did you mean "context_length"'),
        ("shots: [1, all]", "shots: [0]", r"Line 3: .*shots.* cannot be 0"),
        ("datasets: dtd\n", "", r'"datasets" of .* is missing'),
        ("datasets: dtd", "datasets: []", "datasets"),
        ("[4, 16]", "[4, 16", "is not YAML"),
        ("datasets: dtd", "targets: {food: dtd}\ndatasets: dtd", '"food", which is not one of its datasets'),
        ("backbones", "!!python/object:os.system {}\nbackbones", "is not YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(file: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    file.write_text(TEXT.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_grid(file)


@pytest.mark.parametrize(
    ("overrides", "only", "message"),
    [
        (["shots"], [], "KEY=VALUE"),
        (["shot=1"], [], 'Did you mean "shots"'),
        (["methods.coop.epoch=1"], [], 'Did you mean "epochs"'),
        (["shots.coop=1"], [], "no keys of its own"),
        ([], ["linear_probe"], "no linear_probe; its methods are coop, zero_shot"),
        ([], ["linear_prob"], 'Did you mean "linear_probe"'),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said(
    file: Path, overrides: list[str], only: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_grid(file, overrides, only)


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_grid(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_grid(tmp_path / "binary.yaml")
