"""Tests run side by side, one thread each: two small torch programs on all cores only get in each other's way."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
