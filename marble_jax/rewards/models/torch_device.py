"""The device that PyTorch's networks take beside JAX: the GPU that this process has, not the first of the machine."""

from __future__ import annotations

from typing import Any

from marble_jax import platform


def torch_device(torch: Any) -> str:
    """Returns PyTorch's name of the device that a network of this process should be on.

    With one process a GPU, as under SLURM, JAX takes one of the GPUs that CUDA shows and PyTorch, unless it is told,
    the first: all processes of a host would share that.

    Args:
      torch: the module, imported.

    Returns:
      "cuda:N" where JAX computes on the Nth of the GPUs that CUDA shows this process; "cuda", which is PyTorch's own
      choice, where JAX computes elsewhere or PyTorch does not see that GPU; "cpu" where PyTorch has none.
    """
    if not torch.cuda.is_available():
        return "cpu"
    number = _own_gpu()
    if number is None or number >= torch.cuda.device_count():
        return "cuda"
    return f"cuda:{number}"


def _own_gpu() -> int | None:
    """The number of JAX's first GPU of this process among those that CUDA shows; None without one."""
    # Asked for the first time, JAX would open a GPU, and most of its memory, in a process that may not want one.
    if not platform.backend_is_open():
        return None
    import jax

    if jax.default_backend() != "gpu":
        return None
    # Both libraries count what CUDA_VISIBLE_DEVICES leaves; JAX leaves its number alone where it takes one of several.
    return jax.local_devices()[0].local_hardware_id
