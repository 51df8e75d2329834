"""Reporting: reads run folders and evaluation files, writes one self-contained HTML page. Imports nothing of the package but `config`."""

from dsvl_train.reporting.metrics import read_metrics
from dsvl_train.reporting.page import parse_evaluations, report

__all__ = ["parse_evaluations", "read_metrics", "report"]
