"""Methods on frozen image features. To add one, write a file and add the method to `ADAPTERS`."""

from __future__ import annotations

from typing import Any

from fastcoop.methods.adapters.base import Adapter
from fastcoop.methods.adapters.clap import CLAPMethod, ZeroShotLinearProbeMethod
from fastcoop.methods.adapters.clip_adapter import CLIPAdapterMethod
from fastcoop.methods.adapters.cross_modal import CrossModalMethod
from fastcoop.methods.adapters.gda import GDAMethod
from fastcoop.methods.adapters.lp_plus_plus import LPPlusPlusMethod
from fastcoop.methods.adapters.proker import ProKeRMethod
from fastcoop.methods.adapters.prolip import ProLIPMethod
from fastcoop.methods.adapters.task_res import TaskResMethod
from fastcoop.methods.adapters.tip_adapter import TipAdapterFMethod, TipAdapterMethod

ADAPTERS: tuple[Adapter[Any], ...] = (  # the fastest first
    *(GDAMethod(), TipAdapterMethod(), ProKeRMethod(), TipAdapterFMethod(), TaskResMethod()),
    *(CLIPAdapterMethod(), LPPlusPlusMethod(), ZeroShotLinearProbeMethod(), CLAPMethod()),
    *(ProLIPMethod(), CrossModalMethod()),
)
