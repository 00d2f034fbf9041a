"""Reports: the paper's figures and tables, its claims as checks, and one standalone page, from a results
folder."""

from fastcoop.reports.report import report

__all__ = ["report"]
