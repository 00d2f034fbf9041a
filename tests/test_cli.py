"""Commands end to end, and one clear sentence with exit code 2 for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml

from fastcoop.cli import app, main
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
    assert not (tmp_path / "results").exists()
    code, out, _ = run("sweep", grid, *data)
    assert code == 0
    assert "finished 5 of 5 runs" in out
    code, out, _ = run("sweep", grid, *data, "--json")
    assert json.loads(out)["finished"] == 0
    code, out, _ = run("interpret", "results/small", "--backbone", world / "tiny", "-k", "2", "--json")
    assert code == 0
    words = json.loads(out)
    assert len(words) == 2
    assert all(len(vector["words"]) == 2 for run_words in words.values() for vector in run_words["vectors"])
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
    assert "Traceback" not in err
    assert Path(out.strip()).read_bytes() == before


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
        ["bench", "--class-names", "nowhere"],
        ["bench", "--datasets", "imagnet"],
        ["cache-features", "x", "--shots", "one"],
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
    assert f"Example:  fastcoop {' '.join(command)} " in " ".join(out.replace("│", "").split()).replace(
        "Example: ", "Example:  "
    )


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
