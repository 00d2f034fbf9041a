"""Prompt ensembling: the mean of many prompts' text features (paper, section 4.2, Table 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastcoop.methods.base import Method, MethodSettings
from fastcoop.methods.data import Data
from fastcoop.methods.scores import LinearClassifier
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.text import class_texts

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone


class EnsembleSettings(MethodSettings):
    """``templates``: CLIP's "selected" seven ImageNet templates, or "all" eighty.

    As in the official code, the dataset's own prompt is one more, except on ImageNet (not on its variants).
    """

    templates: Literal["selected", "all"] = "selected"


class EnsembleMethod(Method[EnsembleSettings]):
    """Normalized text features averaged over prompts, then normalized."""

    name = "ensemble"
    Settings = EnsembleSettings
    learns = False
    needs_backbone = False

    def label(self, settings: EnsembleSettings) -> str:
        return f"Prompt ensemble ({'7' if settings.templates == 'selected' else '80'})"

    def key_settings(self, run: RunSpec[EnsembleSettings], backbone: Backbone) -> dict[str, Any]:
        return {"prompts": list(self.prompts(run.settings, run.data))}

    def prompts(self, settings: EnsembleSettings, data: Data) -> tuple[str, ...]:
        return tuple(ensemble_prompts(data, settings.templates))

    def classifier(self, backbone: Backbone, run: RunSpec[EnsembleSettings], data: Data) -> LinearClassifier:
        texts = [class_texts(backbone, data, prompt) for prompt in self.prompts(run.settings, data)]
        return LinearClassifier.of_texts(np.mean(texts, axis=0), backbone.logit_scale)


def ensemble_prompts(data: Data, templates: str) -> list[str]:
    """The templates of an ensemble on a dataset, each with one "{}" for the class name."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    chosen = SIMPLE_IMAGENET_TEMPLATES if templates == "selected" else OPENAI_IMAGENET_TEMPLATES
    prompts = [template("{}") for template in chosen]
    return prompts if data.name.partition(":")[0] == "imagenet" else [*prompts, data.dataset.template]
