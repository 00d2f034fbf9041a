"""Time of a training step, by the official code's method and by fastcoop, measured side by side."""

from fastcoop.bench.benchmark import class_lists, random_backbone, run_bench
from fastcoop.bench.tables import Bench, projection, table, write_bench

__all__ = ["Bench", "class_lists", "projection", "random_backbone", "run_bench", "table", "write_bench"]
