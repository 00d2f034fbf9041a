"""Class features from contexts, differentiable: the public way into the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.engine.forest import plant
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.trees import Trees, tree_key
from fastcoop.errors import UserError
from fastcoop.prompts.layout import PromptLayout

Item = tuple[Sequence[str], PromptLayout, Tensor]


class PromptEncoder:
    """The class features of one class list and layout, for any number of runs.

        encoder = PromptEncoder(backbone, ["cat", "dog"], PromptLayout(16, "end"))
        weights = encoder(contexts)     # (runs, M, width) -> (runs, classes, dim)

    It keeps the text tower as it is now: after changing the model's weights, dtype or device, make another.

    Raises UserError, naming the class and its token count, where a prompt does not fit the text tower.
    """

    def __init__(self, backbone: Backbone, class_names: Sequence[str], layout: PromptLayout):
        self._trees = Trees(backbone)
        self.class_names, self.layout = key = tree_key(class_names, layout)
        _ = self._trees[key]  # what does not fit is said now

    def __call__(self, contexts: Tensor) -> Tensor:
        """Return features (runs, classes, dim) as the tower projects them, not normalised.

        ``contexts``: (runs, M, width), or (runs, classes, M, width) if class-specific; gradients flow to them.
        They may lie on another device than the tower.
        The result has the model's dtype and device, under autocast too.
        """
        return _encode(self._trees, [(self.class_names, self.layout, contexts)])[0]


def encode_prompts(backbone: Backbone, items: Sequence[Item], trees: Trees | None = None) -> list[Tensor]:
    """Encode a mixed list of (class names, layout, contexts) in one forest.

    Each item's contexts are those of one run, (M, width) or (classes, M, width) if class-specific, or of several
    with a leading runs dimension. Returns per item (classes, dim) or (runs, classes, dim), differentiable.
    ``trees``: of this backbone, to be used again from call to call while its weights stay as they are.
    """
    return _encode(trees or Trees(backbone), items)


def _encode(trees: Trees, items: Sequence[Item]) -> list[Tensor]:
    if not items:
        return []
    planned, flat, single = [], [], []
    for class_names, layout, contexts in items:
        key = tree_key(class_names, layout)
        shape = layout.shape(len(class_names), trees.tower.width)
        runs_first = contexts.ndim == len(shape) + 1 and len(contexts) > 0
        if contexts.shape[-len(shape) :] != shape or not (runs_first or contexts.ndim == len(shape)):
            raise UserError(
                f"Contexts of shape {shape}, or (runs, *{shape}), were expected for {len(class_names)} classes and "
                f"{layout}; {tuple(contexts.shape)} came."
            )
        single.append(not runs_first)
        runs = contexts.reshape(-1, shape[-2] * (shape[0] if len(shape) == 3 else 1), shape[-1])
        flat.append(runs.to(trees.tower.device))
        planned.append((*trees[key], len(runs)))
    forest_pass = ForestPass(plant(trees.tower, planned))
    outputs = _Forest.apply(forest_pass, *flat)
    return [out[0] if one else out for out, one in zip(outputs, single, strict=True)]


class _Forest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forest_pass: ForestPass, *contexts: Tensor) -> tuple[Tensor, ...]:
        ctx.forest_pass = forest_pass
        ctx.dtypes = [c.dtype for c in contexts]
        return tuple(forest_pass.forward(contexts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if (
            torch.is_grad_enabled()
        ):  # what follows is not recorded: a gradient's gradient would silently be zero
            raise UserError(
                "Class features can be differentiated once; a graph of their gradient was asked for."
            )
        contexts = ctx.forest_pass.backward(grads)
        return None, *(grad.to(dtype) for grad, dtype in zip(contexts, ctx.dtypes, strict=True))
