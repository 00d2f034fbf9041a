"""``cache-features`` and ``features`` from the command line, and what they make in a sweep."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fastcoop.cli import main
from fastcoop.features import FeatureStore
from fastcoop.results import load_predictions, load_results
from tests.small_world import write_backbone, write_dataset


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call a command in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), said.out, said.err

    return call


def write_grid(path: Path, backbone: Path, **changes: object) -> Path:
    coop = {"context_length": 2, "epochs": 2}
    grid = {"backbones": str(backbone), "shots": 1, "seeds": 1, "views": 1, "methods": {"coop": coop}}
    path.write_text(yaml.safe_dump(grid | changes))
    return path


def test_a_dataset_of_test_images_only_is_cached(run, backbone, tmp_path):
    data = write_dataset(tmp_path / "data" / "colours", train=0, val=0)
    code, out, _ = run("cache-features", "colours", "--backbone", backbone)
    assert (code, data.name in out) == (0, True)
    assert FeatureStore.open(tmp_path / "cache" / "tiny" / "colours.h5").splits == ("test",)


def test_unreadable_images_of_several_datasets_are_named_when_the_rest_is_done(run, backbone, tmp_path):
    for seed, name in enumerate(("one", "two", "three")):
        write_dataset(tmp_path / "data" / name, seed=seed)
    bad = [tmp_path / "data" / name / "test" / "green" / "0.png" for name in ("one", "two")]
    for path in bad:
        path.write_bytes(b"no picture")
    Image.new("L", (9, 9)).save(tmp_path / "data" / "three" / "test" / "green" / "0.png")
    command = ["cache-features", "one", "two", "three", "--backbone", backbone]
    few = ["--shots", "1", "--seeds", "1", "--views", "1"]
    code, out, err = run(*command, *few)
    assert code == 2
    assert out.split() == ["cache/tiny/three.h5"]
    assert all(str(path.relative_to(tmp_path)) in err for path in bad)
    assert "Traceback" not in err
    counts = [
        len(FeatureStore.open(f"cache/tiny/{name}.h5").indices("test")) for name in ("one", "two", "three")
    ]
    assert counts == [19, 19, 20]

    grid = write_grid(tmp_path / "grid.yaml", backbone, datasets=["one", "two", "three"])
    code, _, err = run("sweep", grid)
    assert code == 2
    assert all(str(path.relative_to(tmp_path)) in err for path in bad)
    code, out, _ = run(*command, *few, "--skip-unreadable")
    assert code == 0
    assert len(out.split()) == 3
    code, out, err = run("sweep", grid)
    assert (code, err) == (0, "")
    assert "finished 3 of 3 runs" in out

    code, out, _ = run("features", "check", "cache/tiny/three.h5")
    assert code == 0
    assert "No image was encoded again: that takes both --backbone and --dataset" in out
    code, out, _ = run(
        "features",
        "check",
        "cache/tiny/three.h5",
        "--backbone",
        backbone,
        "--dataset",
        "three",
        "--sample",
        "5",
    )
    assert code == 0
    assert "5 images encoded again: largest difference" in out
    assert "float16 moves their logits by" in out
    assert out.rstrip().endswith("no problems found")


def test_a_grid_file_caches_all_that_its_sweep_reads(run, backbone, tmp_path, monkeypatch):
    write_dataset(tmp_path / "data" / "source")
    write_dataset(tmp_path / "data" / "target", train=0, seed=1)
    grid = write_grid(
        tmp_path / "grid.yaml",
        backbone,
        datasets="source",
        targets={"source": "target"},
        recipe="official-2021",
    )
    code, out, _ = run("cache-features", grid, "--dtype", "float32")
    assert code == 0
    assert out.split() == ["cache/tiny/source.h5", "cache/tiny/target.h5"]
    metas = [FeatureStore.open(path).meta for path in out.split()]
    assert {(meta.recipe, meta.dtype, meta.views) for meta in metas} == {("official-2021", "float32", 1)}
    before = [Path(path).stat().st_mtime_ns for path in out.split()]
    code, out, _ = run("sweep", grid)
    assert code == 0
    assert "finished 1 of 1 run;" in out
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("cache/tiny/*.h5"))] == before
    code, _, err = run("sweep", grid, "--set", "recipe=current")
    assert code == 2
    assert "recipe official-2021 and current" in err
    for extra in (["--shots", "2"], ["source"]):
        code, _, err = run("cache-features", grid, *extra)
        assert code == 2
        assert "A grid file names what to cache itself" in err


def write_npz(path: Path, labels: np.ndarray, names: list[str], seed: int) -> Path:
    """Features whose classes can be told apart."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((len(names), 16))
    features = centres[labels] + 0.3 * rng.standard_normal((len(labels), 16))
    np.savez(path, features=features.astype(np.float32), labels=labels, names=np.array(names))
    return path


def test_features_computed_elsewhere_go_through_a_sweep(run, backbone, tmp_path, caplog):
    names = ["snowy owl", "red kite", "wren"]
    (tmp_path / "data").mkdir()
    for split, count, seed in (("train", 12, 1), ("val", 6, 2), ("test", 9, 3)):
        write_npz(tmp_path / f"{split}.npz", np.arange(count) % 3, names, seed)
    files = [part for split in ("train", "val", "test") for part in (f"--{split}", f"{split}.npz")]
    command = ["features", "import", *files, "--name", "birds", "--backbone", backbone]
    code, out, _ = run(*command, "--cache", "elsewhere", "--template", "a bird, the {}.")
    assert (code, out.strip()) == (0, "elsewhere/tiny/birds.h5")
    code, out, _ = run("features", "check", "elsewhere/tiny/birds.h5")
    assert code == 0
    methods = {"zero_shot": None, "linear_probe": None, "coop": {"context_length": 2, "epochs": 2}}
    grid = write_grid(
        tmp_path / "grid.yaml",
        backbone,
        datasets="elsewhere/tiny/birds.h5",
        shots=[1, "all"],
        methods=methods,
    )
    code, out, err = run("sweep", grid)
    assert code == 0, err
    assert "finished 5 of 5 runs" in out
    frame = load_results("results/grid")
    assert set(frame.dataset) == {"birds"}
    assert frame[(frame.method == "linear_probe") & (frame.shots.astype(str) != "1")].accuracy.item() == 100
    assert list(load_predictions("results/grid", frame.key[0]).class_names) == names
    code, _, _ = run("sweep", grid, "--set", "views=2", "--set", "recipe=current", "--dry-run")
    assert code == 0
    assert "birds holds imported features with 0 augmented views; views and recipe of the grid" in caplog.text
    code, _, err = run("datasets", "check", "elsewhere/tiny/birds.h5")
    assert code == 2
    assert "`fastcoop features check elsewhere/tiny/birds.h5` looks into it" in err
    code, _, err = run("cache-features", "elsewhere/tiny/birds.h5", "--backbone", backbone)
    assert code == 0
    other = write_backbone(tmp_path / "other")
    config = json.loads((other / "other.json").read_text())
    (other / "other.json").write_text(json.dumps(config | {"quick_gelu": True}))
    code, _, err = run("sweep", grid, "--set", f"backbones={other}")
    assert code == 2
    assert "made from other weights" in err
