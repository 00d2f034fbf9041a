"""A frozen CLIP: loaded through open_clip, fingerprinted, its image tower and its text tower."""

from fastcoop.backbones.backbone import Backbone, Preprocess
from fastcoop.backbones.load import backbone_from_spec, load_backbone
from fastcoop.backbones.text_tower import PlainTower, PromptPath, TextTower

__all__ = [
    "Backbone", "PlainTower", "Preprocess", "PromptPath", "TextTower", "backbone_from_spec", "load_backbone",
]  # fmt: skip
