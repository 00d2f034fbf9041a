"""CoOp held near zero-shot CLIP by a hand-written prompt: KgCoOp (CVPR 2023) and ProGrad (ICCV 2023).

Both are CoOp but for what a step minimizes, so their runs train in the engine, and can share a forest with CoOp's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from fastcoop import engine
from fastcoop.errors import UserError
from fastcoop.methods.coop import CoOpMethod, CoOpSettings, Run, layout_of
from fastcoop.methods.data import Data
from fastcoop.methods.late import Backbone, Tensor, torch
from fastcoop.methods.schedule import BatchSize, Coefficient, Positive
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.text import Template, prompt_features
from fastcoop.methods.training import EngineTrainer, tokens_of


class RegularizedSettings(CoOpSettings):
    """Settings of CoOp, and of the hand-written prompt that it is held to.

    Attributes:
        lmbda: The papers' lambda.
        template: The hand-written prompt, with one "{}". None: the dataset's, or the official
            code's where that differs.
    """

    lmbda: Coefficient = 1.0
    template: Template | None = None

    @property
    def pulls(self) -> bool:
        return False  # by CoOp's own weight

    def paper_epochs(self, dataset: str, shots: int | str) -> int:
        return 100

    def unused(self) -> Mapping[str, str | None]:
        reason = "lmbda weighs the hand-written prompt here; leave out pull"
        return {**super().unused(), **({"pull": reason} if self.pull else {})}


class RegularizedMethod(CoOpMethod):
    """CoOp with an objective that knows a hand-written prompt of each class."""

    TEMPLATES: ClassVar[Mapping[str, str]]  # where the official code's is not the dataset's own

    def prompts(self, settings: Any, data: Data) -> tuple[str, ...]:
        own = self.TEMPLATES.get(data.name.partition(":")[0], data.dataset.template)
        return (settings.template or own,)

    def label(self, settings: Any) -> str:
        given = settings.model_dump(include={"lmbda", "template"}, exclude_defaults=True).items()
        return super().label(settings)[:-1] + "".join(f", {name} {value}" for name, value in given) + ")"

    def key_settings(self, run: Run, backbone: Backbone) -> dict[str, Any]:
        return super().key_settings(run, backbone) | {"template": self.prompts(run.settings, run.data)[0]}

    def texts(self, backbone: Backbone, run: Run) -> Tensor:
        """Return the hand-written prompt's text features (classes, dim), of length 1."""
        (template,) = self.prompts(run.settings, run.data)
        return torch.from_numpy(prompt_features(backbone, run.data.class_names, template))


class KgCoOpSettings(RegularizedSettings):
    """Settings of KgCoOp. The defaults are the official ones.

    Attributes:
        lmbda: Weight of the mean over classes of 1 - cos between the learned and the hand-written text feature.
    """

    context_length: Positive = 4
    init: str = Field("a photo of a", min_length=1)
    batch_size: BatchSize = 128
    lmbda: Coefficient = 8.0


class KgCoOpMethod(RegularizedMethod):
    """Cross-entropy + lmbda mean_k (1 - cos(t_k, h_k)), for text features t learned and h hand-written."""

    name = "kgcoop"
    title = "KgCoOp"
    Settings = KgCoOpSettings
    TEMPLATES: ClassVar[Mapping[str, str]] = {"dtd": "a photo of a {}, a type of texture."}

    def objective(self, backbone: Backbone, run: RunSpec[Any]) -> engine.Objective:
        weight = run.settings.lmbda / 2  # 1 - cos is half of |t - h|^2
        return engine.PullToPrompt(self.texts(backbone, run), weight)


class ProGradSettings(RegularizedSettings):
    """Settings of ProGrad. The defaults are the official ones.

    Attributes:
        init: "template": the words before the class name in the hand-written prompt, behind vectors of zeros; or as
            CoOp's.
        lmbda: Share of the gradient against the hand-written prompt's that is removed.
    """

    init: str = Field("template", min_length=1)
    lmbda: Coefficient = 1.0

    @property
    def words(self) -> str | None:
        return None if self.init == "template" else super().words


class ProGradMethod(RegularizedMethod):
    """Cross-entropy, less the part of its gradient that runs against the gradient of the hand-written prompt's KL."""

    name = "prograd"
    title = "ProGrad"
    Settings = ProGradSettings
    TEMPLATES: ClassVar[Mapping[str, str]] = {
        "oxford_pets": "a type of pet, a photo of a {}.",
        "oxford_flowers": "a type of flower, a photo of a {}.",
        "fgvc_aircraft": "a type of aircraft, a photo of a {}.",
        "food101": "a type of food, a photo of {}.",
        "dtd": "a texture of {}.",
    }

    def objective(self, backbone: Backbone, run: RunSpec[Any]) -> engine.Objective:
        from fastcoop.methods.projected_gradient import ProjectedGradient  # it needs torch

        return ProjectedGradient(self.texts(backbone, run), run.settings.lmbda)

    def check(self, run: Run) -> None:
        super().check(run)
        if run.settings.init != "template" or run.has_learned:
            return
        words, tokens = self.start_words(run.model, run)
        length = layout_of(run.settings, run.model).context_length
        if len(tokens) > length:
            raise UserError(
                f'The words "{words}", which the contexts of prograd start from, are {len(tokens)} tokens, but there '
                f"are {length} context vectors; give a context_length of at least {len(tokens)}, or init: random."
            )

    def trainer(self, settings: Any) -> EngineTrainer:
        return EngineTrainer(settings.precision, gradients=2)

    def training(self, backbone: Backbone, run: Run) -> Any:
        training = super().training(backbone, run)
        if run.settings.init != "template":
            return training
        _, tokens = self.start_words(backbone, run)
        start = torch.zeros(training.layout.context_length, backbone.text.width, dtype=torch.float32)
        if tokens:
            start[-len(tokens) :] = backbone.text.token_embedding[tokens].detach().to("cpu", torch.float32)
        return replace(training, contexts=start.expand(training.contexts.shape))

    def start_words(self, backbone: Backbone, run: Run) -> tuple[str, list[int]]:
        """Return the words before the class name in the hand-written prompt, and their token ids."""
        (template,) = self.prompts(run.settings, run.data)
        words = template.partition("{}")[0].strip()
        return words, tokens_of(backbone, words) if words else []
