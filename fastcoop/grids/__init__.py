"""Read grid files and plan their runs."""

from fastcoop.grids.block import Grid
from fastcoop.grids.grid import read_grid

__all__ = ["Grid", "read_grid"]
