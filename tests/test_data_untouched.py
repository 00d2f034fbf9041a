"""No command writes into, renames or removes anything in the folders of a dataset."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastcoop.cli import main
from tests.small_world import write_backbone, write_dataset


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, time of the last change and content of everything below a folder, and of itself."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        stat = path.stat()
        content = path.read_bytes() if path.is_file() else b""
        found[path.relative_to(folder).as_posix()] = (stat.st_mode, stat.st_mtime_ns, content)
    return found


def test_every_command_leaves_the_pictures_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    write_dataset(data / "colours")
    write_dataset(data / "other", ("purple", "green"), train=0, val=0)
    rows = [
        f"{path.relative_to(data)},{path.parent.name}" for path in (data / "colours" / "train").rglob("*.png")
    ]
    (data / "list.csv").write_text("\n".join(["path,class", *rows]))
    write_backbone(tmp_path / "tiny")
    Path("g.yaml").write_text(
        "{backbones: tiny, datasets: [colours, list.csv], shots: [1, all], seeds: 1, views: 1, methods: "
        "{coop: {context_length: 2, epochs: 2}, linear_probe: null, zero_shot: null}}"
    )
    for path in (data, *data.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    before = snapshot(data)
    try:
        for command in (
            "datasets",
            "datasets check colours",
            "datasets check list.csv --json",
            "sweep g.yaml --dry-run",
            "cache-features colours list.csv --backbone tiny --shots 1,2 --seeds 1 --views 1",
            "cache-features g.yaml",
            "features check cache/tiny/colours.h5 --backbone tiny --dataset colours",
            "sweep g.yaml --jobs 1 --set datasets=colours",
            "sweep g.yaml --jobs 2",
            "evaluate results/g --targets other,colours:base --backbone tiny",
            "report results/g",
            "interpret results/g --backbone tiny",
            "export --results results/g --backbone tiny --out classifier.safetensors KEY",
            "predict classifier.safetensors data/other --backbone tiny",
        ):
            if "KEY" in command:
                from fastcoop.results import load_results

                runs = load_results("results/g")
                command = command.replace(
                    "KEY", runs.key[(runs.method == "coop") & (runs.dataset == "colours")].iloc[0]
                )
            with pytest.raises(SystemExit) as ended:
                main(command.split())
            assert not ended.value.code, (command, capsys.readouterr().err)
            assert snapshot(data) == before, command
    finally:
        for path in (data, *data.rglob("*")):
            os.chmod(path, 0o755)
