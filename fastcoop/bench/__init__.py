"""How fast training is: the official way and fastcoop's, side by side in one process."""

from fastcoop.bench.measure import Bench, run_bench
from fastcoop.bench.show import write_bench

__all__ = ["Bench", "run_bench", "write_bench"]
