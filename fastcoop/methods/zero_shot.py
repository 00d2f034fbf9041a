"""Zero-shot CLIP: a hand-written prompt per class (paper, section 3.1 and Table 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field, field_validator

from fastcoop.methods.base import Method, MethodSettings
from fastcoop.methods.data import Data
from fastcoop.methods.scores import LinearClassifier
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.text import class_texts

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone


class ZeroShotSettings(MethodSettings):
    """``prompt`` (or ``prompts``, a list): with one "{}" for the class name; None is the dataset's own."""

    prompt: str | None = Field(None, validation_alias=AliasChoices("prompt", "prompts"))

    @field_validator("prompt")
    @classmethod
    def _has_one_place(cls, prompt: str | None) -> str | None:
        if prompt is not None and prompt.count("{}") != 1:
            raise ValueError('a prompt needs one "{}" where the class name goes')
        return prompt


class ZeroShotMethod(Method[ZeroShotSettings]):
    """Cosine similarity to the text features of one prompt per class."""

    name = "zero_shot"
    Settings = ZeroShotSettings
    learns = False
    needs_backbone = False

    def label(self, settings: ZeroShotSettings) -> str:
        return "Zero-shot CLIP" if settings.prompt is None else f'Zero-shot CLIP ("{settings.prompt}")'

    def key_settings(self, run: RunSpec[ZeroShotSettings], backbone: Backbone) -> dict[str, Any]:
        return {"prompt": self.prompts(run.settings, run.data)[0]}

    def prompts(self, settings: ZeroShotSettings, data: Data) -> tuple[str, ...]:
        # None is the prompt of the dataset that is tested, also on targets.
        return (settings.prompt or data.dataset.template,)

    def classifier(self, backbone: Backbone, run: RunSpec[ZeroShotSettings], data: Data) -> LinearClassifier:
        (template,) = self.prompts(run.settings, data)
        return LinearClassifier.of_texts(class_texts(backbone, data, template), backbone.logit_scale)
