"""The report of a training run: one HTML file made from the records in its workdir.

Imports neither jax nor a plotting library.
"""

from marble_jax.report.findings import summarise
from marble_jax.report.page import write_report
from marble_jax.report.records import Records, read_records

__all__ = ["Records", "read_records", "summarise", "write_report"]
