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
from fastcoop.grids.planning import plan_runs
from fastcoop.methods import Outcome, RunSpec, Scores
from fastcoop.results.records import Batch
from fastcoop.sweeps import Summary
from fastcoop.sweeps import live as live_module
from fastcoop.sweeps import pace as pace_module
from fastcoop.sweeps.live import Live
from fastcoop.sweeps.loading import load_grid
from fastcoop.sweeps.loop import memory_bytes
from fastcoop.sweeps.pace import Pace

Sweep = Callable[..., Summary]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: now[0])
    return now


def do(pace: Pace, clock: list[float], batch: Batch, seconds: float) -> None:
    """Run a batch that reports nothing until it ends."""
    pace.start(batch)
    clock[0] += seconds
    pace.finish(batch)


def test_time_left_goes_by_the_pace_of_each_kind_of_work(clock: list[float]) -> None:
    probe, long, short = (
        Batch("linear_probe", "b", ("1",), 1, None, 1.0), Batch("coop", "b", ("2", "3"), 1, 9, 20.0),
        Batch("coop", "b", ("4",), 1, 9, 10.0),
    )  # fmt: skip
    pace = Pace([probe, long, short], workers=2)
    assert pace.seconds_left() is None, "nothing is measured"
    do(pace, clock, probe, 3.0)
    assert pace.seconds_left() is None, "nothing of what is left is measured"
    pace.start(long)
    clock[0] += 10.0
    pace.progress(long, runs=1.0)  # half of it in 10 s
    assert pace.running() == [(long, 0.5)]
    assert pace.seconds_left() == pytest.approx((10 + 10) * 1.0 / 2)
    clock[0] += 30.0
    pace.finish(long)
    assert pace.seconds_left() == pytest.approx(10 * 2.0 / 2)
    pace.start(short)
    assert pace.seconds_left() == pytest.approx(10 * 2.0), "the other worker has nothing to do"
    clock[0] += 5.0
    pace.finish(short)
    assert (pace.seconds_left(), pace.share()) == (0, 1)


def test_a_time_is_stated_when_most_of_what_is_left_has_a_pace(clock: list[float]) -> None:
    known, unknown = (
        Batch("coop", "b", ("1", "2"), 1, 9, 80.0),
        Batch("linear_probe", "b", ("3",), 1, None, 30.0),
    )
    pace = Pace([known, unknown], workers=1)
    pace.start(known)
    clock[0] += 10.0
    pace.progress(known, runs=0.25)
    assert pace.seconds_left() == pytest.approx(70 + 30)
    clock[0] += 50.0
    pace.progress(known, runs=1.25)
    assert pace.seconds_left() is None, "of 20 and 30 s"


def test_the_time_of_the_last_batch_passes(clock: list[float]) -> None:
    done, last = (Batch("linear_probe", "b", (key,), 1, None, 10.0) for key in "12")
    pace = Pace([done, last], workers=8)
    do(pace, clock, done, 10.0)
    pace.start(last)
    start = clock[0]
    assert pace.seconds_left() == pytest.approx(10)
    clock[0] = start + 4.0
    assert pace.seconds_left() == pytest.approx(6)
    clock[0] = start + 400.0
    assert pace.seconds_left() == pytest.approx(1), "never below zero"


def test_the_time_of_loading_is_not_that_of_the_work(clock: list[float]) -> None:
    """Nor is work that was done by a worker that died since."""
    batches = [Batch("coop", "b", (key,), 1, 9, 10.0) for key in "12"]
    pace = Pace(batches, workers=1)
    pace.start(batches[0])
    clock[0] += 50.0
    pace.start(batches[0])
    clock[0] += 5.0
    pace.progress(batches[0], runs=0.5)
    assert pace.seconds_left() == pytest.approx(15)
    pace.start(batches[0])  # elsewhere
    assert pace.running() == [(batches[0], 0.0)]
    assert pace.seconds_left() == pytest.approx(20)


def test_work_far_slower_than_thought_says_nothing_of_other_kinds(clock: list[float]) -> None:
    quick = [Batch("linear_probe", "b", ("1",), 1, None, 2.0), Batch("text_bias", "b", ("2",), 1, None, 2.0)]
    slow, others = Batch("finetune_image_encoder", "b", ("3",), 1, None, 2.0), [
        Batch("linear_probe", "c", ("4",), 1, None, 400.0), Batch("finetune_image_encoder", "c", ("5",), 1, None, 2.0),
        Batch("linear_probe", "b", ("7",), 1, None, 1000.0),
    ]  # fmt: skip
    only_tests = Batch("zero_shot", "b", ("6",), 1, None, 0.1)
    pace = Pace([only_tests, *quick, slow, *others], workers=1)
    do(pace, clock, only_tests, 10.0)  # encoding class names takes long at first
    for batch, seconds in (*((batch, 2.0) for batch in quick), (slow, 100.0)):
        do(pace, clock, batch, seconds)
    assert pace.seconds_left() == pytest.approx(1400 * 1.0 + 2 * 50.0), (
        "its own method, on another backbone, is as slow"
    )


def test_the_share_is_of_work_and_never_falls(clock: list[float]) -> None:
    probe, training = (
        Batch("linear_probe", "b", ("1",), 1, None, 1.0),
        Batch("coop", "b", ("2", "3"), 1, 9, 99.0),
    )
    pace = Pace([probe, training], workers=1)
    assert pace.share() == 0
    do(pace, clock, probe, 1.0)
    assert pace.share() == pytest.approx(0.01), "one of two batches, a hundredth of the work"
    pace.start(training)
    pace.progress(training, before=1.0)  # by an earlier sweep, so its time is not of this one
    assert pace.share() == pytest.approx(0.505)
    clock[0] += 10.0
    pace.progress(training, runs=0.25)
    assert pace.seconds_left() == pytest.approx(30)
    before = pace.share()
    clock[0] += 20.0
    pace.finish(training, failed=2)
    pace.add(training)
    assert 0.5 < before == pace.share() < 1, "failed runs are to do again"


@pytest.fixture
def one_run(world: Path, grid: dict[str, Any]) -> RunSpec:
    loaded = load_grid(read_grid(grid, only=["coop"]), world / "data", "cpu")
    return plan_runs(loaded.runs())[0]


def outcome(status: str = "done") -> Outcome:
    none = np.zeros(0)
    return Outcome({"colours": Scores(62.5, 60.0, none, none, none)}, status=status, seconds=1.25)


def test_plain_lines_are_a_few_seconds_apart_and_say_something_new(
    clock: list[float], one_run: RunSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = Batch("coop", "b", (one_run.key,), 1, 9, 60.0)
    pace = Pace([batch], 1)
    with Live(4, pace, {one_run.key: one_run}, done_before=2) as live:
        pace.start(batch)
        for _ in range(120):
            clock[0] += 0.1
            live.tick()
        pace.progress(batch, 0.1)
        live.result(one_run, outcome("diverged"))
        for _ in range(30):
            clock[0] += 0.1
            live.tick()
    what = "of 3 steps: CoOp (M=2, end), 1 shot, seed 1, on colours"
    assert capsys.readouterr().err.splitlines() == [
        f"0% done, 0 of 4 runs (2 before); now 0% {what}",
        f"10% done, 1 of 4 runs (2 before), 1 diverged, about 2 min left; now 10% {what}",
        "  CoOp (M=2, end) on colours, 1 shot, seed 1: 62.5% diverged",
    ]


def test_a_long_log_is_short(
    clock: list[float], one_run: RunSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    with Live(10**6, Pace([Batch("coop", "b", (one_run.key,), 1, 9, 60.0)], 1)) as live:
        for _ in range(10 * 60 * 6):
            clock[0] += 10
            live.result(one_run, outcome())
            live.tick()
    lines = capsys.readouterr().err.splitlines()
    states = [line for line in lines if not line.startswith(" ")]
    assert 100 < len(states) < 300
    assert len(lines) <= len(states) * (live_module.SHOWN_LATER + 2) + 12 * live_module.SHOWN
    assert lines[-1] == "  and 27 earlier results"


def test_a_notebook_has_one_line_that_is_updated(
    clock: list[float], one_run: RunSpec, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    class Display:
        def update(self, content: dict[str, str], raw: bool) -> None:
            shown.append(content["text/plain"])

    def display(content: dict[str, str], raw: bool, display_id: bool) -> Display:
        assert not shown, "one for all"
        shown.append(content["text/plain"])
        return Display()

    monkeypatch.setattr("fastcoop.progress.in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    pace = Pace([batch := Batch("coop", "b", (one_run.key,), 1, 9, 60.0)], 1)
    with Live(40, pace, {one_run.key: one_run}) as live:
        pace.start(batch)
        for _ in range(40):
            clock[0] += 0.1
            live.result(one_run, outcome())
            live.tick()
        live.say("A batch failed.")
        clock[0] += 1
        live.tick()
        pace.finish(batch)
    assert len(shown) > 4
    assert shown[0].startswith("0% done, 5 of 40 runs; now 0% of 3 steps: CoOp")
    assert shown[-1] == "100% done, 40 of 40 runs"
    assert capsys.readouterr().err == "A batch failed.\n"


def test_a_terminal_has_a_table(one_run: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    many = [Batch("coop", "b", (f"{number}a", f"{number}b"), 1, 9, 1.0) for number in range(6)]
    live = Live(40, Pace(many, 1), dict.fromkeys([key for batch in many for key in batch.keys], one_run))
    for batch in many:
        live.pace.start(batch)
        live.pace.progress(batch, 1.0)
    for _ in range(live_module.SHOWN + 3):
        live.result(one_run, outcome())
    console = Console(width=80, record=True)
    console.print(live._table())
    lines = console.export_text().splitlines()
    assert lines[0].startswith("50% done, 15 of 40 runs, ")
    assert lines[1] == "now 50% of 6 steps: CoOp (M=2, end), 1 shot, 2 runs, on colours"
    assert lines[5] == "and 2 more batches"
    assert lines[6].split() == ["dataset", "method", "shots", "seed", "accuracy", "seconds"]
    assert len(lines) == 7 + live_module.SHOWN
    assert lines[-1].split() == ["colours", "CoOp", "(M=2,", "end)", "1", "1", "62.5%", "1.2"]


def test_the_table_is_drawn_while_results_come(one_run: RunSpec) -> None:
    """rich draws from a thread of its own."""
    pace, errors, drawn = Pace([], 1), [], 0
    live = Live(10**6, pace, {one_run.key: one_run})
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
            pace.finish(batch)
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
