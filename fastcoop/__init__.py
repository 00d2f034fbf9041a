"""fastcoop: prompt learning for CLIP (CoOp), many runs at once, exactly.

import fastcoop as fc
backbone = fc.load_backbone("RN50", pretrained="openai")
encoder = fc.PromptEncoder(backbone, ["cat", "dog"], fc.PromptLayout(16, "end"))
weights = encoder(contexts)   # (runs, M, width) -> (runs, classes, dim), differentiable
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastcoop.backbones import load_backbone
    from fastcoop.engine import PromptEncoder, encode_prompts
    from fastcoop.prompts import PromptLayout

__all__ = ["PromptEncoder", "PromptLayout", "encode_prompts", "load_backbone"]

_HOME = {
    "load_backbone": "backbones",
    "PromptEncoder": "engine",
    "encode_prompts": "engine",
    "PromptLayout": "prompts",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``fastcoop --help`` need not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'fastcoop' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fastcoop.{_HOME[name]}"), name)
