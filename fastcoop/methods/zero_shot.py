"""Methods that learn nothing: zero-shot CLIP (paper, section 3.1) and prompt ensembles (section 4.2, Table 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import AliasChoices, Field, model_validator

from fastcoop.backbones.late import open_clip_part
from fastcoop.methods.base import Method, MethodSettings
from fastcoop.methods.data import Data
from fastcoop.methods.late import Backbone
from fastcoop.methods.scores import LinearClassifier
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.text import Template, class_texts

S = TypeVar("S", bound=MethodSettings)


class PromptMethod(Method[S]):
    """Cosine similarity to text features of length 1, averaged over the prompts of `prompts`."""

    learns = False
    needs_backbone = False

    def classifier(self, backbone: Backbone, run: RunSpec[S], data: Data) -> LinearClassifier:
        texts = [class_texts(backbone, data, prompt) for prompt in self.prompts(run.settings, data)]
        return LinearClassifier.of_texts(np.mean(texts, axis=0), backbone.logit_scale)


class ZeroShotSettings(MethodSettings):
    """Settings of zero-shot CLIP.

    Attributes:
        prompt: Text with one "{}" for the class name, also called ``prompts``. None: the prompt of each dataset.
    """

    prompt: Template | None = Field(None, validation_alias=AliasChoices("prompt", "prompts"))

    @model_validator(mode="before")
    @classmethod
    def _is_given_once(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and {"prompt", "prompts"} <= given.keys():
            raise ValueError("prompt and prompts are the same setting; leave one of them")
        return given


class ZeroShotMethod(PromptMethod[ZeroShotSettings]):
    """One prompt per class."""

    name = "zero_shot"
    Settings = ZeroShotSettings

    def label(self, settings: ZeroShotSettings) -> str:
        return "Zero-shot CLIP" if settings.prompt is None else f'Zero-shot CLIP ("{settings.prompt}")'

    def key_settings(self, run: RunSpec[ZeroShotSettings], backbone: Backbone) -> dict[str, Any]:
        return {"prompt": self.prompts(run.settings, run.data)[0]}

    def prompts(self, settings: ZeroShotSettings, data: Data) -> tuple[str, ...]:
        return (settings.prompt or data.dataset.template,)


class EnsembleSettings(MethodSettings):
    """Settings of a prompt ensemble.

    Attributes:
        templates: CLIP's "selected" seven ImageNet templates, or "all" eighty.
    """

    templates: Literal["selected", "all"] = "selected"


class EnsembleMethod(PromptMethod[EnsembleSettings]):
    """CLIP's templates for ImageNet.

    As in the official code, the dataset's own prompt is one more, except on ImageNet (not on its variants).
    """

    name = "ensemble"
    Settings = EnsembleSettings

    def label(self, settings: EnsembleSettings) -> str:
        return f"Prompt ensemble ({'7' if settings.templates == 'selected' else '80'})"

    def key_settings(self, run: RunSpec[EnsembleSettings], backbone: Backbone) -> dict[str, Any]:
        return {"prompts": list(self.prompts(run.settings, run.data))}

    def prompts(self, settings: EnsembleSettings, data: Data) -> tuple[str, ...]:
        listed = "SIMPLE" if settings.templates == "selected" else "OPENAI"
        chosen = getattr(open_clip_part("zero_shot_metadata"), f"{listed}_IMAGENET_TEMPLATES")
        own = () if data.name.partition(":")[0] == "imagenet" else (data.dataset.template,)
        return (*(template("{}") for template in chosen), *own)
