"""Where a training stands, as named tensors on the CPU: enough to go on to the same bits.

The order of images is drawn from each run's seed, so the step a run is at stands for its random state too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcoop.engine.run import Run, Trained

if TYPE_CHECKING:
    from fastcoop.engine.batch import Active

State = dict[str, Tensor]


def state_of(active: Iterable[Active], ended: Mapping[int, Trained]) -> State:
    """The state of runs in training and of those that ended; runs not in it have not begun."""
    state: State = {}
    for a in active:
        parts = {"contexts": a.contexts, "momentum": a.momentum, "losses": a.losses}
        state |= {f"{name}.{a.number}": part.detach().cpu().clone() for name, part in parts.items()}
        state[f"step.{a.number}"] = torch.tensor(a.step)
        state |= {f"snapshot.{a.number}.{epoch}": kept for epoch, kept in a.snapshots.items()}
    for number, trained in ended.items():
        state[f"contexts.{number}"] = trained.contexts
        state[f"losses.{number}"] = torch.from_numpy(trained.losses)
        state[f"ended.{number}"] = torch.tensor(-1 if trained.diverged_at is None else trained.diverged_at)
        state |= {f"snapshot.{number}.{epoch}": kept for epoch, kept in trained.snapshots.items()}
    return state


def ended_runs(state: State, runs: Sequence[Run]) -> dict[int, Trained]:
    """What runs came to that had ended in ``state``, by their place in ``runs``."""
    ended = {}
    for number, run in enumerate(runs):
        if f"ended.{number}" in state:
            at = int(state[f"ended.{number}"])
            ended[number] = Trained(
                state[f"contexts.{number}"].view(run.contexts.shape),
                state[f"losses.{number}"].numpy(),
                "done" if at < 0 else "diverged",
                None if at < 0 else at,
                snapshots_of(state, number),
            )
    return ended


def take_up(active: Active, state: State) -> None:
    """Bring a run that was just started to where it stood in ``state``, if it had begun."""
    number = active.number
    if f"step.{number}" not in state:
        return
    for name in ("contexts", "momentum", "losses"):
        getattr(active, name).copy_(state[f"{name}.{number}"])
    active.step = int(state[f"step.{number}"])
    active.snapshots.update(snapshots_of(state, number))


def snapshots_of(state: State, number: int) -> dict[int, Tensor]:
    """A run's kept contexts, by epoch."""
    prefix = f"snapshot.{number}."
    return {int(name[len(prefix) :]): kept for name, kept in state.items() if name.startswith(prefix)}
