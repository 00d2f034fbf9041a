"""open_clip, imported when it is first used: with all that it imports, that takes seconds."""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from fastcoop.memo import Late

PARTS = f"{__name__}.parts"  # a package of open_clip's files that does not import them all

open_clip: Any = Late(partial(import_module, "open_clip"))


def open_clip_part(name: str) -> Any:
    """Return one of open_clip's modules, imported alone where the package is not imported yet."""
    if "open_clip" in sys.modules:
        return import_module(f"open_clip.{name}")
    if PARTS not in sys.modules:
        package, spec = ModuleType(PARTS), find_spec("open_clip")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        package.__path__ = spec.submodule_search_locations
        sys.modules[PARTS] = package
    return import_module(f"{PARTS}.{name}")
