"""The exit codes of docs/exit-codes.md, of every command, with and without ``--json``, also with ``-q``."""

from __future__ import annotations

import importlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import fastcoop
from fastcoop.cli import main
from fastcoop.errors import UserError
from tests.small_world import write_backbone, write_dataset

FASTCOOP = [sys.executable, "-m", "fastcoop.cli"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a backbone, results, a feature store and a classifier, by relative paths."""
    root = tmp_path_factory.mktemp("codes")
    write_dataset(root / "data" / "colours", train=2, val=1, test=2)
    write_dataset(root / "data" / "shades", train=2, val=1, test=2)
    write_quiet_backbone(root / "tiny")
    (root / "grid.yaml").write_text(
        "backbones: tiny\ndatasets: colours\nshots: 1\nseeds: 1\nviews: 0\n"
        "methods: {zero_shot: , coop: {context_length: 2, epochs: 1}}\n"
    )
    before = Path.cwd()
    os.chdir(root)
    try:
        assert code_of("sweep", "grid.yaml") == 0
        frame = fastcoop.load_results("results/grid")
        (key,) = frame.key[frame.method == "coop"]
        assert (
            code_of(
                "export", key, "--results", "results/grid", "--backbone", "tiny", "--out", "c.safetensors"
            )
            == 0
        )
        export = ("export", key, "--results", "results/grid", "--backbone", "tiny", "--format", "coop")
        assert code_of(*export, "--out", "output") == 0
        features, labels = np.eye(4, 16, dtype=np.float32), np.arange(4) % 2
        np.savez(root / "test.npz", features=features, labels=labels, names=np.array(["cat", "dog"]))
        (root / "bad.yaml").write_text("backbones: tiny\ndatasets: colours\nshots: 0\nmethods: zero_shot\n")
        (root / "key").write_text(key)
        (root / "broken.png").write_bytes(b"no picture")
        (root / "data" / "oxford_pets" / "images").mkdir(parents=True)
    finally:
        os.chdir(before)
    return root


def write_quiet_backbone(folder: Path) -> None:
    """A backbone that there is nothing to say of."""
    (config,) = write_backbone(folder).glob("*.json")
    model = json.loads(config.read_text())
    config.write_text(json.dumps(model | {"quick_gelu": False}))


def code_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


STORE = "cache/tiny/colours.h5"
TARGET = ["--targets", "shades", "--backbone", "tiny"]
DONE = {
    "cache-features": ["colours", "--backbone", "tiny", "--shots", "1", "--seeds", "1", "--views", "0"],
    "datasets": [],
    "datasets check": ["colours"],
    "datasets draw": ["colours", "--shots", "1", "--seeds", "1", "--out", "draws"],
    "evaluate": ["results/grid", *TARGET],
    "export": ["KEY", "--results", "results/grid", "--backbone", "tiny", "--out", "again.safetensors"],
    "export-weights": ["results/grid", "--backbone", "tiny", "--out", "prototypes"],
    "features check": [STORE],
    "features import": ["--test", "test.npz", "--name", "NEW", "--backbone", "tiny"],
    "import-coop": ["output", "--dataset", "colours", "--backbone", "tiny", "--results", "NEW"],
    "interpret": ["results/grid", "--backbone", "tiny"],
    "predict": ["c.safetensors", "data/colours/test", "--backbone", "tiny"],
    "report": ["results/grid", "--out", "rep"],
    "results compare": ["results/grid", "results/grid"],
    "results export": ["results/grid", "runs.csv"],
    "results list": ["results/grid"],
    "results merge": ["results/grid", "--into", "merged"],
    "results show": ["results/grid", "KEY"],
    "sweep": ["grid.yaml"],
}
REFUSED = {
    "bench": ["--datasets", "imagnet"],
    "cache-features": ["nowhere", "--backbone", "tiny"],
    "datasets": ["--data-root", "nowhere"],
    "datasets check": ["nowhere"],
    "demo": ["--out", "grid.yaml"],
    "datasets draw": ["nowhere"],
    "evaluate": ["results/grid", "--targets", "nowhere", "--backbone", "tiny"],
    "export-weights": ["nowhere"],
    "export": ["KEY", "--results", "results/grid", "--format", "jpeg"],
    "features check": ["nowhere.h5"],
    "features import": ["--test", "nowhere.npz", "--name", "n", "--backbone", "tiny"],
    "import-coop": ["nowhere", "--dataset", "colours", "--backbone", "tiny"],
    "interpret": ["nowhere", "--backbone", "tiny"],
    "predict": ["nowhere.safetensors", "data"],
    "report": ["nowhere"],
    "results compare": ["results/grid"],
    "results export": ["results/grid", "runs.xlsx"],
    "results list": ["nowhere"],
    "results merge": ["nowhere", "--into", "merged"],
    "results show": ["results/grid", "zzz"],
    "sweep": ["bad.yaml"],
}
FOUND = {  # checks that found something, and pictures that cannot be read
    "datasets check": ["oxford_pets"],
    "predict": ["c.safetensors", "data/colours/test/green", "broken.png", "--backbone", "tiny"],
}
CASES = [
    (code, command, arguments)
    for code, cases in ((0, DONE), (2, REFUSED), (2, FOUND))
    for command, arguments in cases.items()
]


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["plain", "json"])
@pytest.mark.parametrize("quiet", [[], ["-q"]], ids=["said", "quiet"])
@pytest.mark.parametrize(("code", "command", "arguments"), CASES, ids=lambda value: str(value)[:30])
@pytest.mark.usefixtures("undrawn")
def test_every_command_has_its_codes(world, monkeypatch, capsys, code, command, arguments, quiet, more):
    monkeypatch.chdir(world)
    key = (world / "key").read_text()
    new = f"{command.replace(' ', '-')}-{len(quiet)}{len(more)}"
    words = [{"KEY": key, "NEW": new}.get(word, word) for word in arguments]
    assert code_of(*quiet, *command.split(), *words, *more) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    found = (command, arguments) in FOUND.items()
    if code == 0 or (found and more):
        if more:
            json.loads(said.out, parse_constant=pytest.fail)
        elif command != "sweep":
            assert said.out
    if code == 2 and not found:
        assert said.out == ""
        assert len([line for line in said.err.splitlines() if line.startswith("fastcoop: ")]) == 1
    if quiet and code == 0:
        assert said.err == ""


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["plain", "json"])
def test_a_sweep_whose_runs_failed_ends_with_1(world, monkeypatch, capsys, more):
    monkeypatch.chdir(world)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("fastcoop.methods.coop.CoOpMethod.run", fail)
    for again in ([], ["--retry-failed"]):  # failed now, and failed before
        where = ["--results", f"failed{len(more)}", *again, *more]
        assert code_of("sweep", "grid.yaml", "--jobs", "1", *where) == 1
        said = capsys.readouterr()
        assert "1 run failed; --retry-failed tries them again" in said.err
        if more:
            assert len(json.loads(said.out)["failed"]) == 1


def test_a_command_line_that_is_wrong_is_one_sentence(capsys):
    for arguments in (["swep"], ["sweep"], ["sweep", "g.yaml", "--jobs", "x"], ["sweep", "g.yaml", "--jobs"],
                      ["report", "r", "--dry-rum"], ["sweep", "g.yaml", "--[red]"]):  # fmt: skip
        assert code_of(*arguments) == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert line.startswith("fastcoop: ")
        assert line.endswith("--help` shows what it takes.")
        assert "?;" not in line


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["plain", "json"])
@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("sweep grid.yaml --results other", "fastcoop.sweeps.grid_sweep.cache_loaded"),
        (
            "cache-features colours --backbone tiny --cache other --shots 1",
            "fastcoop.features.encode.encode_missing",
        ),
        ("evaluate results/grid --targets shades --backbone tiny", "fastcoop.sweeps.evaluate"),
        ("interpret results/grid --backbone tiny", "fastcoop.sweeps.interpret"),
        ("predict c.safetensors broken.png", "fastcoop.exchange.predict"),
        ("report results/grid --out other", "fastcoop.reports.report"),
        ("results list results/grid", "fastcoop.results.listing.load_results"),
        ("demo --out other", "fastcoop.demo.run.build_world"),
        ("bench --datasets imagenet-10 --out other", "fastcoop.bench.run_bench"),
    ],
)
def test_an_interrupted_command_is_130_and_one_line(world, monkeypatch, capsys, command, place, more):
    monkeypatch.chdir(world)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    room, _, name = place.rpartition(".")
    monkeypatch.setattr(importlib.import_module(room), name, interrupt)
    assert code_of(*command.split(), *more) == 130
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("Stopped. ")


def test_ctrl_c_reaches_a_command(world):
    """A real signal, while a sweep trains."""
    command = "sweep grid.yaml --results long --jobs 1 --json --set methods.coop.epochs=100000"
    process = subprocess.Popen(
        [*FASTCOOP, *command.split()],
        cwd=world,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell has programs in its background ignore the signal, and they hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    results = world / "long" / "results.sqlite"
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        with suppress(UserError):
            if results.exists() and len(fastcoop.load_results(world / "long")):
                break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    assert err.endswith(STOPPED)
    assert "Traceback" not in err


STOPPED = "Stopped. Finished work is kept; the same command continues it.\n"


def run_interruptible(*command: str, **options) -> tuple[int, str, str]:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("module", ["torch", "typer"])
@pytest.mark.parametrize("reaction", ["os.abort()", "pass", "raise RuntimeError('in a callback')"])
def test_ctrl_c_while_a_library_is_imported_is_130(tmp_path, module, reaction):
    """Torch's C++ code aborts the process where Python code that it calls raises; others swallow or replace errors."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal, time\n"
        "def called_from_c():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(1)\n"
        "try:\n"
        "    called_from_c()\n"
        "except BaseException:\n"
        f"    {reaction}\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(fastcoop.__file__).parents[1]}"}
    assert run_interruptible(*FASTCOOP, "cache-features", "colours", env=env) == (130, "", STOPPED)


@pytest.mark.parametrize(
    "place", ["dying = Mortal(); del dying", "finalize(Mortal, press_ctrl_c)()", "drawing_in_c()"]
)
def test_ctrl_c_where_its_exception_is_ignored_or_replaced_is_130(place):
    """Python ignores exceptions of finalizers, and C code of libraries raises others in their place."""
    script = (
        "import os, signal, sys, time\n"
        "from weakref import finalize\n"
        "from fastcoop.cli import main\n"
        "from fastcoop.results import listing\n"
        "def press_ctrl_c():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "class Mortal:\n"
        "    def __del__(self):\n"
        "        press_ctrl_c()\n"
        "def drawing_in_c():\n"
        "    try:\n"
        "        press_ctrl_c()\n"
        "        time.sleep(1)\n"
        "    except KeyboardInterrupt:\n"
        "        raise ValueError('invalid matrix') from None\n"
        "def list_runs(*_):\n"
        f"    {place}\n"
        "    time.sleep(10)\n"
        "listing.list_runs = list_runs\n"
        "sys.argv = ['fastcoop', 'results', 'list', '.']\n"
        "main()\n"
    )
    assert run_interruptible(sys.executable, "-c", script) == (130, "", STOPPED)


def test_ctrl_c_while_the_process_ends_prints_no_traceback():
    """Libraries clean up in callbacks at exit; Ctrl-C there ends the process at once."""
    script = (
        "import atexit, os, signal, sys, time\n"
        "from fastcoop.cli import main\n"
        "atexit.register(time.sleep, 10)\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "sys.argv = ['fastcoop', '--version']\n"
        "main()\n"
    )
    code, _, err = run_interruptible(sys.executable, "-c", script)
    assert (code, err) == (-signal.SIGINT, "")  # a shell shows 130


def test_a_reader_that_goes_away_is_no_fault(world):
    for command in ("results show results/grid KEY", "--help"):
        words = command.replace("KEY", (world / "key").read_text()).split()
        with subprocess.Popen(
            [*FASTCOOP, *words], cwd=world, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            process.stdout.close()
            err = process.stderr.read().decode()
        assert process.returncode == 0
        assert err == "", err


def test_an_output_that_takes_nothing_is_one_sentence(world):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*FASTCOOP, "results", "list", "results/grid"], cwd=world, stdout=full,
                              stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(world, closed):
    command = f"{' '.join(FASTCOOP)} sweep grid.yaml --results closed --cache closed-cache {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=world, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    shutil.rmtree(world / "closed")
    shutil.rmtree(world / "closed-cache")


def on_a_terminal(*arguments: str, cwd: Path) -> tuple[int, bytes]:
    """Exit code, and what a command writes to a terminal."""
    main_end, side = pty.openpty()
    process = subprocess.Popen(
        [*FASTCOOP, *arguments], stdin=side, stdout=side, stderr=side, cwd=cwd, start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(side)
    out = b""
    while process.poll() is None or select.select([main_end], [], [], 0.2)[0]:
        if select.select([main_end], [], [], 0.2)[0]:
            try:
                out += os.read(main_end, 65536)
            except OSError:
                break
    os.close(main_end)
    return process.wait(), out


def test_markup_in_names_is_text_on_a_terminal(tmp_path):
    write_dataset(tmp_path / "data" / "[red]c", train=2, val=1, test=1)
    write_quiet_backbone(tmp_path / "tiny")
    (tmp_path / "g.yaml").write_text(
        'backbones: tiny\ndatasets: "[red]c"\nshots: 1\nseeds: 1\nviews: 0\n'
        'methods: [{zero_shot: {prompt: "a {} [/b]"}}, {coop: {context_length: 2, epochs: 300}}]\n'
    )
    code, out = on_a_terminal("sweep", "g.yaml", "--jobs", "1", cwd=tmp_path)
    assert code == 0, out
    assert b"[/b]" in out
    assert b"Traceback" not in out
    code, out = on_a_terminal(
        "-q", "sweep", "g.yaml", "--jobs", "1", "--results", "r", "--cache", "c", cwd=tmp_path
    )
    assert code == 0
    assert b"accuracy" not in out
    assert b"Encoding" not in out
