"""A linear layer on the text encoder's output, learned from identity (paper, Table 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcoop.methods.text_learner import TextLearner, TextLearnerSettings

if TYPE_CHECKING:
    from torch import Tensor


class TextTransformMethod(TextLearner):
    """Each class's text feature t becomes t + A t, with A learned (dim, dim) and zero at the start."""

    name = "text_transform"
    kept = "transform"

    def label(self, settings: TextLearnerSettings) -> str:
        return "Text transform"

    def shape(self, dim: int) -> tuple[int, ...]:
        return dim, dim

    def apply(self, offset: Tensor, texts: Tensor) -> Tensor:
        return texts + texts @ offset.mT
