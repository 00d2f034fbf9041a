"""Time of a training step, by the official code's method and by fastcoop, measured side by side."""

from fastcoop.bench.benchmark import Bench, run_bench
from fastcoop.bench.inputs import class_lists
from fastcoop.bench.show import projection, table, write_bench

__all__ = ["Bench", "class_lists", "projection", "run_bench", "table", "write_bench"]
