"""A sweep that is killed at random points and started again, until it is done: nothing lost, nothing twice, same bits.

    python -m tests.sweeps.kill_trial --points 50 [--jobs 2]

Everything is imported once; each child is a fork that sweeps over a small world, and gets SIGKILL at a random instant.
With ``--jobs`` above 1 it has worker processes of its own, and only it is killed: they must end by themselves.
Prints its counts, and raises AssertionError where something is lost, done twice, or other than undisturbed.

    python -m tests.sweeps.kill_trial --together 20

starts, 20 times, three processes at random moments, which cache, sweep, evaluate, import, merge and report over the
same cache and results, and often kills one of them. Each ends well or with one sentence, and all numbers are the
undisturbed ones in the end.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import random
import signal
import sqlite3
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from fastcoop.backbones import backbone_from_spec
from fastcoop.datasets import load_dataset
from fastcoop.engine import training
from fastcoop.errors import UserError
from fastcoop.exchange import import_coop
from fastcoop.exchange.coop_files import frozen_embeddings, write_coop_file
from fastcoop.features import cache_all
from fastcoop.reports import report
from fastcoop.results import load_contexts, load_results, merge_results
from fastcoop.sweeps import checkpoints, evaluate, sweep
from tests.small_world import write_backbone, write_dataset

REFUSED = 3  # exit code of a child that ended with a sentence
EVERY = 0.1  # seconds between checkpoints here
COOP = {"context_length": 2, "class_position": ["end", "mid"], "class_specific": [False, True], "epochs": 120}


class Steps:
    """Counts steps of runs, here and in forks: all of them, and those since what a checkpoint holds; and the seconds
    that the latter took, beside those of the last step alone."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 32)

    def read(self) -> tuple[int, int]:
        return struct.unpack("qq", self._shared[:16])  # type: ignore[return-value]

    def write(self, all_: int, unsaved: int) -> None:
        self._shared[:16] = struct.pack("qq", all_, unsaved)

    def read_seconds(self) -> tuple[float, float]:
        return struct.unpack("dd", self._shared[16:])  # type: ignore[return-value]

    def write_seconds(self, unsaved: float, last: float) -> None:
        self._shared[16:] = struct.pack("dd", unsaved, last)

    def count(self) -> None:
        """Count from now on, in this process."""
        step, write_state, begin = (
            training.Batch.step,
            checkpoints.write_state,
            checkpoints.CheckpointFile.load,
        )

        def counted(batch: training.Batch) -> None:
            start = time.monotonic()
            step(batch)
            last = time.monotonic() - start
            self.write_seconds(self.read_seconds()[0] + last, last)
            all_, unsaved = self.read()
            self.write(all_ + len(batch.active), unsaved + len(batch.active))

        def saved(*args: Any) -> None:
            write_state(*args)
            self.forget_unsaved()

        def begun(checkpoint: checkpoints.CheckpointFile) -> Any:
            self.forget_unsaved()
            return begin(checkpoint)

        training.Batch.step = counted  # type: ignore[method-assign]
        checkpoints.write_state = saved
        checkpoints.CheckpointFile.load = begun  # type: ignore[method-assign]

    def forget_unsaved(self) -> None:
        self.write(self.read()[0], 0)
        self.write_seconds(0.0, 0.0)


def main(points: int, jobs: int, folder: Path) -> None:
    # A fork does not bring along the threads that OpenMP would wait for, and `sweep` asks for a thread per core.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    checkpoints.EVERY = EVERY
    steps = Steps()
    steps.count()
    write_dataset(folder / "data" / "colours")
    grid = {
        "backbones": str(write_backbone(folder / "tiny")), "datasets": "colours", "shots": [1, 2],
        "seeds": [1, 2, 3], "views": 1, "methods": {"coop": COOP, "zero_shot": None},
    }  # fmt: skip

    def work(results: Path, jobs: int = jobs) -> None:
        sweep(grid, data_root=folder / "data", cache=folder / "cache", results=results, jobs=jobs)

    work(folder / "warm", jobs=1)  # caches the features, and warms all up
    in_fork(lambda: work(folder / "whole"))
    steps.write(0, 0)
    begin = time.monotonic()
    in_fork(lambda: work(folder / "again"))
    duration, needed = time.monotonic() - begin, steps.read()[0]
    assert_same(folder / "whole", folder / "again")

    steps.write(0, 0)
    rng, killed, done, redone, longest = random.Random(0), 0, 0, 0, 0.0
    while killed < points:
        by_steps = jobs == 1 and rng.random() < 0.8  # workers do not count
        after = rng.uniform(0, needed) if by_steps else math.inf, rng.uniform(0, duration)
        ended, lost = kill_one(lambda: work(folder / f"cut{done}"), *after, steps)  # noqa: B023
        if ended:
            done += 1
        else:
            killed += 1
            redone += lost
            unsaved, last = steps.read_seconds()
            assert unsaved <= EVERY + last, (unsaved, last)  # a checkpoint is due when the step is done
            longest = max(longest, unsaved)
    for number in range(done + 1):
        in_fork(lambda: work(folder / f"cut{number}"))  # noqa: B023
        assert_same(folder / "whole", folder / f"cut{number}")
        left = sorted(path.name for path in (folder / f"cut{number}").glob("checkpoints/*"))
        assert not left, f"checkpoints are left: {left}"
    counts = {
        "killed": killed,
        "sweeps_ended": done + 1,
        "runs_each": len(keys(folder / "whole")),
    }
    if jobs == 1:
        executed = steps.read()[0]
        assert executed - (done + 1) * needed <= redone, (executed, done, needed, redone)
        counts |= {"steps_each": needed, "steps_redone": executed - (done + 1) * needed}
        counts |= {"steps_unsaved_when_killed": redone, "most_seconds_unsaved": round(longest, 3)}
    print(json.dumps(counts | {"seconds_undisturbed": round(duration, 2), "checkpoint_every_s": EVERY}))


def together(rounds: int, folder: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    checkpoints.EVERY = EVERY
    write_dataset(folder / "data" / "colours")
    write_dataset(folder / "data" / "shifted", ("grey", "green"), train=0, val=0, seed=1)
    backbone = backbone_from_spec(str(write_backbone(folder / "tiny")))
    dataset = load_dataset("colours", folder / "data")
    ctx = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    prefix, suffix = frozen_embeddings(backbone, dataset.class_names, 2)
    official = folder / "output" / "colours" / "CoOp" / "rn50_4shots" / "nctx2_cscFalse_ctpend" / "seed1"
    write_coop_file(official / "prompt_learner" / "model.pth.tar-9", ctx, prefix, suffix, 9)

    def actions(place: Path) -> dict[str, Callable[[], object]]:
        where = {"data_root": folder / "data", "cache": place / "cache"}
        grid = {
            "backbones": str(folder / "tiny"), "datasets": "colours", "shots": 4, "views": 1,
            "methods": {"coop": COOP | {"epochs": 20}, "zero_shot": None},
        }  # fmt: skip
        main, more, merged = place / "main", place / "more", place / "merged"
        return {
            "sweep": lambda: sweep(grid | {"seeds": [1, 2]}, results=main, jobs=1, **where),
            "sweep more": lambda: sweep(grid | {"seeds": [3]}, results=more, jobs=1, **where),
            "cache": lambda: list(
                cache_all([backbone], [(dataset, [4], [1])], place / "cache", views=2, recipe="current")
            ),
            "import": lambda: import_coop(folder / "output", backbone, dataset, main),
            "evaluate": lambda: evaluate(main, ["shifted"], backbones=[str(folder / "tiny")], **where),
            "merge": lambda: merge_results([main, more], merged),
            "report": lambda: report(main, place / "report"),
        }

    whole = actions(folder / "whole")
    del whole["report"]
    for action in whole.values():
        action()
    rng, told, killed, duration = random.Random(0), 0, 0, 1.5
    for number in range(rounds):
        place = folder / f"round{number}"
        place.mkdir()
        doing = actions(place)
        children = []
        for name in rng.sample(sorted(doing), 3):
            children.append(fork(partial(after, rng.uniform(0, duration), doing[name])))
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, duration))
            os.kill(children[0], signal.SIGKILL)
        for child in children:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code in (0, REFUSED, -signal.SIGKILL), f"round {number} ended with {code}"
            told += code == REFUSED
            killed += code == -signal.SIGKILL
        for name in whole:
            doing[name]()
        for name in ("main", "more", "merged"):
            assert_same(folder / "whole" / name, place / name)
        left = [
            path for path in place.rglob("*") if path.name.endswith(".part") and "merged" not in str(path)
        ]
        assert not left, f"half-written files are left: {left}"
    print(json.dumps({"rounds": rounds, "refused": told, "killed": killed}))


def after(seconds: float, action: Callable[[], object]) -> None:
    """Act after a while; a sentence to the user ends the process with ``REFUSED``."""
    time.sleep(seconds)
    try:
        action()
    except UserError as error:
        os._exit(REFUSED if str(error).endswith((".", ")")) else 1)


def fork(work: Callable[[], None]) -> int:
    """The process of a fork that works and ends: this one never has workers of its own, whose remains forks would
    inherit."""
    child = os.fork()
    if child:
        return child
    said, sys.stderr = sys.stderr, open(os.devnull, "w")  # noqa: SIM115
    try:
        work()
    except BaseException:
        traceback.print_exc(file=said)
        os._exit(1)
    os._exit(0)


def in_fork(work: Callable[[], None]) -> None:
    assert os.waitpid(fork(work), 0)[1] == 0, "the sweep ended with an error"


def kill_one(work: Callable[[], None], count: float, seconds: float, steps: Steps) -> tuple[bool, int]:
    """Kill a fork after so many steps, or after so many seconds where the steps are endless. Returns whether its work
    had ended before, and the steps it lost if not."""
    before = steps.read()[0]
    steps.forget_unsaved()
    child = fork(work)
    end = time.monotonic() + (seconds if count == math.inf else math.inf)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if steps.read()[0] - before >= count or time.monotonic() >= end:
            break
        time.sleep(0.001)
    below = psutil.Process(child).children(recursive=True)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    ended = not os.WIFSIGNALED(status)
    assert not ended or status == 0, "the sweep ended with an error"
    lost = steps.read()[1]
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive, f"workers outlive the sweep: {alive}"
    return ended, lost


def keys(folder: Path) -> list[str]:
    with closing(sqlite3.connect(folder / "results.sqlite")) as db, db:
        return [key for (key,) in db.execute("SELECT key FROM scores JOIN runs USING (key) ORDER BY key")]


def assert_same(whole: Path, other: Path) -> None:
    """Every run once, with the same contexts, losses and predictions to the bit."""
    assert keys(other) == keys(whole), (
        len(keys(other)),
        len(keys(whole)),
        set(keys(other)) ^ set(keys(whole)),
    )
    columns = ["key", "dataset", "accuracy", "losses", "per_class", "status", "features", "prompts"]
    one, two = (
        load_results(folder)[columns].sort_values(["key", "dataset"], ignore_index=True)
        for folder in (whole, other)
    )
    assert not two.duplicated(["key", "dataset"]).any()
    assert one.equals(two), one.compare(two)
    for key in load_results(whole).query("method == 'coop'").key.unique():
        assert np.array_equal(load_contexts(whole, key), load_contexts(other, key)), key


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--together", type=int, help="rounds of several processes, in place of kills")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if given.together:
            together(given.together, Path(temporary))
        else:
            main(given.points, given.jobs, Path(temporary))
