"""What methods use of torch, imported when it is first used: workers and dry runs import methods without it.

`torch`, `F` (its functional module) and `engine` stand for these modules. The other names are for annotations.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastcoop.memo import Late

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from fastcoop import engine
    from fastcoop.backbones import Backbone
    from fastcoop.engine.runs import State
    from fastcoop.prompts import PromptLayout
else:
    names = "torch", "torch.nn.functional", "fastcoop.engine"
    torch, F, engine = (Late(cache(partial(import_module, name))) for name in names)
    Backbone = PromptLayout = State = Tensor = Any


def fresh_state() -> AbstractContextManager[None]:
    """Return `fastcoop.backbones.precision.fresh_state`, in which results do not depend on a caller's settings."""
    from fastcoop.backbones import precision

    return precision.fresh_state()


__all__ = ["Backbone", "F", "PromptLayout", "State", "Tensor", "engine", "fresh_state", "torch"]
