"""Settings of the XLA compiler that have to be in place before JAX opens a backend.

One setting so far. jaxlib 0.10.2 fuses matrix products on the CPU in a way that makes `jit(vmap(vjp))` return wrong
cotangents for every index but the first, silently, once the network is large enough (128 tokens of width 256 with
attention, MLP and LoRA already are). Per-sample gradients are built on exactly that composition, so the fusion is
switched off for the affected releases. `tests/harmonize/test_compiler_trap.py` fails when the setting is lost.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import MutableMapping

FUSION_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
"""The flag with an empty value: no fusion of this kind."""
AFFECTED = ("0.10.",)
"""Beginnings of the affected versions; other releases need not know the flag."""
# The accelerator type only silences a warning: slices of other chips compile under it.
_LIBTPU_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def needs_fusion_off(version: str) -> bool:
    """Whether a jaxlib release has the faulty fusion in its CPU backend (and knows the flag that disables it)."""
    return version.startswith(AFFECTED)


def jaxlib_version() -> str:
    """Returns the version of the installed jaxlib, "" where there is none."""
    # Its package alone loads in a third of the time that reading the metadata of distributions takes.
    try:
        import jaxlib
    except ImportError:
        return ""
    return jaxlib.__version__


def prepare(environ: MutableMapping[str, str] | None = None) -> bool:
    """Appends the fusion flag to `XLA_FLAGS` when the installed jaxlib needs it; calling it again changes nothing.

    XLA reads the variable when the first backend opens, so this has to run before any JAX computation, not
    necessarily before `import jax`. A value that the user set for this flag stays. Where libtpu is installed and the
    platform was not narrowed to the CPU nothing is set: libtpu parses the same variable with its own list of flags.

    Args:
      environ: the mapping to edit, `os.environ` when None.

    Returns:
      Whether `environ` was changed.
    """
    if environ is None:
        environ = os.environ
    version = jaxlib_version()
    flags = environ.get("XLA_FLAGS", "")
    if not needs_fusion_off(version) or FUSION_FLAG in flags:
        return False
    # libtpu reads the same variable, and this flag is not on its list.
    if _may_use_tpu(environ):
        return False
    environ["XLA_FLAGS"] = f"{flags} {FUSION_FLAG}".strip()
    return True


def _may_use_tpu(environ: MutableMapping[str, str]) -> bool:
    """Whether JAX would load libtpu: it is installed and the platform was not narrowed to the CPU."""
    if importlib.util.find_spec("libtpu") is None:
        return False
    return environ.get("JAX_PLATFORMS", "") != "cpu"


def compile_elsewhere(environ: MutableMapping[str, str] | None = None) -> None:
    """Keeps JAX on the CPU and lets libtpu be loaded as nothing but a compiler, on a machine without a TPU.

    Has to run before JAX is imported. Left alone, libtpu asks the cloud's metadata server what machine this is, for
    half a minute, and complains; and it refuses the CPU's fusion flag, which a process that computes nothing can do
    without.

    Args:
      environ: the mapping to edit, `os.environ` when None.
    """
    if environ is None:
        environ = os.environ
    environ["JAX_PLATFORMS"] = "cpu"
    for name, value in _LIBTPU_ALONE.items():
        # What the user or a cluster has set describes the machine better than these defaults.
        environ.setdefault(name, value)
    flags = environ.get("XLA_FLAGS", "")
    if FUSION_FLAG in flags:
        environ["XLA_FLAGS"] = flags.replace(FUSION_FLAG, "").strip()


def keep_compilations(directory: str = "") -> None:
    """Keeps compiled programs on disk, so that the second run of a configuration starts at once.

    Args:
      directory: where; `~/.cache/marble_jax/xla` by default. JAX's own setting (`JAX_COMPILATION_CACHE_DIR`) wins.
    """
    # Inside the function: `prepare` has to run before JAX opens a backend, and this module is
    # imported for it.
    import jax

    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX adds its options at run time
    if chosen:
        return
    if not directory:
        directory = os.path.expanduser("~/.cache/marble_jax/xla")
    jax.config.update("jax_compilation_cache_dir", directory)
