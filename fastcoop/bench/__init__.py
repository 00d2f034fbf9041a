"""Measure the time of a training step, of the official code's method and of fastcoop in turn."""

from fastcoop.bench.benchmark import class_lists, random_backbone, run_bench
from fastcoop.bench.tables import Bench, table, write_bench

__all__ = ["Bench", "class_lists", "random_backbone", "run_bench", "table", "write_bench"]
