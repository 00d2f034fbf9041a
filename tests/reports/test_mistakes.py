"""What went wrong, on the page: whose mistakes, in which order, and no picture that is not what was tested."""

from __future__ import annotations

import base64
import gzip
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

import fastcoop as fc
from fastcoop.cli import main
from fastcoop.reports import frames
from fastcoop.reports.items.mistakes import ITEM
from fastcoop.reports.study import Study, read_study
from tests.reports.made_up_results import results as made_up
from tests.reports.test_page import CHROMIUM
from tests.small_world import write_backbone, write_dataset

GRID = {
    "backbones": "tiny", "datasets": ["colours", "odd"], "shots": [2], "seeds": [1, 2, 3], "views": 0,
    "methods": {"coop": {"context_length": 2, "epochs": 2}, "zero_shot": None},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data``, ``cache`` and ``results`` of two datasets."""
    root = tmp_path_factory.mktemp("mistakes")
    write_dataset(root / "data" / "colours")
    write_dataset(root / "data" / "odd", ("grey", "purple", "green"), test=7)
    write_backbone(root / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        fc.sweep(GRID, data_root="data", cache="cache", results="results", jobs=1)
    return root


@pytest.fixture
def study(world: Path) -> Study:
    return replace(read_study(world / "results"), pictures=fc.PictureFinder(world / "data", world / "cache"))


def galleries(html: str) -> dict[str, list[tuple[str, str, str, int]]]:
    """By title: path, true class, predicted class and percent of each tile."""
    found = {}
    for title, tiles in re.findall(r"<h3>(.*?)</h3><div class=grid>(.*?)(?=<h3>|$)", html, re.DOTALL):
        found[title] = [
            (path, true, predicted, int(percent))
            for path, true, predicted, percent in re.findall(
                r'<div title="(.*?)">.*?<b>(.*?)</b><br>taken for (.*?), (\d+)%', tiles, re.DOTALL
            )
        ]
    return found


def unpacked(page: str) -> str:
    """The page, and behind it what it holds compressed."""
    packed = re.findall(r"data-packed>(.*?)<", page)
    return page + "".join(gzip.decompress(base64.b64decode(one)).decode() for one in packed)


def test_each_dataset_has_the_surest_mistakes_of_its_run(study: Study, world: Path) -> None:
    exhibits = ITEM.make(study)
    folds = dict.fromkeys(one.fold for one in exhibits)
    assert [fold.partition(":")[0] for fold in folds] == ["colours", "odd"]
    for fold in folds:
        pairs, drawn = (one for one in exhibits if one.fold == fold)
        name = fold.partition(":")[0]
        frame = fc.load_results(world / "results")
        own = frame[frame.dataset == name]
        key = pairs.table.notes[0].rpartition("key ")[2].removesuffix(".")
        run = own[own.key.str.startswith(key)].iloc[0]
        best = own[own.shots == 2].groupby("label").accuracy.mean().idxmax()
        seeds = sorted(own[(own.shots == 2) & (own.label == best)].accuracy)
        assert (run.label, run.accuracy) == (best, seeds[1])
        wrong = fc.mistakes(world / "results", key)
        images = len(fc.load_predictions(world / "results", run.key).labels)
        assert fold.startswith(f"{name}: {len(wrong)} of {images} test images wrong")
        top = pairs.table.rows[0]
        assert f"most confused: {top[0][0]} and {top[0][1]} ({top[1]['images']} image" in fold
        found = galleries(pairs.html)
        title, tiles = next(iter(found.items()))
        assert title.startswith(f"The surest of {len(wrong)} mistake")
        assert len(tiles) == min(len(wrong), 12)
        for (path, true, predicted, percent), row in zip(tiles, wrong.itertuples(), strict=False):
            assert path.split("/")[1] == true == row.true
            assert predicted == row.predicted
            assert percent == pytest.approx(100 * row.probability, abs=0.51)
        assert drawn.figure is not None
        assert [names[0] for names, _ in drawn.table.rows] == sorted(
            {path.parent.name for path in (world / "data" / name).glob("test/*/*")}
        )


def test_the_pictures_are_those_files(study: Study, world: Path) -> None:
    html = ITEM.make(study)[0].html
    tiles = re.findall(
        r'<div title="(.*?)"><img width=96 height=96 loading=lazy alt="(.*?)" src="data:image/jpeg;base64,(.*?)">',
        html,
    )
    assert tiles
    for path, alt, jpeg in tiles:
        with Image.open(world / "data" / "colours" / path) as picture:
            expected = np.asarray(picture, float).mean((0, 1))
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(jpeg))), float).mean((0, 1))
        assert np.abs(shown - expected).max() < 8
        assert alt.startswith(path.split("/")[1])


def test_two_runs_show_what_only_one_gets_right(study: Study, world: Path) -> None:
    frame = fc.load_results(world / "results")
    own = frame[(frame.dataset == "odd") & (frame.method == "coop")]
    first, second = own.key.iloc[0], own.key.iloc[-1]
    exhibits = ITEM.make(replace(study, chosen=(first, second)))
    assert {one.fold.partition(":")[0] for one in exhibits} == {"odd"}
    assert first[:12] in exhibits[0].table.notes[0]
    differ = fc.mistakes(world / "results", first, other=second)
    _, *found = galleries(exhibits[0].html).items()
    for (title, tiles), right in zip(found, ("first", "second"), strict=True):
        rows = differ[differ.right == right]
        assert f": {len(rows)} image" in title
        assert [tile[1] for tile in tiles] == rows.true.head(6).tolist()


def test_changed_and_missing_pictures_are_said_and_not_shown(
    study: Study, world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "data", tmp_path / "data")
    plain = galleries(ITEM.make(study)[0].html)
    path = next(iter(plain.values()))[0][0]
    Image.new("RGB", (24, 24), "white").save(tmp_path / "data" / "colours" / path)
    moved = replace(study, pictures=fc.PictureFinder(tmp_path / "data", world / "cache"))
    html = ITEM.make(moved)[0].html
    assert f"{path} has changed since the run was tested." in html
    assert galleries(html) == plain
    assert html.count("<img") < ITEM.make(study)[0].html.count("<img")
    nowhere = replace(study, pictures=fc.PictureFinder(tmp_path / "nothing", world / "cache"))
    assert (
        f"No pictures are shown. There is no dataset colours under {tmp_path / 'nothing'}."
        in ITEM.make(nowhere)[0].html
    )


def test_without_pictures_the_page_names_the_command(study: Study, world: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(world)
    here = replace(study, folder=Path("results"), pictures=None)
    html = ITEM.make(here)[0].html
    assert "<img" not in html
    command = re.search(r"To see the pictures: fastcoop (.*?)<", html)[1]
    assert command == "report results --gallery --cache cache --data-root data"
    key = fc.load_results("results").key.iloc[0]
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--out", "report", "--run", key[:12]])
    assert not stopped.value.code
    page = Path("report/index.html").read_text(encoding="utf-8")
    assert "data:image/jpeg;base64," in unpacked(page)
    assert re.search('<img id="image-mistakes-colours"[^>]* src="data:image/svg', unpacked(page))
    assert key[:12] in Path("report").joinpath("mistakes-colours-pairs.md").read_text()
    assert not list(Path("report").glob("mistakes-odd*"))
    assert "fastcoop report results --out report --gallery" in Path("report/index.html").read_text("utf-8")
    assert Path("report/mistakes-colours.png").stat().st_size > 10_000
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed to open the page in")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page()
        opened.goto(Path("report/index.html").absolute().as_uri())
        opened.click("#mistakes summary")
        picture = opened.locator("#mistakes .grid img").first
        picture.wait_for()
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 24
        narrow = (
            "image => { const canvas = document.createElement('canvas'); canvas.width = 8; canvas.height = 80;"
            " image.src = canvas.toDataURL(); return image.decode().then(() => image.getBoundingClientRect().height) }"
        )
        assert picture.evaluate(narrow) == 96
        link = opened.locator("#mistakes a[data-image]").last  # in a fold that was unpacked
        assert link.get_attribute("href").startswith("data:image/svg+xml")
        cells = opened.locator("#mistakes .panels.confusions .chart svg .mark-rect path")
        opened.locator("#mistakes .panels.confusions").scroll_into_view_if_needed()
        cells.first.wait_for()
        assert not opened.locator("#mistakes img.static").is_visible()
        background = "getComputedStyle(document.querySelector('#mistakes .chart svg')).backgroundColor"
        for scheme in ("light", "dark"):
            opened.emulate_media(color_scheme=scheme)
            assert opened.evaluate(background) == "rgba(0, 0, 0, 0)"
        box = cells.first.bounding_box()
        opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)  # over its count
        tip = opened.locator("#vg-tooltip-element.visible")
        tip.wait_for()
        rows = [line.split("\t") for line in tip.inner_text().splitlines()]
        assert [name for name, _ in rows] == ["true class", "predicted", "images", "of the true class"]
        table = fc.confusion("results", key, "colours")
        assert table.loc[rows[0][1], rows[1][1]] == int(rows[2][1])
        browser.close()


def test_results_without_predictions_lack_the_item() -> None:
    empty = made_up().iloc[:0]
    study = Study(Path("nowhere"), made_up(("objects",), (1,)).assign(prompt=None), empty, empty, {})
    with pytest.raises(frames.Missing, match="no predictions"):
        ITEM.make(study)


def test_pictures_of_renamed_classes_are_found_again(world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(shutil.copytree(world, tmp_path / "world", ignore=shutil.ignore_patterns("results")))
    path, _ = fc.write_class_names("colours", "names.csv", data_root="data")
    path.write_text(path.read_text().replace(",green", ",leaf green"))
    zero_shot = {**GRID, "datasets": "colours", "methods": {"zero_shot": None}}
    fc.sweep(zero_shot, data_root="data", cache="other-cache", results="renamed", jobs=1, class_names=path)
    assert "--class-names names.csv" in Path("renamed/grid.yaml").read_text().partition("\n")[0]
    with pytest.raises(SystemExit) as ended:
        main(["report", "renamed", "--out", "page", "--gallery"])
    assert not ended.value.code
    page = unpacked(Path("page/index.html").read_text(encoding="utf-8"))
    assert "leaf green" in page
    assert "No pictures are shown" not in page
    assert "data:image/jpeg;base64," in page
