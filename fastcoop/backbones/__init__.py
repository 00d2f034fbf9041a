"""A frozen CLIP: loaded through open_clip, fingerprinted, its image tower and its text tower."""

from typing import TYPE_CHECKING

from fastcoop.memo import late_names

if TYPE_CHECKING:
    from fastcoop.backbones.backbone import Backbone, Preprocess
    from fastcoop.backbones.load import backbone_from_spec, load_backbone
    from fastcoop.backbones.planned import PromptPath
    from fastcoop.backbones.text_tower import PlainTower, TextTower
else:
    __getattr__ = late_names(__name__)

__all__ = [
    "Backbone", "PlainTower", "Preprocess", "PromptPath", "TextTower", "backbone_from_spec", "load_backbone",
]  # fmt: skip
