"""Commands end to end, and one clear sentence with exit code 2 for each mistake."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import typer
import yaml

from fastcoop.cli import main
from fastcoop.cli.app import app
from tests.small_world import write_backbone, write_dataset


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    write_dataset(root / "data" / "colours")
    write_backbone(root / "tiny")
    return root


@pytest.fixture
def run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call a command in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), said.out, said.err

    return call


def write_grid(path: Path, world: Path, **changes: object) -> Path:
    grid = {
        "backbones": str(world / "tiny"),
        "datasets": "colours",
        "shots": [1, 2],
        "seeds": 1,
        "views": 1,
        "methods": {"zero_shot": None, "linear_probe": None, "coop": {"context_length": 2, "epochs": 2}},
    }
    path.write_text(yaml.safe_dump(grid | changes))
    return path


def test_sweep_report_interpret_and_results_from_one_grid(run, world, tmp_path):
    grid = write_grid(tmp_path / "small.yaml", world)
    data = ["--data-root", world / "data"]
    code, out, _ = run("sweep", grid, *data, "--dry-run")
    assert code == 0
    assert "would run 5 of 5 runs" in out
    assert re.search(
        r"^tiny  prompts on the shared path: \d+ positions .* 308 on the plain path$", out, re.MULTILINE
    )
    assert not (tmp_path / "results").exists()
    code, out, _ = run("sweep", grid, *data)
    assert code == 0
    assert "finished 5 of 5 runs" in out
    assert "figures and tables: fastcoop report results/small\n" in out
    code, out, _ = run("sweep", grid, *data, "--json")
    assert json.loads(out)["finished"] == 0
    code, out, _ = run("interpret", "results/small", "--backbone", world / "tiny", "-k", "2", "--json")
    assert code == 0
    words = json.loads(out)
    assert len(words) == 2
    assert all(len(vector["words"]) == 2 for run_words in words.values() for vector in run_words["vectors"])
    _, out, _ = run("interpret", "results/small", "--backbone", world / "tiny")
    assert "(mean distance of the nearest words of a random context: " in out
    code, out, _ = run("report", "results/small")
    assert code == 0
    assert (tmp_path / "reports" / "small" / "figure3.png").stat().st_size > 10_000
    code, out, _ = run("results", "list", "results/small", "--json")
    assert {row["status"] for row in json.loads(out)} == {"done"}
    code, out, _ = run("results", "export", "results/small", "runs.csv")
    assert code == 0
    assert (tmp_path / "runs.csv").read_text().count("\n") == 6


def test_cache_features_then_a_store_of_other_weights_is_refused(run, world, tmp_path):
    code, out, _ = run(
        "cache-features", "colours", "--backbone", world / "tiny", "--data-root", world / "data",
        "--shots", "1", "--seeds", "1", "--views", "1",
    )  # fmt: skip
    assert code == 0
    assert Path(out.strip()).is_file()
    before = Path(out.strip()).read_bytes()
    other = write_backbone(tmp_path / "tiny")
    weights = other / "open_clip_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({key: value * 1.5 for key, value in load_file(weights).items()}, weights)
    arguments = ["--backbone", other, "--data-root", world / "data", "--shots", "1", "--seeds", "1"]
    code, _, err = run("cache-features", "colours", *arguments)
    assert code == 2
    assert "was made from other weights" in err
    assert "Traceback" not in err
    assert Path(out.strip()).read_bytes() == before


def make_empty(folder: Path) -> None:
    (folder / "train" / "yellow").mkdir()


def make_unreadable(folder: Path) -> None:
    (folder / "test" / "green" / "0.png").write_bytes(b"no picture")


def make_long(folder: Path) -> None:
    for split in ("train", "val", "test"):
        (folder / split / "green").rename(folder / split / " ".join(["green"] * 41))


def make_single(folder: Path) -> None:
    for path in folder.glob("*/*"):
        if path.name != "green":
            shutil.rmtree(path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (make_empty, "yellow holds no images"),
        (make_unreadable, "test/green/0.png: no image"),
        (make_long, "has 78 tokens with its 34 context vectors"),
        (make_single, "has 1 class, expected at least two"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_one_sentence_and_leaves_no_results(
    run, world, tmp_path, spoil, said
):
    spoil(write_dataset(tmp_path / "data" / "spoilt"))
    grid = write_grid(
        tmp_path / "small.yaml", world, datasets="spoilt", methods={"coop": {"context_length": 34}}
    )
    code, out, err = run("sweep", grid)
    assert code == 2
    assert err.count("fastcoop: ") == 1
    assert said in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "results").exists()
    assert (tmp_path / "cache").exists() == (spoil is make_unreadable)  # the other images are stored


def test_a_class_with_fewer_images_than_shots_gives_what_it_has_and_says_so(run, world, tmp_path, caplog):
    write_dataset(tmp_path / "data" / "few", train=3)
    grid = write_grid(tmp_path / "small.yaml", world, datasets="few", shots=16)
    code, out, _ = run("sweep", grid)
    assert code == 0
    assert "few has classes with fewer than 16 training images, all used: dark red (3)" in caplog.text
    assert "finished 3 of 3 runs" in out


def test_files_that_are_no_pictures_and_odd_names_do_no_harm(run, world, tmp_path):
    folder = write_dataset(tmp_path / "data" / "my colours")
    for split in ("train", "val", "test"):
        (folder / split / "green").rename(folder / split / "it's {grün} & 50%")
        (folder / split / ".DS_Store").write_bytes(b"\0")
        for name in (".DS_Store", "._0.png", "Thumbs.db", "notes.txt"):
            (folder / split / "grey" / name).write_bytes(b"\0")
    (folder / "test" / "grey" / "linked.png").symlink_to(folder / "test" / "grey" / "0.png")
    grid = write_grid(tmp_path / "small.yaml", world, datasets="my colours", shots=1)
    assert run("sweep", grid)[0] == 0
    assert run("report", "results/small")[0] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cache", "taken"], "cannot be written"),
        (["--results", "taken"], "cannot be written"),
        (["--data-root", "taken"], "is not a folder"),
        (["--memory-budget", "0"], "in GB to be a finite number above 0, got 0.0"),
        (["--memory-budget", "nan"], "in GB to be a finite number above 0, got nan"),
        (["--jobs", "0"], "to be a whole number from 1 to 1024, got 0"),
        (["--set", "shots=-1"], "--set shots=-1: "),
    ],
)
def test_an_option_that_cannot_be_is_one_sentence_and_leaves_nothing(run, world, tmp_path, options, said):
    grid = write_grid(tmp_path / "small.yaml", world)
    (tmp_path / "taken").write_text("a file")
    code, out, err = run("sweep", grid, "--data-root", world / "data", *options)
    assert (code, out) == (2, "")
    assert err.count("fastcoop: ") == 1
    assert said in err
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml", "taken"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"datasets": "colour"}, "colour"),
        ({"backbones": "RN5"}, "RN50"),
        ({"methods": ["linear_prob"]}, "linear_probe"),
        ({"shot": [1]}, "shots"),
        ({"methods": {"coop": {"context_lenght": 4}}}, "context_length"),
        ({"methods": {"coop": {"context_length": 0}}}, "context_length"),
        ({"shots": [0]}, "shots"),
    ],
)
def test_a_mistake_in_a_grid_is_one_sentence_and_leaves_nothing(run, world, tmp_path, changes, said):
    grid = write_grid(tmp_path / "wrong.yaml", world, **changes)
    code, out, err = run("sweep", grid, "--data-root", world / "data")
    assert code == 2
    assert err.startswith("fastcoop: ")
    assert said in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["sweep", "nowhere.yaml"],
        ["report", "nowhere"],
        ["results", "list", "nowhere"],
        ["cache-features", "nowhere", "--backbone", "demo"],
        ["datasets", "--data-root", "nowhere"],
        ["datasets", "check", "oxford_pet"],
        ["bench", "--datasets", "imagnet"],
        ["bench", "--datasets", "imagenet-10", "--out", "/dev/null/bench"],
        ["cache-features", "x", "--shots", "one"],
        ["cache-features", "x", "--shots", "²"],
        ["demo", "--out", "/dev/null/demo"],
    ],
)
def test_what_does_not_exist_is_one_sentence(run, arguments, tmp_path):
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("fastcoop: ")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def every_command() -> list[list[str]]:
    """All commands that do something, as a user types them."""
    names = []
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", {})
        names += [[name, one] for one in inner]
        if not inner or command.invoke_without_command:
            names.append([name])
    return names


@pytest.mark.parametrize("command", every_command(), ids=" ".join)
def test_every_command_teaches_by_example(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert f"Example: fastcoop {' '.join(command)} " in " ".join(out.split()) + " "


def test_scripts_read_json(run, world, tmp_path):
    data = ["--data-root", world / "data"]
    few = ["--shots", "1", "--seeds", "1", "--views", "0"]
    code, out, _ = run("cache-features", "colours", "--backbone", world / "tiny", *data, *few, "--json")
    assert code == 0
    (store,) = json.loads(out)
    code, out, _ = run("features", "check", store, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["counts"] == {"train": 4, "val": 8, "test": 20}
    assert found["meta"]["dataset"] == "colours"
    assert found["problems"] == []
    grid = write_grid(tmp_path / "small.yaml", world, methods={"coop": {"context_length": 2, "epochs": 1}})
    run("sweep", grid, *data, "--set", "shots=1")
    code, out, _ = run("results", "list", "results/small", "--json")
    (row,) = json.loads(out)
    wanted = ["--results", "results/small", "--format", "safetensors", "--json"]
    code, out, _ = run("export", row["key"], *wanted)
    assert code == 0
    assert Path(json.loads(out)["file"]).is_file()


def test_folders_have_defaults_in_the_environment_and_lists_have_commas(run, world, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCOOP_DATA_ROOT", str(world / "data"))
    monkeypatch.setenv("FASTCOOP_CACHE", str(tmp_path / "elsewhere"))
    grid = write_grid(tmp_path / "small.yaml", world, shots=1)
    code, out, _ = run("sweep", grid, "--only", "zero_shot,linear_probe")
    assert (code, "finished 2 of 2 runs" in out) == (0, True)
    assert (tmp_path / "elsewhere" / "tiny" / "colours.h5").is_file()
    rows = json.loads(run("results", "list", "results/small", "--json")[1])
    keys = [row["key"] for row in rows]
    write_dataset(tmp_path / "shades", train=0, val=0, seed=1)
    write_dataset(tmp_path / "with, comma", train=0, val=0, seed=2)
    targets = f'{tmp_path / "shades"},"{tmp_path / "with, comma"}"'
    backbone = ["--backbone", world / "tiny"]
    for runs in (["--run", ",".join(keys)], ["--run", keys[0], "--run", keys[1]]):
        code, out, err = run("evaluate", "results/small", "--targets", targets, *runs, *backbone, "--json")
        assert code == 0, err
        assert len(json.loads(out)) == 4
