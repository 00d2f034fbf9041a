"""What a sweep says while it runs."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fastcoop.grids import read_grid
from fastcoop.grids.planning import load_grid, plan_runs
from fastcoop.methods import Outcome, RunSpec, Scores
from fastcoop.results.records import Batch
from fastcoop.sweeps import Summary
from fastcoop.sweeps import live as live_module
from fastcoop.sweeps.live import Live, Pace
from fastcoop.sweeps.loop import memory_bytes

Sweep = Callable[..., Summary]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(live_module.time, "monotonic", lambda: now[0])
    return now


def test_time_left_goes_by_the_pace_of_each_kind_of_work(clock: list[float]) -> None:
    probe, long, short = (
        Batch("linear_probe", "b", ("1",), 1, None, 1.0), Batch("coop", "b", ("2", "3"), 1, 9, 20.0),
        Batch("coop", "b", ("4",), 1, 9, 10.0),
    )  # fmt: skip
    pace = Pace([probe, long, short], workers=2)
    assert pace.seconds_left() == pytest.approx(31 / 2), "as planned, as long as nothing is known"
    pace.progress(probe)
    pace.finish(probe, seconds=3.0)
    assert pace.seconds_left() == pytest.approx(30 * 3 / 2), "as what is known"
    pace.progress(long)
    clock[0] = 10.0
    pace.progress(long, runs=1.0)  # half of it in 10 s
    assert pace.seconds_left() == pytest.approx((10 + 10) * 1.0 / 2)
    pace.finish(long, seconds=40.0)
    assert pace.seconds_left() == pytest.approx(10 * 2.0 / 2)
    pace.progress(short)
    pace.finish(short, seconds=5.0)
    assert pace.seconds_left() == 0


def test_work_far_slower_than_thought_says_nothing_of_other_kinds(clock: list[float]) -> None:
    quick = [Batch("linear_probe", "b", ("1",), 1, None, 2.0), Batch("text_bias", "b", ("2",), 1, None, 2.0)]
    slow, others = Batch("finetune_image_encoder", "b", ("3",), 1, None, 2.0), [
        Batch("coop", "b", ("4",), 1, 9, 100.0), Batch("finetune_image_encoder", "c", ("5",), 1, None, 2.0),
    ]  # fmt: skip
    pace = Pace([*quick, slow, *others], workers=1)
    for batch, seconds in (*((batch, 2.0) for batch in quick), (slow, 100.0)):
        pace.progress(batch)
        pace.finish(batch, seconds)
    assert pace.seconds_left() == pytest.approx(100 * 1.0 + 2 * 50.0), (
        "its own method, on another backbone, is as slow"
    )


@pytest.fixture
def one_run(world: Path, grid: dict[str, Any]) -> RunSpec:
    loaded = load_grid(read_grid(grid, only=["coop"]), world / "data", "cpu")
    for dataset in loaded.datasets.values():
        loaded.add_features(loaded.backbones[0], dataset, None)
    return plan_runs(loaded)[0]


def outcome(status: str = "done") -> Outcome:
    none = np.zeros(0)
    return Outcome({"colours": Scores(62.5, 60.0, none, none, none)}, status=status, seconds=1.25)


def test_plain_lines_are_a_few_seconds_apart_and_say_something_new(
    clock: list[float], one_run: RunSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = Batch("coop", "b", (one_run.key,), 1, 9, 60.0)
    with Live(4, Pace([batch], 1)) as live:
        for _ in range(120):
            clock[0] += 0.1
            live.tick()
        live.result(one_run, outcome("diverged"))
        for _ in range(60):
            clock[0] += 0.1
            live.tick()
    first, second = capsys.readouterr().err.splitlines()
    assert first == "0 of 4 runs, 60 s left"
    assert second.startswith(
        "1 of 4 runs, 1 diverged, 4 a minute, 60 s left; CoOp (M=2, end) on colours, 1 shot"
    )
    assert second.endswith("62.5% diverged")


def test_a_terminal_has_a_table(one_run: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    live = Live(40, Pace([], 1))
    for _ in range(live_module.SHOWN + 3):
        live.result(one_run, outcome())
    console = Console(width=80, record=True)
    console.print(live._table())
    lines = console.export_text().splitlines()
    assert lines[0].startswith("15 of 40 runs")
    assert lines[1].split() == ["dataset", "method", "shots", "seed", "accuracy", "seconds"]
    assert len(lines) == 2 + live_module.SHOWN
    assert lines[-1].split() == ["colours", "CoOp", "(M=2,", "end)", "1", "1", "62.5%", "1.2"]


def test_the_table_is_drawn_while_results_come(one_run: RunSpec) -> None:
    """rich draws from a thread of its own."""
    pace, errors, drawn = Pace([], 1), [], 0
    live = Live(10**6, pace)
    stop = threading.Event()

    def draw() -> None:
        nonlocal drawn
        while not stop.is_set():
            drawn += 1
            try:
                live._table()
            except Exception as error:
                errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for number in count():
            batch = Batch(f"method {number % 20}", "b", (one_run.key,), 1, 9, 1.0)
            pace.add(batch)
            pace.progress(batch, 0.5)
            live.result(one_run, outcome())
            pace.finish(batch, 0.1)
            if drawn > 100 or errors:
                break
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)
    assert not errors


def test_markup_and_codes_of_a_name_are_text(one_run: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "_label", lambda run: "[red]a[/b] \x1b[31m")
    live = Live(1, Pace([], 1))
    live.result(one_run, outcome())
    console = Console(width=80, record=True)
    console.print(live._table())
    assert "[red]a[/b] \\x1b[31m" in console.export_text()


def test_quiet_draws_and_prints_nothing(
    clock: list[float],
    one_run: RunSpec,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    logging.disable(logging.WARNING)
    try:
        with Live(2, Pace([], 1)) as live:
            live.result(one_run, outcome())
            live.say("A batch failed.")
            clock[0] += 60
            live.tick()
    finally:
        logging.disable(logging.NOTSET)
    assert capsys.readouterr().err == ""


def test_a_run_without_an_accuracy_shows_why(one_run: RunSpec) -> None:
    none = np.zeros(0)
    lost = Outcome({"colours": Scores(math.nan, math.nan, none, none, none)}, status="diverged", seconds=1.0)
    assert live_module._numbers(one_run, lost)[-1] == "diverged"


def test_a_long_method_leaves_the_numbers_whole_on_a_narrow_terminal(
    one_run: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        live_module, "_label", lambda run: "CoOp of a kind whose name is very long indeed" * 2
    )
    live = Live(1, Pace([], 1))
    live.result(one_run, outcome("diverged"))
    console = Console(width=80, record=True)
    console.print(live._table())
    heads, numbers, *_ = (line.split() for line in console.export_text().splitlines()[1:])
    assert heads == ["dataset", "method", "shots", "seed", "accuracy", "seconds"]
    assert numbers[-5:] == ["1", "1", "62.5%", "diverged", "1.2"]


def test_the_summary_tells_of_the_engines_share(run: Sweep, grid: dict[str, Any], tmp_path: Path) -> None:
    summary = run(grid, results=tmp_path, only=["coop"], overrides=["methods.coop.epochs=30"])
    assert 0 < summary.engine_share < 1
    assert summary.as_json()["engine_share"] == summary.engine_share
    assert run(grid, results=tmp_path, only=["zero_shot"]).engine_share == 0


def test_memory_is_that_of_all_processes() -> None:
    size = 200_000_000
    hold = f"held = bytearray({size}); print(1, flush=True); input()"
    alone = memory_bytes()
    assert alone > 0
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        together = memory_bytes()
        child.communicate(b"\n")
    assert together >= alone + 0.9 * size
