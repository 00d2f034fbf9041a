"""Reports: the paper's figures and tables, its claims as tests, and one page, from a results folder. Loads no torch."""

from fastcoop.reports.report import report

__all__ = ["report"]
