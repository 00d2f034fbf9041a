"""Class features from contexts, differentiable: the public way into the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcoop.backbones import Backbone
from fastcoop.backbones.precision import disable_autocast, limit_threads
from fastcoop.engine.forest import Trees
from fastcoop.engine.tower import Pass, build_pass, new_workspace
from fastcoop.engine.tree_layout import split_runs
from fastcoop.engine.weights import row_rule
from fastcoop.errors import UserError
from fastcoop.prompts.layout import PromptLayout
from fastcoop.prompts.tree import tree_key
from fastcoop.prompts.vectors import initial_contexts

FORESTS = 4  # forests that an encoder keeps, each for another number of runs
ROWS_AT_ONCE = {"cpu": 4096, "cuda": 32768}  # encoded at once; enough for full speed

Item = tuple[Sequence[str], PromptLayout, Tensor]


class PromptEncoder(nn.Module):
    """The class features of one list of classes and one layout, for any number of runs.

        encoder = PromptEncoder(backbone, ["cat", "dog"], PromptLayout(16, "end"))
        features = encoder(contexts)     # (runs, M, width) -> (runs, classes, dim)

    The module has no parameters: the frozen text tower, as it is now, is kept outside of ``state_dict`` and moves with
    ``to``. Under ``torch.no_grad`` nothing is kept for backward.

    Args:
        backbone: Its text tower and tokenizer are used.
        class_names: Names of the classes.
        layout: The prompt layout.

    Raises:
        UserError: For a prompt that does not fit the text tower, with its class and token count.
    """

    def __init__(self, backbone: Backbone, class_names: Sequence[str], layout: PromptLayout):
        super().__init__()
        self._trees = Trees(backbone)
        self.class_names, self.layout = key = tree_key(class_names, layout)
        self._passes: dict[int, Pass] = {}  # by number of runs
        _ = self._trees[key]  # raises if a prompt does not fit

    def forward(self, contexts: Tensor) -> Tensor:
        """Return class features (runs, classes, dim) as the tower projects them, not normalized.

        Args:
            contexts: (runs, M, width), or (runs, classes, M, width) if class-specific, of any float dtype and device.
                Gradients flow to them. The runs dimension may be left out, in the result too.

        Returns:
            Features in the tower's dtype and on its device, under autocast too.
        """
        runs, is_single = _by_run(self._trees, (self.class_names, self.layout, contexts))
        features = class_features(self._forest_pass(len(runs)), runs.flatten(0, 1))
        features = features.view(len(runs), -1, features.shape[1])
        return features[0] if is_single else features

    @property
    def runs_at_once(self) -> int:
        """Number of runs that fill a forest; with more, `forward` only takes more memory."""
        return runs_at_once(self._trees, self._trees[self.class_names, self.layout])

    def _forest_pass(self, runs: int) -> Pass:
        if runs not in self._passes:
            if len(self._passes) == FORESTS:
                del self._passes[next(iter(self._passes))]
            tree, tower = self._trees[self.class_names, self.layout], self._trees.tower
            self._passes[runs] = build_pass(tower, [(tree, runs)], row_rule(tower))
        return self._passes[runs]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PromptEncoder:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._trees.replace_tower(self._trees.tower.map(fn))
        self._passes.clear()
        return self


class PromptLearner(nn.Module):
    """Context vectors as parameters, for any training loop and optimizer.

        learner = PromptLearner(backbone, ["cat", "dog"], PromptLayout(16, "end"))
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.002, momentum=0.9, weight_decay=5e-4)
        weights = torch.nn.functional.normalize(learner(), dim=-1)
        logits = backbone.logit_scale * image_features @ weights.t()     # image features are normalized

    Attributes:
        contexts: The only parameter, (M, width), or (classes, M, width) if class-specific.
        encoder: The `PromptEncoder` behind it.

    Args:
        backbone: Its text tower and tokenizer are used.
        class_names: Names of the classes.
        layout: The prompt layout.
        seed: Draws the first contexts.
        words: Words to start from instead, with one token per context vector.
    """

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        layout: PromptLayout,
        *,
        seed: int = 0,
        words: str | None = None,
    ):
        super().__init__()
        self.encoder = PromptEncoder(backbone, class_names, layout)
        first = initial_contexts(backbone, layout, len(self.encoder.class_names), seed, words)
        dtype = torch.promote_types(backbone.dtype, torch.float32)
        self.contexts = nn.Parameter(first.to(backbone.device, dtype))

    def forward(self) -> Tensor:
        """Return the class weights (classes, dim), not normalized."""
        features: Tensor = self.encoder(self.contexts)
        return features


def encode_prompts(backbone: Backbone, items: Sequence[Item], trees: Trees | None = None) -> list[Tensor]:
    """Encode a mixed list of prompts in one forest, differentiably.

    Args:
        backbone: Its text tower and tokenizer are used.
        items: Each (class names, layout, contexts), with contexts as `PromptEncoder` takes them.
        trees: Of this backbone, to be reused from call to call while its weights stay as they are.

    Returns:
        For each item (runs, classes, dim), or (classes, dim) for contexts of one run without a runs dimension.
    """
    if not items:
        return []
    trees = trees or Trees(backbone)
    given = [_by_run(trees, item) for item in items]
    groups = [(trees[tree_key(*item[:2])], len(runs)) for item, (runs, _) in zip(items, given, strict=True)]
    vectors = torch.cat([runs.flatten(0, 1) for runs, _ in given])
    features = class_features(build_pass(trees.tower, groups), vectors)
    by_item = split_runs(features, [(runs, tree.classes) for tree, runs in groups])
    return [out[0] if is_single else out for out, (_, is_single) in zip(by_item, given, strict=True)]


@torch.no_grad()
def encode_runs(trees: Trees, class_names: Sequence[str], layout: PromptLayout, contexts: Tensor) -> Tensor:
    """Return class features (runs, classes, dim) of the contexts (runs, ...) of any number of runs, without gradients.

    As many runs as fill ``ROWS_AT_ONCE`` are encoded at once, each as if it were alone.
    """
    runs, _ = _by_run(trees, (class_names, layout, contexts))
    tower, tree = trees.tower, trees[tree_key(class_names, layout)]
    parts = runs.split(runs_at_once(trees, tree))
    with limit_threads(tower.heads):
        passes = {n: build_pass(tower, [(tree, n)], row_rule(tower)) for n in set(map(len, parts))}
        features = torch.cat([class_features(passes[len(part)], part.flatten(0, 1)) for part in parts])
    return features.view(len(runs), -1, features.shape[1])


def runs_at_once(trees: Trees, tree: Any) -> int:
    """Return the number of runs of a tree that fill a forest."""
    return max(1, ROWS_AT_ONCE[trees.tower.device.type] // int(tree.rows))


def _by_run(trees: Trees, item: Item) -> tuple[Tensor, bool]:
    """Return an item's contexts as (runs, vectors, width) on the tower's device, and whether they are one run's."""
    class_names, layout, contexts = item
    if not isinstance(contexts, Tensor):
        raise UserError(f"Expected contexts as a tensor, got an object of type {type(contexts).__name__}.")
    names, _ = tree_key(class_names, layout)
    shape, given = layout.shape(len(names), trees.tower.width), tuple(contexts.shape)
    if given[-len(shape) :] != shape or len(given) - len(shape) not in (0, 1) or given[0] == 0:
        raise UserError(
            f"Expected contexts of shape {shape} or (runs, *{shape}) for {len(names)} classes and {layout}, got "
            f"{given}."
        )
    by_run = contexts.reshape(-1, math.prod(shape[:-1]), shape[-1])
    return by_run.to(trees.tower.device), len(given) == len(shape)


@disable_autocast
def class_features(forest_pass: Pass, vectors: Tensor) -> Tensor:
    """Return the class features of all runs, (classes, dim), of their context vectors (vectors, width).

    What backward needs is kept only where a gradient may be asked for.
    """
    keep = torch.is_grad_enabled() and vectors.requires_grad
    workspace = new_workspace(forest_pass.tower, keep)
    if keep:
        features: Tensor = _ForestFunction.apply(forest_pass, vectors, workspace)
        return features
    return forest_pass.forward(vectors, workspace)


class _ForestFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forest_pass: Pass, vectors: Tensor, workspace: Any) -> Tensor:
        ctx.forest_pass, ctx.workspace, ctx.dtype = forest_pass, workspace, vectors.dtype
        return forest_pass.forward(vectors, workspace)

    @staticmethod
    @disable_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        if torch.is_grad_enabled():  # nothing here is recorded: a second derivative would silently be zero
            raise UserError(
                "Class features can be differentiated once, but a graph of their gradient was requested."
            )
        return None, ctx.forest_pass.backward(grad, ctx.workspace).to(ctx.dtype), None
