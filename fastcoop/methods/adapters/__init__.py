"""Methods on frozen image features. To add one, write a file and add the method to `ADAPTERS`."""

from __future__ import annotations

from typing import Any

from fastcoop.methods.adapters.base import Adapter
from fastcoop.methods.adapters.tip_adapter import TipAdapterFMethod, TipAdapterMethod

ADAPTERS: tuple[Adapter[Any], ...] = (TipAdapterMethod(), TipAdapterFMethod())  # the fastest first
