"""Read grid files and plan their runs."""

from fastcoop.grids.grid import Grid, read_grid

__all__ = ["Grid", "read_grid"]
