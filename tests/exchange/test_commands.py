"""The three commands, end to end."""

from __future__ import annotations

import json
import os

import pytest

from fastcoop.cli import main
from fastcoop.exchange import image_files


def test_export_predict_and_import_from_the_command_line(world, key, tmp_path, monkeypatch, capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    monkeypatch.chdir(tmp_path)
    run, tiny, test = key(), ["--backbone", world / "tiny"], world / "data/colours/test"
    code, out, _ = call("export", run[:10], "--results", world / "results", *tiny)
    assert code == 0
    assert out.strip() == f"exported/{run[:12]}.classifier.safetensors"
    code, out, err = call("predict", out.strip(), test / "green", *tiny, "-k", 2, "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert len(rows) == 5
    assert all(len(row["labels"]) == 2 for row in rows)
    assert rows[0]["labels"][0]["probability"] >= rows[0]["labels"][1]["probability"] > 0

    (tmp_path / "broken.png").write_bytes(b"no picture")
    code, out, err = call("predict", f"exported/{run[:12]}.classifier.safetensors", "broken.png", test, *tiny)
    assert code == 2
    assert "broken.png" in err
    assert out.count("\n") == 20
    assert "%" in out

    for nameless in (
        ["export", run, "--results", world / "results"],
        ["predict", f"exported/{run[:12]}.classifier.safetensors", test],
    ):
        code, _, err = call(*nameless)
        assert code == 2
        assert "pass its folder or weights with --backbone" in err

    code, _, _ = call(
        "export", run, "--results", world / "results", "--format", "coop", "--out", "output", *tiny
    )
    assert code == 0
    code, out, _ = call("import-coop", "output", "--dataset", "colours", "--data-root", world / "data", *tiny)
    assert code == 0
    assert out.endswith("1 run: results/imported\n")


def test_images_in_folders_to_predict(tmp_path, caplog):
    for name in ("b/2.JPG", "a/1.jpg", "a/deep/3.jfif", "__MACOSX/a/1.jpg", "a/._1.jpg", "a/Thumbs.db"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff\xd8\xff\xe0")
    os.symlink(tmp_path, tmp_path / "a" / "up")
    assert [path.relative_to(tmp_path).as_posix() for path in image_files([tmp_path])] == [
        "a/1.jpg",
        "a/deep/3.jfif",
        "b/2.JPG",
    ]
    assert not caplog.text
    (tmp_path / "b" / "4.heic").touch()
    (tmp_path / "b" / "5").write_bytes(b"\xff\xd8\xff\xe0")
    assert len(image_files([tmp_path])) == 3
    assert "leaves out 2 pictures with an unknown ending, such as b/4.heic and 1 more" in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "3f2a", "--results", "nowhere"],
        ["predict", "nowhere.safetensors", "nowhere.jpg"],
        ["import-coop", "nowhere", "--dataset", "nothing", "--backbone", "demo-resnet"],
    ],
)
def test_mistakes_are_one_sentence(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.err.startswith("fastcoop: ")
    assert "Traceback" not in said.err
    assert not list(tmp_path.iterdir())
