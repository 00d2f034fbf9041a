"""A training step over fake CUDA tensors: its operations, its kernels, and the bytes that they read and write.

Fake tensors have devices, types and shapes, but no numbers and no GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcoop.engine import tower
from fastcoop.engine.kernels import launch
from fastcoop.engine.runs import Run
from fastcoop.engine.training import ActiveRun, Batch
from fastcoop.engine.tree_layout import TreeLayout
from fastcoop.engine.weights import FoldedBlock, FoldedTower
from fastcoop.prompts import PromptLayout
from fastcoop.prompts.layout import class_prompts
from fastcoop.prompts.tree import build_tree, tree_key

NO_WORK = {  # operations that launch nothing: views, and memory without content
    "view", "expand", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "split", "split_with_sizes",
    "unbind", "reshape", "_unsafe_view", "detach", "permute", "as_strided", "alias", "empty", "new_empty", "empty_like",
    "empty_strided", "new_empty_strided", "lift_fresh",
}  # fmt: skip
GATHERS = {"index_select", "index"}


class Launch(NamedTuple):
    """One launch: an operation of torch, or a kernel with its arguments and options."""

    name: str
    bytes: int  # read and written
    kernel: Any = None
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] | None = None


def size(*tensors: Any) -> int:
    """Bytes of tensors; views count as what they show."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class Recorder(TorchDispatchMode):
    """Records launches."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        inputs = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if (
            namespace == "aten"
            and name not in NO_WORK
            and any(t.device.type == "cuda" for t in inputs + outputs)
        ):
            moved = size(*inputs, *outputs)
            if name in GATHERS:
                moved = 2 * size(*outputs) + size(*inputs[1:])
            elif name == "index_copy_":
                moved = 2 * size(inputs[2]) + size(inputs[1])
            self.launches.append(Launch(name, moved))
        return result

    def run(self, kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Stand in for `launch._run`."""
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        self.launches.append(
            Launch(kernel.__name__, moved_bytes(kernel.__name__, values), kernel, arguments, options)
        )


def moved_bytes(name: str, a: dict[str, Any]) -> int:
    """Bytes that a kernel reads and writes; what several programs read (weights, constants) counts once for each."""
    if name in ("forward_kernel", "backward_kernel"):
        chain = (
            len(a["chain"]) * 2 * size(a["k"][:1])
        )  # the keys and values of each tile's chain, all in one block
        read = size(a["q"], a["k"], a["v"]) + chain
        if name == "forward_kernel":
            return read + size(a["out"])
        grads = size(a["grad"], a["grad_q"], a["grad_k"], a["grad_v"])
        return read + grads + size(a["slot_k"], a["slot_v"])
    if name == "add_segments_kernel":
        return size(a["values"]) + 2 * size(a["out"][:1]) * len(a["rows"])
    if name == "layer_norm_kernel":
        rows = a["normal"]  # of x, only chosen rows are read
        return size(a["x"][:1]) * len(rows) + size(a["branch"], a["sums"], rows)
    if name == "layer_norm_backward_kernel":
        gathered = (a["residual"], a["residual_low"], a["extra"])  # of each at most the rows that there are
        rows = len(a["grad"])
        return size(
            a["grad"], a["x"], a["out"], a["out_low"], *(x if x is None else x[:rows] for x in gathered)
        )
    if name == "activation_kernel":
        return size(a["x"], a["out"])
    if name == "activation_backward_kernel":
        return size(a["x"]) + 2 * size(a["grad"])
    if name == "cross_entropy_kernel":
        return 3 * size(a["features"]) + size(a["grads"])
    if name == "sgd_kernel":
        return 2 * size(a["vectors"], a["momentum"]) + size(a["grad"])
    return 0  # note_losses_kernel


class Case(NamedTuple):
    """Runs of one tree."""

    names: tuple[str, ...]
    layout: PromptLayout
    runs: int


@contextmanager
def fake_step(
    cases: Sequence[Case], tokenizer: Any, *, width: int, heads: int, layers: int, dim: int, dtype: torch.dtype,
    activation: str = "silu", batch_size: int = 32,
) -> Iterator[tuple[Batch, list[Launch]]]:  # fmt: skip
    """Yield a batch over fake CUDA tensors, and the launches of its second step."""
    trees = {
        tree_key(names, layout): build_tree(class_prompts(tokenizer, names, layout, 77))
        for names, layout, _ in cases
    }
    with FakeTensorMode(allow_non_fake_inputs=False):
        folded = fake_tower(width, heads, layers, dim, dtype, activation)
        known = FakeTrees(folded, {key: TreeLayout(tree, folded) for key, tree in trees.items()})
        active = []
        for names, layout, runs in cases:
            for _ in range(runs):
                run = fake_run(names, layout, width, dim, batch_size)
                active.append(ActiveRun.start(len(active), run, torch.float32, folded.device))
        recorder = Recorder()
        with patch.object(launch, "_run", recorder.run), patch.object(tower, "are_usable", lambda *_: True):
            batch = Batch(known, active, 100.0)  # type: ignore[arg-type]
            batch._step()
            recorder.launches.clear()
            with recorder:
                batch._step()
            yield batch, recorder.launches


@dataclasses.dataclass
class FakeTrees:
    """Stands in for `Trees`."""

    tower: FoldedTower
    known: dict[Any, TreeLayout]

    def __getitem__(self, key: Any) -> TreeLayout:
        return self.known[key]


def fake_tower(
    width: int, heads: int, layers: int, dim: int, dtype: torch.dtype, activation: str
) -> FoldedTower:
    def new(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    def block() -> FoldedBlock:
        return FoldedBlock(
            eps_1=1e-5, eps_2=1e-5, qkv=new(width, 3 * width), out=new(width, width), out_bias=new(width),
            fc=new(width, 4 * width), proj=new(4 * width, width), proj_bias=new(width),
        )  # fmt: skip

    return FoldedTower(
        blocks=tuple(block() for _ in range(layers)), token_embedding=new(49408, width),
        positional_embedding=new(77, width), projection=new(width, dim), gain=new(width), shift=new(width),
        eps_final=1e-5, heads=heads, activation=activation,
    )  # fmt: skip


class FakeRun(Run):
    """A run of fake tensors, whose memory cannot be looked at."""

    images = property(id)


def fake_run(names: Sequence[str], layout: PromptLayout, width: int, dim: int, batch_size: int) -> Run:
    """A run whose values are not checked, since fake tensors have none."""
    run = object.__new__(FakeRun)
    values = {
        "class_names": names,
        "layout": layout,
        "contexts": torch.empty(layout.shape(len(names), width)),
        "features": torch.empty(batch_size, 1, dim, dtype=torch.float16),  # as in a store
        "labels": torch.empty(batch_size, dtype=torch.long),
        "epochs": 20,
        "seed": 0,
        "batch_size": batch_size,
    }
    for field in dataclasses.fields(Run):
        default = None if field.default is dataclasses.MISSING else field.default
        object.__setattr__(run, field.name, values.get(field.name, default))
    return run
