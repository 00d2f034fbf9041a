"""A bias on the text encoder's output (paper, Table 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcoop.methods.text_learner import TextLearner, TextLearnerSettings

if TYPE_CHECKING:
    from torch import Tensor


class TextBiasMethod(TextLearner):
    """Each class's text feature t becomes t + b, with b learned (dim,), the same for all classes."""

    name = "text_bias"
    kept = "bias"

    def label(self, settings: TextLearnerSettings) -> str:
        return "Text bias"

    def shape(self, dim: int) -> tuple[int, ...]:
        return (dim,)

    def apply(self, offset: Tensor, texts: Tensor) -> Tensor:
        return texts + offset[:, None]
