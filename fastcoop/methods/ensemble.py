"""Prompt ensembling: the mean of many prompts' text features (paper, section 4.2, Table 2)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastcoop.methods.base import Done, Method, MethodSettings, Outcome, RunContext
from fastcoop.methods.data import Data
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.text import prompt_features, score_texts

if TYPE_CHECKING:
    from fastcoop.backbones import Backbone


class EnsembleSettings(MethodSettings):
    """``templates``: CLIP's "selected" seven ImageNet templates, or "all" eighty.

    The dataset's own prompt is added, except on ImageNet, as the official code does: on ImageNet's variants it is.
    """

    templates: Literal["selected", "all"] = "selected"


class Ensemble(Method[EnsembleSettings]):
    """Normalised text features averaged over prompts, then normalised."""

    name = "ensemble"
    Settings = EnsembleSettings
    learns = False

    def label(self, settings: EnsembleSettings) -> str:
        return f"Prompt ensemble ({'7' if settings.templates == 'selected' else '80'})"

    def key_settings(self, run: RunSpec[EnsembleSettings], backbone: Backbone) -> dict[str, Any]:
        return {"prompts": list(self.prompts(run.settings, run.data))}

    def prompts(self, settings: EnsembleSettings, data: Data) -> tuple[str, ...]:
        return tuple(ensemble_prompts(data, settings.templates))

    def run(
        self,
        backbone: Backbone,
        runs: Sequence[RunSpec[EnsembleSettings]],
        done: Done,
        context: RunContext,
    ) -> None:
        for index, run in enumerate(runs):
            start = time.perf_counter()
            scores = {}
            for data in run.tests:
                prompts = self.prompts(run.settings, data)
                features = [prompt_features(backbone, data.class_names, prompt) for prompt in prompts]
                scores[data.name] = score_texts(backbone, data, np.mean(features, axis=0))
            done(index, Outcome(scores, seconds=time.perf_counter() - start))
            context.on_progress(1.0)


def ensemble_prompts(data: Data, templates: str) -> list[str]:
    """The templates of an ensemble on a dataset, each with one "{}" for the class name."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    chosen = SIMPLE_IMAGENET_TEMPLATES if templates == "selected" else OPENAI_IMAGENET_TEMPLATES
    prompts = [template("{}") for template in chosen]
    return prompts if data.name.partition(":")[0] == "imagenet" else [*prompts, data.dataset.template]
