"""open_clip, imported when it is first used: with all that it imports, that takes seconds."""

from __future__ import annotations

import sys
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from fastcoop.memo import Late

open_clip: Any = Late(partial(import_module, "open_clip"))


def open_clip_part(name: str) -> Any:
    """Return one of open_clip's modules that needs no other, by itself where the package is not imported yet."""
    return import_module(f"open_clip.{name}") if "open_clip" in sys.modules else _alone(name)


@cache
def _alone(name: str) -> ModuleType:
    package = find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    spec = spec_from_file_location(f"{__name__}.{name}", Path(package.origin).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
