"""What a sweep says while it runs."""

from __future__ import annotations

import io
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
    assert pace.seconds_left() is None, "nothing is measured"
    pace.progress(probe)
    pace.finish(probe, seconds=3.0)
    assert pace.seconds_left() == pytest.approx(30 / 2), "as planned, as long as no such work is known"
    pace.progress(long)
    clock[0] = 10.0
    pace.progress(long, runs=1.0)  # half of it in 10 s
    assert pace.running() == [(long, 0.5)]
    assert pace.seconds_left() == pytest.approx((10 + 10) * 1.0 / 2)
    pace.finish(long, seconds=40.0)
    assert pace.seconds_left() == pytest.approx(10 * 2.0 / 2)
    pace.progress(short)
    assert pace.seconds_left() == pytest.approx(10 * 2.0), "the other worker has nothing to do"
    pace.finish(short, seconds=5.0)
    assert (pace.seconds_left(), pace.share()) == (0, 1)


def test_the_time_of_the_last_batch_passes(clock: list[float]) -> None:
    done, last = (Batch("linear_probe", "b", (key,), 1, None, 10.0) for key in "12")
    pace = Pace([done, last], workers=8)
    pace.progress(done)
    pace.progress(last)
    pace.finish(done, seconds=10.0)
    assert pace.seconds_left() == pytest.approx(10)
    clock[0] = 4.0
    assert pace.seconds_left() == pytest.approx(6)
    clock[0] = 400.0
    assert pace.seconds_left() == pytest.approx(1), "never below zero"


def test_work_far_slower_than_thought_says_nothing_of_other_kinds(clock: list[float]) -> None:
    quick = [Batch("linear_probe", "b", ("1",), 1, None, 2.0), Batch("text_bias", "b", ("2",), 1, None, 2.0)]
    slow, others = Batch("finetune_image_encoder", "b", ("3",), 1, None, 2.0), [
        Batch("coop", "b", ("4",), 1, 9, 100.0), Batch("finetune_image_encoder", "c", ("5",), 1, None, 2.0),
    ]  # fmt: skip
    only_tests = Batch("zero_shot", "b", ("6",), 1, None, 0.1)
    pace = Pace([only_tests, *quick, slow, *others], workers=1)
    pace.finish(only_tests, 10.0)  # encoding class names takes long at first
    for batch, seconds in (*((batch, 2.0) for batch in quick), (slow, 100.0)):
        pace.progress(batch)
        pace.finish(batch, seconds)
    assert pace.seconds_left() == pytest.approx(100 * 1.0 + 2 * 50.0), (
        "its own method, on another backbone, is as slow"
    )


def test_the_share_is_of_work_and_never_falls(clock: list[float]) -> None:
    probe, training = (
        Batch("linear_probe", "b", ("1",), 1, None, 1.0),
        Batch("coop", "b", ("2", "3"), 1, 9, 99.0),
    )
    pace = Pace([probe, training], workers=1)
    assert pace.share() == 0
    pace.progress(probe)
    clock[0] = 1.0
    pace.finish(probe, seconds=1.0)
    assert pace.share() == pytest.approx(0.01), "one of two batches, a hundredth of the work"
    pace.progress(training)
    pace.progress(training, before=1.0)  # by an earlier sweep, so its time is not of this one
    assert pace.share() == pytest.approx(0.505)
    assert pace.seconds_left() == pytest.approx(49.5)
    clock[0] = 11.0
    pace.progress(training, runs=0.25)
    assert pace.seconds_left() == pytest.approx(30)
    before = pace.share()
    pace.finish(training, seconds=20.0, failed=2)
    pace.add(training)
    assert 0.5 < before == pace.share() < 1, "failed runs are to do again"


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
    pace = Pace([batch], 1)
    with Live(4, pace, done_before=2) as live:
        pace.progress(batch)
        live.start(batch, [one_run])
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


class NotebookStream(io.StringIO):
    """As ipykernel's, by the name of its module."""

    __module__ = "ipykernel.iostream"


def test_a_notebook_has_one_line_that_is_overwritten(
    clock: list[float], one_run: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = NotebookStream()
    monkeypatch.setattr(sys, "stderr", stream)
    pace = Pace([batch := Batch("coop", "b", (one_run.key,), 1, 9, 60.0)], 1)
    with Live(40, pace) as live:
        pace.progress(batch)
        live.start(batch, [one_run])
        for _ in range(40):
            clock[0] += 0.1
            live.result(one_run, outcome())
            live.tick()
        live.say("A batch failed.")
        clock[0] += 1
        live.tick()
        pace.finish(batch, 60.0)
    shown = [line.split("\r")[-1].rstrip() for line in stream.getvalue().split("\n")]
    assert shown[0].startswith("0% done, 36 of 40 runs; now 0% of 3 steps: CoOp")
    assert shown[1:] == ["A batch failed.", "100% done, 40 of 40 runs", ""]
    assert stream.getvalue().count("\r") > 4


def test_a_terminal_has_a_table(one_run: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    many = [Batch("coop", "b", (str(number),), 1, 9, 1.0) for number in range(6)]
    live = Live(40, Pace(many, 1))
    for batch in many:
        live.start(batch, [one_run, one_run])
        live.pace.progress(batch, 0.5)
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
