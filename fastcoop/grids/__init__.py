"""From a grid file to the runs that it asks for."""

from fastcoop.grids.grid import Grid, read_grid

__all__ = ["Grid", "read_grid"]
