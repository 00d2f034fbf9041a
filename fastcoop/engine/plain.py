"""The plain path: all positions of all prompts through the model's own modules, for towers that share nothing.

Towers that attend in both directions, attend to padding or are read elsewhere than at the end token give prompts with
a common beginning nothing in common. `PlainPass` leaves the computation to the model: its embedding step puts out the
words' embeddings and the context vectors, and autograd gives the gradients.

Prompts are encoded in parts. Autograd's graph of a part is kept for the backward pass while memory allows; the other
parts are encoded a second time there. On a CPU a part has prompts of one run only, and the same ones in any company,
so a run's bits do not depend on the runs beside it; on a GPU a part has several runs where they fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcoop.backbones import PlainTower
from fastcoop.backbones.precision import disable_autocast
from fastcoop.engine.tree_layout import split_runs
from fastcoop.memo import memoize
from fastcoop.prompts.plain import PlainPrompts, plain_prompts

ROWS_OF_PART = {"cpu": 2048, "cuda": 8192}  # positions encoded at once: enough for full speed

Graph = tuple[Tensor, Tensor]  # context vectors and the features computed from them

prompts_of = memoize(64)(plain_prompts)  # tokenized once


class PlainLayout:
    """The prompts of one list of classes for one tower."""

    @torch.inference_mode(False)
    @torch.no_grad()
    @disable_autocast
    def __init__(self, prompts: PlainPrompts, tower: PlainTower):
        assert tower.embedding is not None
        self.tower = tower
        positions = prompts.ids.shape[1]
        if tower.pad_id is not None:
            positions = int((prompts.ids != tower.pad_id).any(0).nonzero()[0].max()) + 1
        ids, vectors = (torch.as_tensor(a[:, :positions]) for a in (prompts.ids, prompts.vectors))
        distinct, at = ids.unique(return_inverse=True)
        self.ids = ids.to(tower.device)  # int64 (classes, positions)
        # What the embedding step puts out for each distinct token (tokens, width); a run's vectors stand behind them.
        self.tokens = tower.embedding(distinct.to(tower.device)).to(tower.dtype)
        # int64 (classes, positions): the row in this table.
        self.table_rows = torch.where(vectors >= 0, len(distinct) + vectors, at).to(tower.device)
        self.classes, self.rows = len(ids), ids.numel()  # of one run: rows are the positions of all prompts
        self.vectors = int(vectors.max()) + 1  # context vectors of one run
        self.at_once = max(1, ROWS_OF_PART[tower.device.type] // positions)  # prompts of a part

    def encode(self, vectors: Tensor, classes: slice) -> Tensor:
        """Return the features (runs, classes, dim) of some classes with ``vectors`` (runs, vectors, width)."""
        runs, rows = len(vectors), self.table_rows[classes]
        first = self.vectors * torch.arange(runs, device=rows.device)[:, None, None]  # of each run
        rows = torch.where(rows >= len(self.tokens), rows + first, rows).flatten(0, 1)
        table = torch.cat([self.tokens, self.tower.embed(vectors.flatten(0, 1))])
        ids = self.ids[classes].repeat(runs, 1)
        return self.tower.encode_embedded(ids, F.embedding(rows, table)).unflatten(0, (runs, -1))

    @cached_property
    def cost(self) -> PromptCost:
        """What one prompt takes, measured on the first."""
        from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

        frozen = {weight.untyped_storage().data_ptr() for weight in self.tower.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.inference_mode(False), torch.enable_grad(), FlopCounterMode(display=False) as counter:
            vectors = self.tokens.new_zeros(1, self.vectors, self.tokens.shape[1]).requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                features = self.encode(vectors, slice(1))
            torch.autograd.grad(features.sum(), vectors)
        return PromptCost(float(counter.get_total_flops()), sum(kept.values()))


class PromptCost(NamedTuple):
    """What one prompt takes."""

    flops: float  # operations, forward and backward
    kept_bytes: int  # what autograd keeps for the backward pass


@dataclass(eq=False)
class PlainWorkspace:
    """What a forward pass leaves for the backward pass; graphs of parts beyond ``memory_bytes`` are computed again."""

    keep: bool = True  # whether backward follows forward
    memory_bytes: int = 0
    contexts: list[Tensor] = field(default_factory=list)  # of each group (runs, vectors, width)
    graphs: dict[tuple[int, int], Graph] = field(default_factory=dict)  # by group and part
    nbytes: int = 0  # of the graphs


class PlainPass:
    """The `tower.Pass` of groups, each a layout with a number of runs.

    Attributes:
        parts: Of each group, as slices of its runs and of its classes.
    """

    def __init__(self, tower: PlainTower, groups: Sequence[tuple[PlainLayout, int]]):
        self.tower, self.groups = tower, tuple(groups)
        self.vectors = [(runs, layout.vectors) for layout, runs in groups]
        self.classes = [(runs, layout.classes) for layout, runs in groups]
        self.parts: list[list[tuple[slice, slice]]] = []
        for layout, runs in groups:
            number = -(-layout.classes // layout.at_once)  # parts of a run, of about one size
            ends = [layout.classes * n // number for n in range(number + 1)]
            together = 1 if tower.device.type == "cpu" else max(1, layout.at_once // layout.classes)
            of_runs = (slice(run, run + together) for run in range(0, runs, together))
            self.parts.append(list(product(of_runs, (slice(*pair) for pair in pairwise(ends)))))

    @torch.inference_mode(False)
    def forward(self, vectors: Tensor, workspace: PlainWorkspace) -> Tensor:
        """Return the class features (classes, dim) of the context vectors (vectors, width)."""
        workspace.graphs.clear()
        workspace.nbytes = 0
        workspace.contexts = split_runs(vectors.detach().to(self.tower.dtype, copy=True), self.vectors)
        features = vectors.new_empty(sum(map(prod, self.classes)), self.tower.dim, dtype=self.tower.dtype)
        for number, of_group in enumerate(split_runs(features, self.classes)):
            layout, _ = self.groups[number]
            for n, part in enumerate(self.parts[number]):
                graph = self._encode(number, part, workspace, workspace.keep)
                of_group[part] = graph[1].detach()
                if workspace.keep:
                    nbytes = workspace.nbytes + graph[1].shape[:2].numel() * layout.cost.kept_bytes
                    if nbytes <= workspace.memory_bytes:
                        workspace.graphs[number, n], workspace.nbytes = graph, nbytes
        return features

    @torch.inference_mode(False)
    def backward(self, grad: Tensor, workspace: PlainWorkspace) -> Tensor:
        """Return the gradient of the vectors, in the tower's dtype."""
        result = torch.cat([torch.zeros_like(contexts).flatten(0, 1) for contexts in workspace.contexts])
        both = zip(split_runs(grad, self.classes), split_runs(result, self.vectors), strict=True)
        for number, (of_features, of_contexts) in enumerate(both):
            for n, part in enumerate(self.parts[number]):
                kept = workspace.graphs.get((number, n))
                vectors, features = kept or self._encode(number, part, workspace, True)
                own = of_features[part].to(features.dtype)
                (found,) = torch.autograd.grad(features, vectors, own, retain_graph=kept is not None)
                of_contexts[part[0]] += found
        return result

    def _encode(self, number: int, part: tuple[slice, slice], workspace: PlainWorkspace, keep: bool) -> Graph:
        """Return the vectors of a part's runs and the features of its prompts; with ``keep``, in one graph."""
        runs, classes = part
        with torch.set_grad_enabled(keep):
            vectors = workspace.contexts[number][runs].detach().requires_grad_(keep)
            return vectors, self.groups[number][0].encode(vectors, classes)
