"""Trains one network in two processes of one thread each, which share their gradients once a step.

Between the small layers of these networks two threads of one process would spend much of their time waiting for each
other, all the more on a machine that does something else as well.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

COUNT = 2


def launch(work: Callable[[int, Any], None], args: Any) -> None:
    """Runs `work(rank, args)` in COUNT processes and waits for them."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_start, (work, args, os.path.join(folder, "store")), COUNT)


def _start(rank: int, work: Callable[[int, Any], None], args: Any, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=COUNT)
    work(rank, args)
    # Nobody leaves before all have what they need.
    dist.barrier()
    dist.destroy_process_group()


def share_gradients(parameters: Iterable[nn.Parameter], *numbers: float) -> list[float]:
    """Sets every gradient to its mean over the processes; returns the means of `numbers`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor(numbers)])
    dist.all_reduce(flat)
    flat /= COUNT
    parts = flat.split([*(g.numel() for g in gradients), len(numbers)])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))
    return parts[-1].tolist()
