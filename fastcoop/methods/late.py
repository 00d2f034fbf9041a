"""What methods use of torch, imported when it is first used: workers and dry runs import methods without it.

`torch` and `F`, its functional module, stand for these modules. The other names are for annotations.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastcoop import backbones
from fastcoop.memo import Late

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from fastcoop.backbones import Backbone
    from fastcoop.engine.runs import State
else:
    torch, F = (Late(cache(partial(import_module, name))) for name in ("torch", "torch.nn.functional"))
    Backbone = State = Tensor = Any


def fresh_state() -> AbstractContextManager[None]:
    """Return `fastcoop.backbones.precision.fresh_state`, in which results do not depend on a caller's settings."""
    return backbones.precision.fresh_state()


__all__ = ["Backbone", "F", "State", "Tensor", "fresh_state", "torch"]
