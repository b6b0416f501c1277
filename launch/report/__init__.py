"""The report of a run: one HTML file without network or script, and a summary for the terminal."""

from steppe.launch.report.page import write
from steppe.launch.report.terminal import summary

__all__ = ["summary", "write"]
