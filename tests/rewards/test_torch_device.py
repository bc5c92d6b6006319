"""Where PyTorch's detector runs beside JAX, with stand-ins for both: no GPU is here."""

from __future__ import annotations

import types

import jax
import pytest

from marble_jax import platform
from marble_jax.rewards.models.torch_device import torch_device


def torch_with(gpus):
    """A PyTorch that sees so many GPUs."""
    cuda = types.SimpleNamespace(is_available=lambda: gpus > 0, device_count=lambda: gpus)
    return types.SimpleNamespace(cuda=cuda)


def jax_with(monkeypatch, backend, *numbers):
    """A JAX that has opened a backend with these devices of the host."""
    devices = [types.SimpleNamespace(local_hardware_id=number) for number in numbers]
    monkeypatch.setattr(platform, "backend_is_open", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: devices)


@pytest.mark.parametrize(
    ("backend", "numbers", "seen", "device"),
    [
        # Under SLURM every task sees all eight GPUs, and JAX takes one.
        ("gpu", [3], 8, "cuda:3"),
        ("gpu", [0], 8, "cuda:0"),
        # One process with all of them.
        ("gpu", [0, 1, 2, 3], 4, "cuda:0"),
        # CUDA_VISIBLE_DEVICES hides the others: both libraries count from 0.
        ("gpu", [0], 1, "cuda:0"),
        # PyTorch sees fewer than JAX names, or none, as a build for CPUs does.
        ("gpu", [3], 1, "cuda"),
        ("gpu", [3], 3, "cuda"),
        ("gpu", [3], 0, "cpu"),
        # A reward server with JAX on the CPU, and a host of TPUs.
        ("cpu", [0], 2, "cuda"),
        ("tpu", [2], 0, "cpu"),
    ],
)
def test_the_gpu_of_the_process_is_taken(monkeypatch, backend, numbers, seen, device):
    jax_with(monkeypatch, backend, *numbers)
    assert torch_device(torch_with(seen)) == device


def test_eight_tasks_of_a_host_have_eight_devices(monkeypatch):
    taken = set()
    for number in range(8):
        jax_with(monkeypatch, "gpu", number)
        taken.add(torch_device(torch_with(8)))
    assert len(taken) == 8


def test_jax_is_not_opened_for_the_question(monkeypatch):
    def opened():
        raise AssertionError("JAX was asked for its devices")

    monkeypatch.setattr(platform, "backend_is_open", lambda: False)
    monkeypatch.setattr(jax, "default_backend", opened)
    monkeypatch.setattr(jax, "local_devices", opened)
    assert torch_device(torch_with(8)) == "cuda"
