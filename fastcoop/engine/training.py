"""Training many runs together: which runs are in the batch, who leaves and who joins."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch

from fastcoop.backbones import Backbone
from fastcoop.checks import whole_number
from fastcoop.engine.batch import Active, Batch, OnDevice
from fastcoop.engine.buffers import Buffers
from fastcoop.engine.fit import BatchBudget, is_out_of_memory, plan_training
from fastcoop.engine.precision import own_precision, warn_of_slow_products
from fastcoop.engine.rows import threads_at_most
from fastcoop.engine.run import Run, Trained
from fastcoop.engine.state import State, ended_runs, state_of, take_up
from fastcoop.engine.trees import Trees
from fastcoop.errors import UserError

LOOK_EVERY = 16  # steps, or an epoch, between looks at which runs diverged: a look waits for the device
MAX_ESTIMATE_ERROR = 0.25  # a batch that takes this share more than estimated is warned of

log = logging.getLogger("fastcoop")


@own_precision
def train(
    backbone: Backbone,
    runs: Sequence[Run],
    *,
    memory_budget: int | None = None,
    precision: torch.dtype | None = None,
    on_done: Callable[[int, Trained], None] | None = None,
    on_progress: Callable[[float], None] | None = None,
    state: State | None = None,
    on_step: Callable[[Callable[[], State]], None] | None = None,
) -> list[Trained]:
    """Train ``runs``, as many at once as fit, each as if it were alone (section 4.1's recipe).

    Runs may differ in everything but the backbone. Those that finish leave, waiting ones join. ``memory_budget`` in
    bytes bounds what a batch of runs holds (by default, from the free memory); running out of memory halves it and
    goes on. ``on_done(number, trained)`` is called as each run ends, ``on_progress(cost)`` as work is done, in units
    of ``RunCost.row_steps``. ``precision`` is that of the tower's weights and activations, in place of the backbone's
    own (bfloat16 is not exact; contexts, loss and optimiser state stay float32 in any case).
    ``on_step(get_state)`` is called after every step; what ``get_state()`` returned, given back as
    ``state`` with the same runs, makes the training go on from there, to the same bits where all runs fit together.

    Raises UserError, before the first step, for a prompt, contexts or features that do not fit the backbone.
    """
    if memory_budget is not None:
        whole_number(memory_budget, "the memory_budget of training in bytes", 0, 2**63)
    trees = Trees(backbone, precision)
    warn_of_slow_products(trees.tower.dtype, trees.tower.device.type)
    for run in runs:
        _check_sizes(run, trees)
    dtype = torch.float64 if trees.tower.dtype == torch.float64 else torch.float32
    plan = plan_training(
        backbone, [run.shape for run in runs], memory_budget=memory_budget, precision=precision
    )
    costs, budget = plan.runs, plan.budget()
    buffers = Buffers(trees.tower.dtype, trees.tower.device)
    state = state or {}
    results = ended_runs(state, runs)
    # Numbers not begun, and runs set aside for want of memory.
    waiting: deque[int | Active] = deque(n for n in plan.order() if n not in results)
    active: list[Active] = []
    batch: Batch | None = None
    on_device: OnDevice = WeakValueDictionary()

    def join() -> None:
        """Fill the batch with runs: those in training, then those waiting."""
        budget.clear()
        waiting.extendleft(reversed(active))
        active.clear()
        while waiting:
            head = waiting[0]
            if not budget.try_add(costs[head.number if isinstance(head, Active) else head]):
                break
            waiting.popleft()
            if not isinstance(head, Active):
                head = Active.start(head, runs[head], dtype, trees.tower.device, on_device)
                take_up(head, state)
            active.append(head)

    def settle() -> None:
        """Learn from the device where the runs are; those that ended leave, and the batch with them."""
        nonlocal batch
        if batch is None:
            return
        batch.settle()
        ended = [a for a in active if a.ended]
        for a in ended:
            results[a.number] = a.result()
            active.remove(a)
            batch = None
        for a in ended:
            if on_done is not None:
                on_done(a.number, results[a.number])

    def state_now() -> State:
        settle()
        return state_of([*active, *(head for head in waiting if isinstance(head, Active))], results)

    if on_done is not None:
        for number, trained in results.items():
            on_done(number, trained)
    while waiting or active:
        try:
            with threads_at_most(trees.tower.heads):
                if batch is None:
                    join()
                    batch = Batch(trees, active, backbone.logit_scale, buffers)
                batch.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            settle()  # the steps that were done count
            batch = None
            if not budget.shrink():
                raise
            buffers = Buffers(trees.tower.dtype, trees.tower.device)
            if trees.tower.device.type == "cuda":
                torch.cuda.empty_cache()
            log.warning("Out of memory with %d runs together; going on with fewer.", len(active))
            continue
        if batch.done == 1:
            buffers.trim()
            _check_estimate(budget, batch.forest_pass.nbytes)
        if on_progress is not None:
            on_progress(float(sum(costs[a.number].tree.rows for a in active)))
        if (
            batch.done == batch.steps
            or batch.done % max(LOOK_EVERY, *(a.run.steps_per_epoch for a in active)) == 0
        ):
            settle()
        if on_step is not None:
            on_step(state_now)
    return [results[n] for n in range(len(runs))]


def _check_sizes(run: Run, trees: Trees) -> None:
    """Refuse contexts and features of another backbone's sizes."""
    tower = trees.tower
    if (run.contexts.shape[-1], run.features.shape[-1]) != (tower.width, tower.dim):
        raise UserError(
            f"The backbone's context vectors have {tower.width} numbers and its features {tower.dim}; a run with "
            f"{run.contexts.shape[-1]} and {run.features.shape[-1]} came: were its features made by another backbone?"
        )


def _check_estimate(budget: BatchBudget, used: int) -> None:
    """Compare the bytes that a batch's activations take after its first step with the estimate."""
    estimate = budget.activation_bytes
    log.debug("%d runs take %.2f GB; the estimate is %.2f GB.", budget.runs, used / 1e9, estimate / 1e9)
    if used > (1 + MAX_ESTIMATE_ERROR) * estimate:
        log.warning(
            "%d runs take %.2f GB, %.0f%% more than estimated; a smaller memory budget is safer.",
            budget.runs,
            used / 1e9,
            100 * (used / estimate - 1),
        )
