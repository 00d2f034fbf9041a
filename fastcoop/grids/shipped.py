"""The grid files that come with fastcoop: the paper's figures and tables, the demo's, one for one's own photographs."""

from __future__ import annotations

from pathlib import Path

import fastcoop


def shipped_grid(name: str | Path) -> Path | None:
    """The grid file that "fig3", "fig3.yaml" or "experiments/fig3.yaml" names, as installed with the package or beside
    it in a checkout; None where there is none."""
    asked, package = Path(name), Path(fastcoop.__path__[0])
    if asked.parent.name not in ("", "experiments") or asked.suffix not in ("", ".yaml"):
        return None
    places = (folder / "experiments" / f"{asked.stem}.yaml" for folder in (package, package.parent))
    return next((place for place in places if place.is_file()), None)
