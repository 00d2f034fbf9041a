"""A finished classifier in one file: what a CLIP needs to tell these classes apart, and nothing of fastcoop."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fastcoop.backbones import Backbone, Preprocess
from fastcoop.backbones.precision import fresh_state
from fastcoop.errors import UserError, writing
from fastcoop.exchange.runs import LearnedRun, named_backbone
from fastcoop.features.images import RECIPES
from fastcoop.methods import unit
from fastcoop.results.parameters import write_arrays

FORMAT = "fastcoop classifier"
FORMAT_VERSION = "1"


@dataclass(frozen=True, eq=False)
class Classifier:
    """Attributes:
    class_names: in label order.
    text_features: float32 (classes, dim), of length 1.
    logit_scale: the factor on cosine similarities, already exponentiated.
    preprocess: how an image becomes what the image tower takes, by the recipe of its test-time crop.
    recipe: "current", which ``preprocess`` is all of; or "official-2021", which squashes to ``size``, enlarges by an
        eighth and crops the centre.
    backbone, backbone_digest: whose image features these are to be compared with.
    origin: where it comes from, by name: key, dataset, prompt settings.
    """

    class_names: tuple[str, ...]
    text_features: np.ndarray
    logit_scale: float
    preprocess: Preprocess
    backbone: str
    backbone_digest: str
    origin: dict[str, str]
    recipe: str = "current"

    def __post_init__(self) -> None:
        if not np.isfinite(self.text_features).all() or not np.isfinite(self.logit_scale):
            raise UserError(
                "The classifier's text features or its scale are not finite numbers, so it cannot tell classes apart: "
                "the run diverged; choose another run."
            )

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Softmax probabilities float32 (images, classes) of image features (images, dim), of any length; NaN for
        features that are not finite, or zero."""
        logits = self.logit_scale * unit(features.astype(np.float32)) @ self.text_features.T
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
        return probabilities

    def load_backbone(self, spec: str | None = None, device: str = "cpu") -> Backbone:
        """The backbone whose image features this classifies, by ``spec`` or else by its name.

        Raises UserError if there is none of this name, or its weights are others.
        """
        backbone = named_backbone(spec, self.backbone, "the classifier was made for", device)
        self.check(backbone)
        return backbone

    def check(self, backbone: Backbone) -> None:
        """Raises UserError for a backbone other than the classifier's."""
        if backbone.digest != self.backbone_digest:
            raise UserError(
                f"The classifier was made for {self.backbone} ({self.backbone_digest[:12]}), not for "
                f"{backbone.name} ({backbone.digest[:12]}); name that backbone with --backbone."
            )

    def save(self, path: str | Path) -> None:
        """Write tensors ``text_features`` and ``logit_scale``, the rest as JSON in the header, to one safetensors
        file. Raises UserError where the disk refuses."""
        arrays = {
            "text_features": self.text_features.astype(np.float32),
            "logit_scale": np.array(self.logit_scale, dtype=np.float32),
        }
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "class_names": json.dumps(list(self.class_names)),
            "preprocess": json.dumps(asdict(self.preprocess)),
            "backbone": self.backbone,
            "backbone_digest": self.backbone_digest,
            "origin": json.dumps(self.origin),
            "recipe": self.recipe,
        }
        with writing(Path(path)):
            write_arrays(Path(path), arrays, header)

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Read what ``save`` wrote. Raises UserError if the file is missing, damaged, or something else."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise UserError(f"There is no classifier {path}; make one with `fastcoop export`.")
        try:
            with safe_open(path, "np") as file:
                header = file.metadata() or {}
                if (header.get("format"), header.get("format_version")) != (FORMAT, FORMAT_VERSION):
                    raise ValueError("its header does not say that it is one")
                names, origin = json.loads(header["class_names"]), json.loads(header["origin"])
                facts = json.loads(header["preprocess"])
                facts |= {name: tuple(facts[name]) for name in ("mean", "std")}
                texts = file.get_tensor("text_features")
                if texts.ndim != 2 or len(texts) != len(names):
                    raise ValueError(f"{len(names)} class names for text features {texts.shape}")
                scale = float(file.get_tensor("logit_scale"))
                recipe = header.get("recipe", "current")
                if recipe not in RECIPES:
                    raise ValueError(f'there is no recipe "{recipe}"')
                return cls(
                    tuple(names), texts, scale, Preprocess(**facts), header["backbone"], header["backbone_digest"],
                    origin, recipe,
                )  # fmt: skip
        except UserError:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} should be a classifier of `fastcoop export --format classifier` but is not ({error})."
            ) from None


@fresh_state()
def make_classifier(run: LearnedRun, backbone: Backbone) -> Classifier:
    """The classifier that a run's contexts make over the backbone that it learned over."""
    import torch

    from fastcoop.engine import encode_prompts

    item = (run.class_names, run.layout(backbone), torch.from_numpy(run.contexts))
    with torch.no_grad():
        texts = encode_prompts(backbone, [item])[0].float().cpu().numpy()
    names = ("key", "dataset", "shots", "seed", "epochs", "settings")
    origin = {name: value for name, value in run.metadata().items() if name in names}
    return Classifier(
        class_names=run.class_names,
        text_features=unit(texts),
        logit_scale=backbone.logit_scale,
        preprocess=backbone.preprocess,
        backbone=run.backbone,
        backbone_digest=run.backbone_digest,
        origin=origin,
        recipe=run.recipe,
    )
