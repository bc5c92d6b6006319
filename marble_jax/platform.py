"""Settings of the XLA compiler that have to be in place before JAX opens a backend.

One setting so far. jaxlib 0.10.2 fuses matrix products on the CPU in a way that makes `jit(vmap(vjp))` return wrong
cotangents for every index but the first, silently, once the network is large enough (128 tokens of width 256 with
attention, MLP and LoRA already are). Per-sample gradients are built on exactly that composition, so the fusion is
switched off for the affected releases. `tests/harmonize/test_compiler_trap.py` fails when the setting is lost.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import MutableMapping

FUSION_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
AFFECTED = ("0.10.",)
# The accelerator type only silences a warning: slices of other chips compile under it.
_LIBTPU_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def needs_fusion_off(jaxlib_version: str) -> bool:
    """True for the jaxlib releases whose CPU backend has the faulty fusion (and knows the flag that disables it)."""
    return jaxlib_version.startswith(AFFECTED)


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
    environ = os.environ if environ is None else environ
    try:
        version = importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return False
    flags = environ.get("XLA_FLAGS", "")
    on_tpu = (
        importlib.util.find_spec("libtpu") is not None and environ.get("JAX_PLATFORMS", "") != "cpu"
    )
    if not needs_fusion_off(version) or FUSION_FLAG in flags or on_tpu:
        return False
    environ["XLA_FLAGS"] = f"{flags} {FUSION_FLAG}".strip()
    return True


def compile_elsewhere(environ: MutableMapping[str, str] | None = None) -> None:
    """Keeps JAX on the CPU and lets libtpu be loaded as nothing but a compiler, on a machine without a TPU.

    Has to run before JAX is imported. Left alone, libtpu asks the cloud's metadata server what machine this is, for
    half a minute, and complains; and it refuses the CPU's fusion flag, which a process that computes nothing can do
    without.

    Args:
      environ: the mapping to edit, `os.environ` when None.
    """
    environ = os.environ if environ is None else environ
    environ["JAX_PLATFORMS"] = "cpu"
    for name, value in _LIBTPU_ALONE.items():
        environ.setdefault(name, value)
    if FUSION_FLAG in environ.get("XLA_FLAGS", ""):
        environ["XLA_FLAGS"] = environ["XLA_FLAGS"].replace(FUSION_FLAG, "").strip()


def keep_compilations(directory: str = "") -> None:
    """Keeps compiled programs on disk, so that the second run of a configuration starts at once.

    Args:
      directory: where; `~/.cache/marble_jax/xla` by default. JAX's own setting (`JAX_COMPILATION_CACHE_DIR`) wins.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update(
            "jax_compilation_cache_dir", directory or os.path.expanduser("~/.cache/marble_jax/xla")
        )
