"""One self-contained HTML page about one run or several side by side."""

from bitwright.report.page import write_report

__all__ = ["write_report"]
