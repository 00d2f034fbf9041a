"""Hooks of mkdocs: copy the demo's figure from the reports, and leave absent pages out of the navigation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

FIGURES = {"figures/demo.png": "reports/demo/figure3.png", "figures/bench.png": "reports/bench/bench.png"}


def on_config(config: Any) -> Any:
    """Leave pages out of the navigation that do not exist."""
    config.nav = _present(config.nav, Path(config.docs_dir))
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the figures, which lie where the commands wrote them."""
    root = Path(config.config_file_path).parent
    for name, path in FIGURES.items():
        files.append(File.generated(config, name, abs_src_path=str(root / path)))
    return files


def _present(entry: Any, docs: Path) -> Any:
    if isinstance(entry, str):
        return entry if (docs / entry).is_file() else None
    if isinstance(entry, list):
        return [kept for kept in (_present(one, docs) for one in entry) if kept]
    kept = {title: _present(inner, docs) for title, inner in entry.items()}
    return {title: inner for title, inner in kept.items() if inner}
