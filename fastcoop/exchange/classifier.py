"""A finished classifier in one file: all that a CLIP model needs to classify images, and nothing of fastcoop."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastcoop.backbones import Backbone, Preprocess, backbone_from_spec
from fastcoop.backbones.precision import fresh_state
from fastcoop.errors import MissingFile, UserError, writing
from fastcoop.features.images import RECIPES
from fastcoop.methods import unit
from fastcoop.results.parameters import write_arrays

if TYPE_CHECKING:
    from fastcoop.exchange.runs import LearnedRun

FORMAT = {"format": "fastcoop classifier", "format_version": "1"}


@dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier of image features by cosine similarity to class features.

    Attributes:
        class_names: in label order.
        text_features: float32 (classes, dim), of length 1.
        logit_scale: factor of the cosine similarities, already exponentiated.
        preprocess: how images are prepared for the image tower.
        backbone, backbone_digest: the model whose image features are classified.
        origin: the run that it was made from, as text by name: key, dataset, settings.
        recipe: "current", or "official-2021", whose test-time crop squashes images to ``preprocess.size``, enlarges
            them by an eighth and crops the center.
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
                "The classifier's text features or its scale are not finite: the run diverged; choose another run."
            )

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return class probabilities.

        Args:
            features: image features (images, dim), of any length.

        Returns:
            float32 (images, classes); NaN for features that are zero or not finite.
        """
        logits = self.logit_scale * unit(features.astype(np.float32)) @ self.text_features.T
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
        return probabilities

    def load_backbone(self, spec: str | None = None, device: str = "cpu") -> Backbone:
        """Load the backbone whose image features this classifies.

        Args:
            spec: a tag, a folder or a weights file; None: the backbone of the recorded name.
            device: of the towers.

        Raises:
            UserError: there is no such backbone, or its weights differ.
        """
        return load_recorded_backbone(
            spec, self.backbone, self.backbone_digest, "the classifier was made for", device
        )

    def check(self, backbone: Backbone) -> None:
        """Raise UserError for a backbone other than the classifier's."""
        _check_backbone(backbone, self.backbone, self.backbone_digest, "the classifier was made for")

    def save(self, path: str | Path) -> None:
        """Write ``text_features`` and ``logit_scale`` to a safetensors file, with the rest as JSON in its header.

        Raises:
            UserError: the file cannot be written.
        """
        arrays = {
            "text_features": self.text_features.astype(np.float32),
            "logit_scale": np.array(self.logit_scale, dtype=np.float32),
        }
        header = FORMAT | {
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
        """Read a file that `save` wrote.

        Raises:
            UserError: the file is missing, damaged, or something else.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise MissingFile(f"There is no classifier {path}; make one with `fastcoop export`.")
        try:
            with safe_open(path, "np") as file:
                header = file.metadata() or {}
                if not FORMAT.items() <= header.items():
                    raise ValueError("its header names another format")
                texts, scale = file.get_tensor("text_features"), float(file.get_tensor("logit_scale"))
            names, preprocess = json.loads(header["class_names"]), json.loads(header["preprocess"])
            if texts.ndim != 2 or len(texts) != len(names):
                raise ValueError(f"{len(names)} class names for text features {texts.shape}")
            if (recipe := header.get("recipe", "current")) not in RECIPES:
                raise ValueError(f'there is no recipe "{recipe}"')
            preprocess |= {name: tuple(preprocess[name]) for name in ("mean", "std")}
            return cls(
                tuple(names), texts, scale, Preprocess(**preprocess), header["backbone"], header["backbone_digest"],
                json.loads(header["origin"]), recipe,
            )  # fmt: skip
        except UserError:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} should be a classifier of `fastcoop export --format classifier` but is not ({error})."
            ) from None


@fresh_state()
def make_classifier(run: LearnedRun, backbone: Backbone) -> Classifier:
    """Return the classifier of a run's contexts.

    Args:
        run: a run of `find_run`.
        backbone: the backbone that it learned over.
    """
    import torch

    from fastcoop.engine import encode_prompts

    item = (run.class_names, run.layout(backbone), torch.from_numpy(run.contexts))
    with torch.no_grad():
        texts = encode_prompts(backbone, [item])[0].float().cpu().numpy()
    names = ("key", "dataset", "shots", "seed", "epochs", "settings")
    return Classifier(
        class_names=run.class_names,
        text_features=unit(texts),
        logit_scale=backbone.logit_scale,
        preprocess=backbone.preprocess,
        backbone=run.backbone,
        backbone_digest=run.backbone_digest,
        origin={name: value for name, value in run.metadata().items() if name in names},
        recipe=run.recipe,
    )


def load_recorded_backbone(
    spec: str | None, name: str, digest: str, owner: str, device: str = "cpu"
) -> Backbone:
    """Load the backbone ``spec``, else the one called ``name``; ``owner`` introduces it in messages.

    Raises:
        UserError: there is none, or its digest is another.
    """
    try:
        backbone = backbone_from_spec(name if spec is None else spec, device=device)
    except UserError as error:
        if spec is not None:
            raise
        raise UserError(
            f"The backbone {name}, which {owner}, is not found by its name alone; pass its folder or weights with "
            f"--backbone. ({error})"
        ) from None
    _check_backbone(backbone, name, digest, owner)
    return backbone


def _check_backbone(backbone: Backbone, name: str, digest: str, owner: str) -> None:
    if backbone.digest != digest:
        raise UserError(
            f"The backbone {backbone.name} ({backbone.digest[:12]}) is not {name} ({digest[:12]}), which {owner}; name "
            "that backbone with --backbone."
        )
