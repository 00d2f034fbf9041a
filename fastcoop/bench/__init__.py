"""How fast training is: the official way and fastcoop's, side by side in one process per dataset."""

from fastcoop.bench.names import class_lists
from fastcoop.bench.run import Bench, run_bench
from fastcoop.bench.show import projection, table, write_bench

__all__ = ["Bench", "class_lists", "projection", "run_bench", "table", "write_bench"]
