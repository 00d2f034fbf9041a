"""What a command line owes whoever sits at it: exit codes, quiet, colours, narrow terminals, no calls home."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fastcoop
from fastcoop.cli import main
from fastcoop.cli.app import app
from fastcoop.cli.options import numbers
from fastcoop.errors import UserError
from fastcoop.progress import counted, progress
from tests.small_world import write_backbone, write_dataset

REPOSITORY = Path(__file__).parents[1]


def code_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


@pytest.fixture(autouse=True)
def _level_as_it_was():
    logger = logging.getLogger("fastcoop")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("raised", "code"), [(None, 0), (UserError("Give 2, not 3."), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(monkeypatch, capsys, raised, code):
    def run_demo(*_: object) -> str:
        if raised is not None:
            raise raised
        return "done"

    monkeypatch.setattr("fastcoop.demo.run.run_demo", run_demo)
    assert code_of("demo") == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if code == 2:
        assert said.err == "fastcoop: Give 2, not 3.\n"
    if code == 0:
        assert said.out == "done\n"


def test_a_file_that_the_system_does_not_let_us_use_is_one_sentence(capsys, monkeypatch):
    def run_demo(*_: object) -> str:
        raise OSError(errno.ENAMETOOLONG, "File name too long", "a" * 500)

    monkeypatch.setattr("fastcoop.demo.run.run_demo", run_demo)
    assert code_of("demo") == 2
    said = capsys.readouterr().err
    assert said.startswith("fastcoop: ")
    assert said.endswith("' cannot be used: File name too long.\n")


@pytest.mark.parametrize("shots", ["²", "1,,2", "-1", "1.5", "some"])
def test_numbers_that_are_none_are_one_sentence(shots):
    with pytest.raises(UserError, match="Expected --shots to be whole numbers"):
        numbers(shots, "--shots")
    assert numbers("1, 2,all", "--shots", ["all"]) == [1, 2, "all"]


def test_a_fault_of_ours_is_not_dressed_up(monkeypatch):
    """It reaches the interpreter, which prints a traceback and exits with 1."""
    monkeypatch.setattr("fastcoop.demo.run.run_demo", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["demo"])


def test_what_typer_refuses_is_exit_code_2(capsys):
    assert code_of("swep") == 2
    assert "sweep" in capsys.readouterr().err
    assert code_of("sweep", "grid.yaml", "--dry-rum") == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_one_sentence(capsys):
    assert code_of("cache-features", "photos", "--device", "tpu") == 2
    said = capsys.readouterr().err
    assert said.startswith('fastcoop: The device "tpu" cannot be used on this machine; use cpu')


def test_the_version(capsys):
    assert code_of("--version") == 0
    assert capsys.readouterr().out.strip() == fastcoop.__version__


def test_quiet_is_quiet_and_errors_still_come(capsys, monkeypatch):
    monkeypatch.setattr("fastcoop.progress.PLAIN_LINE_EVERY", 0.0)

    def work(*_: object) -> str:
        logging.getLogger("fastcoop").warning("careful")
        with progress("Working", 2) as advance:
            advance()
            advance(note="nearly")
        return "done"

    monkeypatch.setattr("fastcoop.demo.run.run_demo", work)
    code_of("demo")
    assert "Working: 50%" in capsys.readouterr().err
    code_of("-q", "demo")
    assert capsys.readouterr().err == ""
    code_of("-q", "sweep", "nowhere.yaml")
    assert capsys.readouterr().err.startswith("fastcoop: ")


def test_verbose_says_what_is_loaded_cached_and_run(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data" / "colours", train=2, val=1, test=1)
    write_backbone(tmp_path / "tiny")
    (tmp_path / "small.yaml").write_text(
        "backbones: tiny\ndatasets: colours\nshots: 1\nseeds: 1\nviews: 0\nmethods: zero_shot\n"
    )
    assert code_of("sweep", "small.yaml") == 0
    assert "tiny: weights" not in caplog.text
    assert code_of("-v", "sweep", "small.yaml", "--results", "again", "--cache", "elsewhere") == 0
    said = "\n".join(caplog.messages)
    for expected in (
        r"tiny: weights [0-9a-f]{12}, GELU, images of 16",
        r"colours.h5: 8 crops to encode",
        "1 runs in 1 batches",
    ):
        assert re.search(expected, said), said


def help_of(*command: str, **environment: str) -> str:
    code = "import sys; from fastcoop.cli import main; main(sys.argv[1:])"
    clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"],
        cwd=REPOSITORY, capture_output=True, text=True, encoding="utf-8",
        env=clean | {"PYTHONIOENCODING": "utf-8"} | environment,
    )  # fmt: skip
    assert done.returncode == 0
    return done.stdout


def test_help_fits_a_terminal_of_80_columns_and_torch_is_not_loaded_for_it():
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    checks = (
        "import sys; from fastcoop.cli import main\n"
        f"for name in {names!r}:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", checks], cwd=REPOSITORY, capture_output=True, text=True, encoding="utf-8",
        env=os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 100
    assert max(map(len, lines)) <= 80
    paragraph = re.search(r"The store holds.*?itself\.", done.stdout, re.DOTALL)
    assert paragraph
    assert all(len(line.strip()) > 60 for line in paragraph[0].splitlines()[:-1])  # no line is broken early


def test_help_keeps_brackets_and_flags_have_no_value():
    assert 'pip install "fastcoop[parquet]"' in help_of("results", "export")
    assert "results/<grid name>" in help_of("sweep")
    assert "<bool>" not in help_of("sweep") + help_of("results") + help_of("results", "list") + help_of()
    for group in ((), ("results",), ("features",), ("datasets",)):  # no summary of a command is cut
        assert "..." not in help_of(*group).replace("[ARGS]...", "")


def test_numbers_with_their_noun():
    assert [counted(number, "run") for number in (0, 1, 2000)] == ["0 runs", "1 run", "2,000 runs"]


def test_a_console_that_lacks_a_letter_shows_its_code(tmp_path):
    """As a pipe on Windows does, which is not UTF-8."""
    (tmp_path / "猫").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "fastcoop.cli", "datasets", "--data-root", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\u732b" in done.stdout


def test_completion_is_there():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['fastcoop']; from fastcoop.cli import main; main()"],
        cwd=REPOSITORY, capture_output=True, text=True,
        env=os.environ | {"_FASTCOOP_COMPLETE": "complete_bash", "COMP_WORDS": "fastcoop cache", "COMP_CWORD": "1"},
    )  # fmt: skip
    assert done.stdout.split() == ["cache-features"], done.stderr


def test_nothing_phones_home(tmp_path, monkeypatch):
    """A whole small study with every way to a network cut."""

    def refuse(self: socket.socket, address: object) -> None:
        if self.family != getattr(socket, "AF_UNIX", None):
            pytest.fail(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_: pytest.fail(f"a look-up of {host}"))
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data" / "colours", train=2, val=1, test=1)
    write_backbone(tmp_path / "tiny")
    (tmp_path / "small.yaml").write_text(
        "backbones: tiny\ndatasets: colours\nshots: 1\nseeds: 1\nviews: 1\n"
        "methods: {zero_shot: , coop: {context_length: 2, epochs: 1}}\n"
    )
    assert code_of("cache-features", "small.yaml") == 0
    assert code_of("sweep", "small.yaml") == 0
    assert code_of("results", "list", "results/small") == 0
    assert code_of("interpret", "results/small", "--backbone", "tiny") == 0
    key = fastcoop.find_run("results/small", coop_key()).key
    assert code_of("export", key, "--results", "results/small", "--out", "c", "--backbone", "tiny") == 0
    assert code_of("predict", "c", "data/colours/test", "--backbone", "tiny") == 0
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data" / "colours", train=2, val=1, test=1)
    write_backbone(tmp_path / "tiny")
    (tmp_path / "small.yaml").write_text(
        "backbones: tiny\ndatasets: colours\nshots: 1\nseeds: 1\nviews: 0\n"
        "methods: {coop: {context_length: 2, epochs: 1}}\n"
    )
    assert code_of("sweep", "small.yaml") == 0
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "results/small/nearest_words").write_text("in the way")
    for arguments in (
        ["report", "results/small", "--out", "file"],
        ["interpret", "results/small", "--backbone", "tiny"],
    ):
        capsys.readouterr()
        assert code_of(*arguments) == 2, arguments
        said = capsys.readouterr().err
        assert re.fullmatch(r"fastcoop: \S+ cannot be written \(.+\); free space or .+\.\n", said), said


def test_a_long_list_of_names_is_cut_short():
    assert fastcoop.errors.nearest("z", "abc") == " Valid: a, b, c."
    assert fastcoop.errors.nearest("z", map(str, range(100, 200))).endswith(", 119 and 80 more.")


def coop_key() -> str:
    frame = fastcoop.load_results("results/small")
    (key,) = frame.key[frame.method == "coop"]
    return str(key)


def test_every_public_name_is_there_and_only_they():
    assert all(getattr(fastcoop, name) is not None for name in fastcoop.__all__)
    assert set(fastcoop.__all__) <= set(dir(fastcoop))
    with pytest.raises(AttributeError, match="sweeep"):
        _ = fastcoop.sweeep
