"""Bundle the library that draws the report's charts: ``python -m tools.vega``, after ``pip install vl-convert-python``.

Writes ``fastcoop/reports/vega.js.gz``: Vega, Vega-Lite and Vega-Embed with what they need, as vl-convert packs them.
The file is part of the package because packing takes two seconds, and vl-convert 84 MB.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import vl_convert

BUNDLE = Path("fastcoop/reports/vega.js.gz")


def main() -> None:
    """Write the bundle; the same version of vl-convert gives the same bytes."""
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    BUNDLE.write_bytes(gzip.compress(script.encode(), compresslevel=9, mtime=0))
    print(f"{BUNDLE}: Vega {vl_convert.get_vega_version()}, {len(script):,} characters")


if __name__ == "__main__":
    main()
