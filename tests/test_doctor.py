"""``fastcoop doctor`` describes any machine, broken ones too, and its advice goes away when it is followed."""

from __future__ import annotations

import inspect
import json
import sys
from importlib.metadata import version
from typing import Any

import psutil
import pytest
import typer

import fastcoop
from fastcoop import doctor
from fastcoop.cli import main
from fastcoop.cli.app import app
from tests.advice import follows

WELL: dict[str, Any] = {
    "versions": {"torch": "2.14.1", "qtawesome": "1"},
    "devices": {"device auto": "cpu", "threads of torch": 2, "cores allowed": 2},
    "memory": {"available GB": 20.0},
    "folders": {"cache": {"free GB": 20.0}},
    "weights": {"downloaded": ["RN50:openai"]},
}


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    assert not stopped.value.code
    return capsys.readouterr().out


def test_it_prints_what_is_there(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FASTCOOP_CACHE", str(tmp_path))
    found = json.loads(told(capsys, "--json"))
    assert found["versions"]["fastcoop"] == fastcoop.__version__
    assert found["versions"]["torch"] == version("torch")
    assert found["folders"]["cache"]["path"] == str(tmp_path)
    assert found["folders"]["cache"]["exists"] is True
    assert found["variables"]["FASTCOOP_CACHE"] == str(tmp_path)
    assert found["weights"]["included"] == ["demo-resnet", "demo-vit"]
    assert found["memory"]["total GB"] == round(psutil.virtual_memory().total / 1e9, 1)
    monkeypatch.setattr(doctor, "examine", lambda: found)
    shown = told(capsys)
    assert shown.splitlines()[:2] == ["versions", f"  fastcoop           {fastcoop.__version__}"]
    assert f"path {tmp_path}, exists True" in shown


def test_open_clip_is_not_imported_which_takes_seconds(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    assert "unknown" not in str(doctor.examine())
    assert "open_clip" not in sys.modules


def test_broken_packages_are_described(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    found = json.loads(told(capsys, "--json"))
    assert found["devices"].startswith("unknown (ModuleNotFoundError")
    assert found["memory"].startswith("unknown")
    assert any("torch does not work" in line for line in found["advice"])


@follows(
    "{} is missing: reinstall fastcoop with pip.",
    '{} needs {}; install it with `pip install "fastcoop[{}]"`.',
    "torch does not work, {}: install it as pytorch.org says for this system.",
    "The GPU does not answer, so the CPU is used: restart its driver, or this machine.",
    "There is an NVIDIA driver, but torch finds no GPU: install torch's build for CUDA (pytorch.org).",
    "There is no C compiler (cc), so training is slower: install gcc or clang, or name one in CC.",
    "Only {} GB of memory are free: close other programs.",
    "Only {} GB are free for {}: delete files there, or choose another folder.",
)
@pytest.mark.parametrize(
    ("topic", "name", "value", "sentence"),
    [
        ("versions", "timm", "not installed", "timm is missing"),
        (
            "versions",
            "qtawesome",
            "not installed",
            'The demo needs qtawesome; install it with `pip install "fastcoop[demo]"`',
        ),
        ("devices", None, "unknown (OSError: x)", "torch does not work, unknown (OSError: x)"),
        ("devices", "cuda:0", "a card", "The GPU does not answer"),
        ("devices", "threads of torch", 1, "torch uses 1 of 2 cores: unset OMP_NUM_THREADS"),
        ("devices", "C compiler", "none", "There is no C compiler (cc)"),
        ("memory", "available GB", 1.0, "Only 1.0 GB of memory are free"),
        ("folders", "cache", {"free GB": 0.5}, "Only 0.5 GB are free for cache"),
        ("weights", "downloaded", [], "No pretrained weights are on this machine"),
    ],
)
def test_each_problem_has_one_line_of_advice(monkeypatch, tmp_path, topic, name, value, sentence) -> None:
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "version")
    assert not list(doctor.advice(WELL))
    changed = WELL | {topic: value if name is None else WELL[topic] | {name: value}}
    (line,) = doctor.advice(changed)
    assert line.startswith(sentence)
    doctor.NVIDIA.touch()
    (line,) = doctor.advice(WELL)
    assert line.startswith("There is an NVIDIA driver")
    assert not list(doctor.advice(WELL | {"devices": WELL["devices"] | {"device auto": "cuda"}}))


def commands(group: Any, name: str = "fastcoop") -> dict[str, Any]:
    found = {}
    for word, command in group.commands.items():
        inner = f"{name} {word}"
        found |= commands(command, inner) if hasattr(command, "commands") else {inner: command}
    return found


def test_a_gpu_is_used_everywhere_if_there_is_one() -> None:
    """By default of every command and function that takes a device."""
    defaults = {
        name: option.default
        for name, command in commands(typer.main.get_command(app)).items()
        for option in command.params
        if option.name == "device"
    }
    for name in fastcoop.__all__:
        one = getattr(fastcoop, name)
        is_error = isinstance(one, type) and issubclass(one, Exception)  # without a signature
        if not is_error and "device" in inspect.signature(one).parameters:
            default = inspect.signature(one).parameters["device"].default
            defaults[name] = "auto" if default is inspect.Parameter.empty else default
    assert {"fastcoop sweep", "fastcoop predict", "fastcoop cache-features", "load_backbone"} <= set(defaults)
    assert set(defaults.values()) == {"auto"}, defaults
