"""Images that cannot be decoded: the advice of each command can be followed, and what is left out is not counted."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastcoop.cli import main
from fastcoop.results import load_results
from tests.advice import follows


@pytest.fixture
def places(world: Path, tmp_path: Path) -> list[str]:
    shutil.copytree(world / "data" / "colours", tmp_path / "data" / "colours")
    shutil.copytree(world / "data" / "shifted", tmp_path / "data" / "shifted")
    (tmp_path / "g.yaml").write_text(
        f"{{backbones: '{world / 'tiny'}', datasets: colours, shots: 4, seeds: 1, views: 1, methods: linear_probe}}"
    )
    return ["--data-root", str(tmp_path / "data"), "--cache", str(tmp_path / "cache")]


def damage(folder: Path) -> None:
    next(iter(sorted(folder.iterdir()))).write_bytes(b"no picture")


def run(capsys: Any, *command: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(command))
    return int(ended.value.code or 0), capsys.readouterr().err


def test_the_advice_of_every_command_can_be_followed(
    world: Path, tmp_path: Path, places: list[str], capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    damage(tmp_path / "data" / "colours" / "train" / "green")
    damage(tmp_path / "data" / "shifted" / "test" / "green")
    results = str(tmp_path / "results")
    sweep = ["sweep", str(tmp_path / "g.yaml"), *places, "--results", results, "--jobs", "1"]
    tiny = str(world / "tiny")
    evaluate = ["evaluate", results, "--targets", "shifted", "--backbone", tiny, *places]
    for command in (sweep, evaluate):
        code, said = run(capsys, *command)
        assert code == 2
        (option,) = re.findall(r"--[a-z-]+", said)
        code, said = run(capsys, *command, option)
        assert code == 0, said
        assert "could not be read and were left out" in caplog.text
        caplog.clear()
        assert run(capsys, *command)[0] == 0  # what was left out stays so
    row = load_results(results).iloc[0]
    assert row.train_images == 4 * 4 - 1


def sweep_of(folder: Path, places: list[str]) -> list[str]:
    """The command that sweeps the folder's grid in this process."""
    results = str(folder / "results")
    return ["sweep", str(folder / "g.yaml"), *places, "--results", results, "--jobs", "1"]


def cache_of(world: Path, places: list[str]) -> list[str]:
    """The command that encodes the images of the grid's runs."""
    draws = ["--shots", "4", "--seeds", "1", "--views", "1"]
    return ["cache-features", "colours", *places, "--backbone", str(world / "tiny"), *draws]


def test_an_image_is_repaired(tmp_path: Path, places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data" / "colours" / "train" / "green"
    whole = (folder / "0.png").read_bytes()
    damage(folder)
    sweep = sweep_of(tmp_path, places)
    code, said = run(capsys, *sweep)
    assert code == 2
    assert "the others are stored. Repair these" in said
    (folder / "0.png").write_bytes(whole)
    assert run(capsys, *sweep)[0] == 0
    assert load_results(tmp_path / "results").train_images.item() == 16


@follows("Still left out of {}: {} that could not be read earlier; to try again, run")
def test_a_repaired_image_is_left_out_until_it_is_tried_again(
    world: Path, tmp_path: Path, places: list[str], capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    folder = tmp_path / "data" / "colours" / "train" / "green"
    whole = (folder / "0.png").read_bytes()
    damage(folder)
    sweep = sweep_of(tmp_path, places)
    assert run(capsys, *sweep, "--skip-unreadable")[0] == 0
    assert "Still left out" not in caplog.text
    (folder / "0.png").write_bytes(whole)
    for options in ([], ["--skip-unreadable"]):
        caplog.clear()
        assert run(capsys, *sweep, *options)[0] == 0
        assert "Still left out of colours: 1 image that could not be read earlier" in caplog.text
    assert run(capsys, *cache_of(world, places))[0] == 0
    assert run(capsys, *sweep)[0] == 0
    assert load_results(tmp_path / "results").train_images.tolist() == [15, 16]


def test_a_run_on_all_images_has_the_shots_that_could_be_read(
    tmp_path: Path, places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the pictures of each class are damaged: steps are those of a folder without them."""
    folders = sorted((tmp_path / "data" / "colours" / "train").iterdir())
    count = len(list(folders[0].iterdir()))
    for folder in folders:
        for picture in sorted(folder.iterdir())[: count // 2]:
            picture.write_bytes(b"no picture")
    fast = ("--set", "shots=all", "--set", "methods={coop: {context_length: 2, schedule: fast}}")
    assert run(capsys, *sweep_of(tmp_path, places), "--skip-unreadable", *fast)[0] == 0
    row, left = load_results(tmp_path / "results").iloc[0], count - count // 2
    assert (row.epochs, row.train_images) == (round(15 * left**0.5), len(folders) * left)


@follows("could be read, which choose {}; repair them and run `fastcoop cache-features`, or {}")
def test_nothing_is_chosen_on_no_images(
    world: Path, tmp_path: Path, places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A choice among equals of no accuracy would take the first."""
    pictures = sorted((tmp_path / "data" / "colours" / "val").rglob("*.png"))
    whole = [picture.read_bytes() for picture in pictures]
    for picture in pictures:
        picture.write_bytes(b"no picture")
    sweep = sweep_of(tmp_path, places)
    choosing, without = ("--set", "methods=gda"), ("--set", "methods={gda: {selection: fixed}}")
    code, said = run(capsys, *sweep, "--skip-unreadable", *choosing)
    assert code == 2
    drawn = "None of the validation images of colours that 4 shots and seed 1 draw could be read"
    assert f"{drawn}, which choose the values of gda; repair them and run" in said
    assert run(capsys, *sweep, *without)[0] == 0
    for picture, content in zip(pictures, whole, strict=True):
        picture.write_bytes(content)
    assert run(capsys, *cache_of(world, places))[0] == 0
    code, said = run(capsys, *sweep, *choosing)
    assert code == 0, said
