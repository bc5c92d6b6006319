"""Several processes as one run: who they are, how they meet, talk and agree, and arrays that span them.

`from marble_jax import distributed` is the way in; with one process all of it is plain calls.
"""

from marble_jax.distributed.global_arrays import (
    device_put_global,
    local_rows,
    row_processes,
    to_host,
)
from marble_jax.distributed.processes import (
    AgreedError,
    any_process,
    assert_equal,
    broadcast_from_first,
    count,
    exchange,
    exit_unless_agreed,
    first_reason,
    index,
    is_first,
    is_single_process,
    process_group,
    run_on_all,
    start_jax,
)

__all__ = [
    "AgreedError",
    "is_single_process",
    "any_process",
    "count",
    "exit_unless_agreed",
    "exchange",
    "first_reason",
    "broadcast_from_first",
    "index",
    "is_first",
    "process_group",
    "local_rows",
    "device_put_global",
    "row_processes",
    "assert_equal",
    "start_jax",
    "run_on_all",
    "to_host",
]
