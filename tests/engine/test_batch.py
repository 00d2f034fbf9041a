"""What a step does on the device: no waiting, no loop over runs, recorded where it can be, and whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastcoop.engine import Run, train
from fastcoop.engine.forest import Trees
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.training import WARM_UP, ActiveRun, Batch, RecordedStep
from fastcoop.prompts import PromptLayout
from tests.engine.conftest import NAMES
from tests.engine.test_training import distance, various_runs


class HostWatch(TorchDispatchMode):
    """Notes operations that carry a number from the device to the host, or one the other way."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "lift_fresh", "lift_fresh_copy", "unique"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_nothing_in_a_step_waits_for_the_host(backbone32, make_run):
    trees = Trees(backbone32)
    runs = [*various_runs(make_run, 6), make_run(names=(*NAMES, "cat"), seed=7)]
    active = [ActiveRun.start(n, run, torch.float32, trees.tower.device) for n, run in enumerate(runs)]
    batch = Batch(trees, active, backbone32.logit_scale)
    with HostWatch() as watch:
        batch.step()
        batch.step()
    assert not watch.seen
    with HostWatch() as watch:
        batch.sync()
        torch.ones(1).item()
    assert watch.seen  # the watch can see
    assert [a.step for a in batch.active] == [2] * len(runs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_runs_over_the_same_images_share_one_copy_on_the_device_in_their_own_dtype(
    backbone32, make_run, dtype
):
    run = make_run(epochs=4)
    features, labels = (
        run.features.to(dtype).numpy(),
        run.labels.numpy(),
    )  # as methods read them, one array per subset
    runs = [
        Run(
            NAMES,
            PromptLayout(4, position),
            run.contexts,
            torch.from_numpy(features),
            torch.from_numpy(labels),
            4,
            5,
        )
        for position in ("end", "mid")
    ]
    runs.append(make_run(seed=1, epochs=4))
    active = [ActiveRun.start(n, r, torch.float32, torch.device("cpu")) for n, r in enumerate(runs)]
    shared = Batch(Trees(backbone32), active[:2], backbone32.logit_scale).images.images
    assert (shared.dtype, len(shared)) == (dtype, features.shape[0] * features.shape[1])
    assert len(Batch(Trees(backbone32), active, backbone32.logit_scale).images.images) == 2 * len(shared)
    together = train(backbone32, runs)
    for number, run in enumerate(runs):
        assert distance(together[number].contexts, train(backbone32, [run])[0].contexts) < 1e-6


def test_runs_over_other_images_or_labels_of_the_same_memory_share_none(backbone, make_run):
    run = make_run(images=8, epochs=4)
    rows, labels = (run.features[:4], run.features[::2]), (run.labels[:4], (run.labels[:4] + 1) % 4)
    runs = [replace(run, features=one, labels=of) for one in rows for of in labels]
    for one, found in zip(runs, train(backbone, runs), strict=True):
        assert distance(found.contexts, train(backbone, [one])[0].contexts) < 1e-9


def test_a_step_is_recorded_once_and_replayed(monkeypatch):
    """The book-keeping of a GPU's recordings, with a recorder that stands in for the GPU's."""
    calls, replays, recording = [], [], []

    class Recorder:
        def replay(self):
            replays.append(1)

        def pool(self):
            return "pool of the first"

    @contextlib.contextmanager
    def record(graph, pool, stream):
        assert on_device == [stream]  # the step's GPU, whichever is the current one
        recording.append(stream)
        yield

    on_device = []

    @contextlib.contextmanager
    def device(which):
        on_device.append(which)
        yield
        on_device.remove(which)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the step's own on {device}")
    current = []
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    replayed = RecordedStep(40, torch.device("cuda", 1))
    for _ in range(10):
        replayed(lambda: calls.append(1))
    assert (len(calls), len(replays)) == (WARM_UP + 1, 10 - WARM_UP)
    assert recording == [torch.device("cuda", 1)]

    def refuse():
        if recording:
            raise RuntimeError("operation not permitted when stream is capturing")
        calls.append(1)

    @contextlib.contextmanager
    def refused(graph, pool, stream):
        recording.append(1)
        try:
            yield
        finally:
            recording.clear()

    calls.clear()
    recording.clear()
    monkeypatch.setattr(torch.cuda, "graph", refused)
    replayed = RecordedStep(40, torch.device("cuda"))
    for _ in range(10):
        replayed(refuse)
    assert len(calls) == 10
    assert current == ["the step's own on cuda"]  # a failed recording leaves its own stream current


def test_a_replay_that_does_nothing_is_noticed(backbone32, make_run, monkeypatch):
    monkeypatch.setattr(RecordedStep, "__call__", lambda self, *_: None)
    with pytest.raises(RuntimeError, match="device did 0 of 1 steps"):
        train(backbone32, [make_run(epochs=1)])


def test_a_batch_nobody_needs_is_freed_at_once(backbone32, make_run):
    trees = Trees(backbone32)
    batch = Batch(trees, [ActiveRun.start(0, make_run(), torch.float32, trees.tower.device)], 100.0)
    batch.step()
    gone = weakref.ref(batch)
    gc.disable()  # no cycle may hold it, and with it a forest's memory
    try:
        del batch
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("images", [20, 640])
def test_the_device_is_waited_for_no_more_than_once_an_epoch(backbone32, make_run, monkeypatch, images):
    looks = []

    def look(self, method):
        looks.append(self.done)
        return method(self)

    for method in (Batch.sync, Batch.has_diverged):
        monkeypatch.setattr(Batch, method.__name__, functools.partialmethod(look, method))
    run = make_run(images=images, epochs=3)
    train(backbone32, [run])
    assert looks == ([3] if images == 20 else [20, 40, 60])


def test_running_out_of_memory_halves_the_batch_and_goes_on(backbone, make_run, monkeypatch):
    runs = [make_run(epochs=3, seed=seed) for seed in range(6)]
    expected = train(backbone, runs)
    forward, refused = ForestPass.forward, []

    def small_machine(self, vectors, workspace):
        runs = sum(group.runs for group in self.forest.groups)
        if runs > 2:
            refused.append(runs)
            raise torch.OutOfMemoryError("no room")
        return forward(self, vectors, workspace)

    monkeypatch.setattr(ForestPass, "forward", small_machine)
    for ours, theirs in zip(train(backbone, runs), expected, strict=True):
        assert distance(ours.contexts, theirs.contexts) < 1e-12
    assert refused[0] == 6
    assert refused == sorted(refused, reverse=True)


@pytest.mark.parametrize("room", [1, 0])
def test_starting_runs_may_run_out_of_memory(backbone, make_run, monkeypatch, caplog, room):
    runs = [make_run(epochs=1, seed=seed) for seed in range(5)]
    start, tried = ActiveRun.start, []

    def small_machine(index, *given):
        tried.append(index)
        if len(tried) in (2, 4) or not room:
            raise torch.OutOfMemoryError("no room")
        return start(index, *given)

    monkeypatch.setattr(ActiveRun, "start", small_machine)
    if room:
        assert [trained.status for trained in train(backbone, runs)] == ["done"] * 5
    else:  # one run alone is not tried again
        with pytest.raises(torch.OutOfMemoryError):
            train(backbone, runs)
    assert [record.args for record in caplog.records] == [(5,), (2,)]


class OutOfMemoryAt(TorchDispatchMode):
    """Fails at the ``number``-th operation that makes a new tensor: memory runs out in the middle of a step."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.is_mutable or "view" in function.overloadpacket.__name__:
            return function(*args, **(kwargs or {}))
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("no room")
        return function(*args, **(kwargs or {}))


def test_a_step_that_runs_out_of_memory_anywhere_is_done_again_from_its_start(backbone, make_run):
    runs = [make_run(epochs=3, seed=seed) for seed in range(2)]
    trees = Trees(backbone)

    def batch_of():
        active = [ActiveRun.start(n, run, torch.float64, trees.tower.device) for n, run in enumerate(runs)]
        batch = Batch(trees, active, backbone.logit_scale)
        batch.step()
        return batch

    whole = batch_of()
    whole.step()
    counting = batch_of()
    with OutOfMemoryAt(-1) as counted:
        counting.step()
    operations = -1 - counted.left
    assert operations > 100
    for number in (*range(1, operations, 41), *range(operations - 20, operations)):
        batch = batch_of()
        with pytest.raises(torch.OutOfMemoryError), OutOfMemoryAt(number):
            batch.step()
        batch.step()
        assert torch.equal(batch.vectors, whole.vectors)
        assert torch.equal(batch.active[0].tensors["momentum"], whole.active[0].tensors["momentum"])


def test_other_errors_are_not_taken_for_memory(backbone, make_run, monkeypatch):
    def broken(self, contexts, workspace):
        raise RuntimeError("something else")

    monkeypatch.setattr(ForestPass, "forward", broken)
    with pytest.raises(RuntimeError, match="something else"):
        train(backbone, [make_run()])


class Operations(TorchDispatchMode):
    """Counts the operations that run."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += function is not torch.ops.aten.slice.Tensor  # left out by torch where it takes all
        return function(*args, **(kwargs or {}))


def test_a_step_of_many_runs_makes_as_many_calls_as_one_of_few(backbone32, make_run):
    trees = Trees(backbone32)
    calls = []
    for runs in (2, 24):
        active = [
            ActiveRun.start(n, make_run(seed=n, learning_rate=0.001 * n), torch.float32, trees.tower.device)
            for n in range(runs)
        ]
        batch = Batch(trees, active, 100.0)
        batch.step()  # makes the buffers
        with Operations() as operations:
            batch.step()
        calls.append(operations.seen)
    assert calls[0] == calls[1] > 100


def test_runs_of_one_tree_are_together_in_the_forest_whatever_their_images(backbone32, make_run):
    layouts = PromptLayout(4), PromptLayout(4, "mid")
    runs = [make_run(layout, batch_size=n, seed=n) for n in (3, 5, 8) for layout in layouts]
    active = [ActiveRun.start(n, run, torch.float32, torch.device("cpu")) for n, run in enumerate(runs)]
    batch = Batch(Trees(backbone32), active, backbone32.logit_scale)
    assert [group.runs for group in batch.forest_pass.forest.groups] == [3, 3]
    assert len(batch.groups) == 6
    for ours, run in zip(train(backbone32, runs), runs, strict=True):
        assert distance(ours.contexts, train(backbone32, [run])[0].contexts) < 1e-5
