"""Several processes as one run: who they are, how they meet, talk and agree, and arrays that span them.

`from marble_jax import hosts` is the way in; with one process all of it is plain calls.
"""

from marble_jax.distributed.global_arrays import own_rows, put, row_owners, whole
from marble_jax.distributed.processes import (
    Agreed,
    alone,
    any_of,
    count,
    end_unless,
    exchange,
    first_of,
    from_first,
    index,
    is_first,
    joined,
    same,
    start_jax,
    together,
)

__all__ = [
    "Agreed",
    "alone",
    "any_of",
    "count",
    "end_unless",
    "exchange",
    "first_of",
    "from_first",
    "index",
    "is_first",
    "joined",
    "own_rows",
    "put",
    "row_owners",
    "same",
    "start_jax",
    "together",
    "whole",
]
