"""Class names of one's own: files that give them, their template, and what they change."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import fastcoop as fc
from fastcoop.cli import main
from fastcoop.datasets import Dataset, load_dataset, write_class_names
from fastcoop.datasets.names import suggest_names
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore
from fastcoop.results import load_results
from tests.advice import follows
from tests.datasets.conftest import images
from tests.small_world import write_backbone, write_dataset

BIRDS = ("001.Laysan_Albatross", "002.Rusty_Blackbird")


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (BIRDS, ["Laysan Albatross", "Rusty Blackbird"]),
        (["n02085620-Chihuahua", "n02086240-Shih-Tzu"], ["Chihuahua", "Shih-Tzu"]),
        (["n01440764", "n02102040"], ["tench", "English Springer Spaniel"]),
        (["AnnualCrop", "SeaLake", "McDonalds"], ["Annual Crop", "Sea Lake", "McDonalds"]),
        (["class_1_rose", "class_2_tulip"], ["rose", "tulip"]),
        (["Category-rose", "category-tulip"], ["rose", "tulip"]),
        (["Tomato___Late_blight", "Tomato___healthy"], ["Tomato Late blight", "Tomato healthy"]),
        (["737-800", "747-400"], ["737-800", "747-400"]),
        (["2_door", "sedan"], ["2 door", "sedan"]),
        (["1.cat", "2.cat", "3.dog"], ["1.cat", "2.cat", "dog"]),
        (["0", "1"], ["0", "1"]),
    ],
)
def test_suggested_names_lack_numbers_and_prefixes(classes: list[str], names: list[str]) -> None:
    assert suggest_names(classes) == names


def lines(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def write(path: Path, *rows: tuple[str, str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("class", "name"), *rows])
    return path


@pytest.fixture
def birds(tmp_path: Path, put) -> Path:
    put(tmp_path / "birds", images(*BIRDS))
    return tmp_path / "birds"


def test_a_template_that_is_corrected_renames(
    birds: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(birds.parent)
    with pytest.raises(SystemExit) as ended:
        main(["datasets", "names", "birds", "--data-root", "."])
    assert ended.value.code in (0, None)
    assert "birds-names.csv: 2 classes, 2 renamed" in capsys.readouterr().out
    path = birds.parent / "birds-names.csv"
    assert lines(path) == [["class", "name"], [BIRDS[0], "Laysan Albatross"], [BIRDS[1], "Rusty Blackbird"]]
    assert sorted(one.name for one in birds.iterdir()) == list(BIRDS), "nothing is written into the folder"
    path.write_text(path.read_text().replace("Rusty ", "rusty "))
    with pytest.raises(SystemExit) as ended:
        main(["datasets", "check", "birds", "--data-root", ".", "--class-names", str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["counts"]["classes"] == [2, None]
    named, bare = load_dataset(birds, class_names=path), load_dataset(birds)
    assert named.class_names == ("Laysan Albatross", "rusty Blackbird")
    assert bare.class_names == BIRDS
    assert named.digest != bare.digest, "names are part of what runs are of"
    assert {key: split.paths for key, split in named.splits.items()} == {
        key: split.paths for key, split in bare.splits.items()
    }
    assert load_dataset(birds, class_names=dict(lines(path)[1:])).digest == named.digest


def test_the_yaml_may_name_a_file(birds: Path) -> None:
    write(birds / "names.csv", (BIRDS[1], "blackbird"), (BIRDS[0], "albatross"))
    (birds / "dataset.yaml").write_text("class_names: names.csv")
    assert load_dataset(birds).class_names == ("albatross", "blackbird")
    assert load_dataset(birds, class_names={BIRDS[0]: "a", BIRDS[1]: "b"}).class_names == ("a", "b")
    _, names = write_class_names(birds, birds.parent / "again.csv")
    assert list(names.values()) == ["albatross", "blackbird"], "what the YAML says is kept"


def test_a_csv_has_a_template_too(tmp_path: Path, put) -> None:
    put(tmp_path, [f"{number}.jpg" for number in range(6)])
    rows = [
        ("path", "class"),
        *((f"{number}.jpg", f"{number % 2}_{'ab'[number % 2]}x") for number in range(6)),
    ]
    (tmp_path / "list.csv").write_text("\n".join(map(",".join, rows)))
    path, names = write_class_names(tmp_path / "list.csv", tmp_path / "names.csv")
    assert names == {"0_ax": "ax", "1_bx": "bx"}
    assert load_dataset(tmp_path / "list.csv", class_names=path).class_names == ("ax", "bx")


def refused(birds: Path, *rows: tuple[str, str]) -> str:
    path = birds.parent / "names.csv"
    with pytest.raises(UserError) as caught:
        load_dataset(birds, class_names=write(path, *rows))
    with pytest.raises(UserError) as of_mapping:
        load_dataset(birds, class_names=dict(rows) if len(dict(rows)) == len(rows) else {})
    assert "\n" not in f"{caught.value}{of_mapping.value}"
    return str(caught.value).replace(str(path), "FILE").replace(str(birds), "FOLDER")


@follows(
    "has no name for {} of {}: {}; add them",
    'names the class "{}" a second time; leave one of them',
    'has an empty name for the class "{}"; give it one',
    'which "{}" has; give each class a name of its own',
)
def test_files_that_cannot_be_used_are_one_sentence(birds: Path) -> None:
    first, second = BIRDS
    assert refused(birds, (first, "x")) == f"FILE has no name for 1 class of FOLDER: {second}; add them."
    assert refused(birds, (first, "x"), (second, "y"), ("003.Owl", "z")).startswith(
        'FILE line 4 names the class "003.Owl", which FOLDER does not have.'
    )
    assert refused(birds, (first, "x"), (first, "y")) == (
        f'FILE line 3 names the class "{first}" a second time; leave one of them.'
    )
    assert refused(birds, (first, "a_Bird"), (second, "a bird")) == (
        f'FILE line 3 gives "{second}" the name "a bird", which "{first}" has; give each class a name of its own.'
    )
    assert refused(birds, (first, "__"), (second, "y")) == (
        f'FILE line 2 has an empty name for the class "{first}"; give it one.'
    )
    assert refused(birds, (first, ""), (second, "y")) == "FILE line 2 has an empty name."
    path = birds.parent / "names.csv"
    for content, part in (
        ("folder,name\n", 'got folder, name. Name one of its columns "class".'),
        ("class,name\na,b,c\n", "line 2 does not have the 2 columns of line 1"),
        ("class,name,name\n", 'line 1 names the column "name" twice'),
        ('class,name\n"a', "line 2 is not valid CSV"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=part):
            load_dataset(birds, class_names=path)
    for place in ("nowhere.csv", birds, "names.txt"):
        with pytest.raises(
            UserError, match=r"Expected the class names in a \.csv with the columns class and name"
        ):
            load_dataset(birds, class_names=place)
    assert load_dataset(birds, class_names=write(path, (first, "x"), (second, "y"))).class_names == ("x", "y")


@follows("is already there; choose another file (--out), or remove it")
def test_a_template_overwrites_nothing(birds: Path) -> None:
    path = write(birds.parent / "mine.csv", ("a", "b"))
    before = path.read_bytes()
    with pytest.raises(UserError, match="choose another file"):
        write_class_names(birds, path)
    assert path.read_bytes() == before
    assert write_class_names(birds, birds.parent / "other.csv")[0].is_file()
    path.unlink()
    write_class_names(birds, path)


@follows("has class names of its own; give names for a folder or CSV of yours only")
def test_official_datasets_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "eurosat" / "2750").mkdir(parents=True)
    for call in (
        lambda: load_dataset("eurosat", tmp_path, {"a": "b"}),
        lambda: write_class_names("eurosat", tmp_path / "x.csv", tmp_path),
    ):
        with pytest.raises(UserError, match="EuroSAT has class names of its own"):
            call()


@follows(
    "leave them out, or name a file under class_names in the dataset.yaml of each",
    "was made with other class names: {}; give the names as before, or use another cache folder",
)
def test_a_sweep_uses_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("colours", 0), ("others", 1)):
        write_dataset(tmp_path / name, seed=seed, train=2, val=1, test=2)
    tiny = str(write_backbone(tmp_path / "tiny"))
    path, _ = write_class_names("colours", tmp_path / "names.csv", tmp_path)
    path.write_text(path.read_text().replace(",grey", ",light grey"))
    assert load_dataset("colours:new", tmp_path, path).class_names == ("light grey", "sky blue")
    grid = {"backbones": tiny, "datasets": ["colours"], "methods": ["zero_shot"]}
    places = {"data_root": tmp_path, "cache": tmp_path / "cache", "results": tmp_path / "results", "jobs": 1}
    named = fc.sweep(grid, class_names=path, **places)
    assert named.finished == 1
    assert fc.sweep(grid, class_names=path, **places).done_before == 1

    def dataset(class_names: Path | None = None) -> Dataset:
        return load_dataset(tmp_path / "colours", class_names=class_names)

    store = tmp_path / "cache" / "tiny" / "colours.h5"
    FeatureStore.open(store, tiny, dataset(path))
    with pytest.raises(UserError, match='"light grey" is now "grey"; give the names as before'):
        fc.sweep(grid, **places)
    assert fc.sweep(grid, **places | {"cache": tmp_path / "elsewhere"}).finished == 1, "another run"
    assert load_results(tmp_path / "results").key.nunique() == 2
    both = grid | {"datasets": ["colours", "others"]}
    with pytest.raises(
        UserError, match="got colours, others; leave them out, or name a file under class_names"
    ):
        fc.sweep(both, class_names=path, **places)
    (tmp_path / "colours" / "dataset.yaml").write_text(f"class_names: {path}")
    assert fc.sweep(both, **places).done_before == 1
