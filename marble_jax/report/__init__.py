"""HTML pages made from records: the report of a training run, and models side by side.

Imports neither jax nor a plotting library.
"""

from marble_jax.report.findings import summarise
from marble_jax.report.page import write_report
from marble_jax.report.reading import read_records
from marble_jax.report.records import Records
from marble_jax.report.side_by_side import write_comparison

__all__ = ["Records", "read_records", "summarise", "write_comparison", "write_report"]
