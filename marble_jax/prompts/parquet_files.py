"""Prompts in a column of a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from marble_jax.errors import InputError, nearest, one_line
from marble_jax.prompts.geneval_metadata import short
from marble_jax.prompts.structured import KEYS, Record

MOST_ROWS = 10_000_000
"""Of a file; a set of prompts has a million at most."""


def parquet_records(path: Path, column: str = "") -> Iterator[Record]:
    """Yields the prompts of a column, with the number of their row; other columns are not read.

    Args:
      path: the file.
      column: name of the column; without one "prompt", "text" or "caption", whichever is there first.

    Raises:
      InputError: pyarrow is not there, no Parquet file, no such column, or one that is not of texts. The message does
        not name the file.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(
            "expected the package pyarrow for Parquet files; received none (pip install 'marble-jax[parquet]')"
        ) from error
    try:
        file = parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise InputError(f"expected a Parquet file; received {one_line(error, 120)}") from error
    with file:
        if file.metadata.num_rows > MOST_ROWS:
            raise InputError(
                f"expected at most {MOST_ROWS} rows; received {file.metadata.num_rows}"
            )
        chosen = _column(file.schema_arrow.names, column)
        number = 0
        try:
            for batch in file.iter_batches(columns=[chosen]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise InputError(
                            f"row {number}: expected a text in {chosen!r}; received {short(text)}"
                        )
                    yield number, text, {}
        # Damaged pages are an error of the file to pyarrow, and so is text that is no UTF-8 to Python.
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"expected a whole Parquet file; received an error behind row {number}: "
                f"{one_line(error, 120)}"
            ) from error


def _column(names: list[str], wanted: str) -> str:
    """The column that prompts are in."""
    if wanted:
        if wanted not in names:
            raise InputError(
                f"expected a column {wanted!r}; received {short(', '.join(names))}{nearest(wanted, names)}"
            )
        _check_once(names, wanted)
        return wanted
    by_lower = {name.lower(): name for name in reversed(names)}
    for key in KEYS:
        if key in by_lower:
            _check_once(names, by_lower[key])
            return by_lower[key]
    raise InputError(
        f"expected a column 'prompt' (or FILE#COLUMN); received {short(', '.join(names))}"
    )


def _check_once(names: list[str], column: str) -> None:
    """Raises InputError where two columns have the name that is asked for."""
    if names.count(column) > 1:
        raise InputError(
            f"expected one column {column!r}; received {names.count(column)} of that name"
        )
