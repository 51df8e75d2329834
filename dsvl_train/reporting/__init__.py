"""Reporting: reads run folders and evaluation files, writes a self-contained HTML page. Imports nothing of the package but `config`."""

from dsvl_train.reporting.metrics import read_metrics
from dsvl_train.reporting.page import parse_evaluations, report
from dsvl_train.reporting.sweep_page import is_sweep, report_sweep

__all__ = ["is_sweep", "parse_evaluations", "read_metrics", "report", "report_sweep"]
