"""Settings of the XLA compiler that have to be in place before JAX opens a backend.

One setting so far. jaxlib 0.10.2 fuses matrix products on the CPU in a way that makes `jit(vmap(vjp))` return wrong
cotangents for every index but the first, silently, once the network is large enough (128 tokens of width 256 with
attention, MLP and LoRA already are). Per-sample gradients are built on exactly that composition, so the fusion is
switched off for the affected releases. `tests/harmonize/test_compiler_trap.py` fails when the setting is lost.

The setting has to be there before JAX opens a backend. Where JAX was used before this package was imported it comes too
late; that is noticed on import, and `check_backend` refuses to train on it.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import resource
import sys
import warnings
from collections.abc import MutableMapping

from marble_jax.errors import InputError

FUSION_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
"""The flag with an empty value: no fusion of this kind."""
AFFECTED = ("0.10.",)
"""Beginnings of the affected versions; other releases need not know the flag."""
# The accelerator type only silences a warning: slices of other chips compile under it.
_LIBTPU_ALONE = {
    # Compiling claims no chip, so two processes may do it at a time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


PCI_DEVICES = pathlib.Path("/sys/bus/pci/devices")
GOOGLE_PCI_VENDOR = "0x1ae0"
_GOOGLE_NETWORK_CARD = "0x0042"
"""PCI device of the network card of Google's virtual machines, which have the same vendor as its accelerators."""
_OTHER_PLUGINS = ("jax_plugins", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
"""Packages of other accelerators, any of which JAX may find here."""
_ONLY_BEFORE = "jax_cpu_get_local_topology_timeout_minutes"
"""A setting of JAX that it lets nobody change once a backend is open, and that a single process never reads."""
_too_late = False
_compilations = ""


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
    necessarily before `import jax`. A value that the user set for this flag stays. Where TPUs may compute nothing is
    set: libtpu parses the same variable with its own list of flags. Where libtpu is installed without a TPU, JAX is
    kept to the CPU that it would fall back to.

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
    if environ is os.environ and backend_is_open():
        _note_too_late()
    # libtpu reads the same variable, and this flag is not on its list.
    if _may_use_tpu(environ) and not _keep_libtpu_out(environ):
        return False
    environ["XLA_FLAGS"] = f"{flags} {FUSION_FLAG}".strip()
    return True


def backend_is_open() -> bool:
    """Returns whether JAX has opened a backend, after which the compiler's flags are not read again."""
    jax = sys.modules.get("jax")
    value = getattr(getattr(jax, "config", None), _ONLY_BEFORE, None)
    if jax is None or value is None:
        return False
    try:
        jax.config.update(_ONLY_BEFORE, value + 1)
    except RuntimeError:
        return True
    jax.config.update(_ONLY_BEFORE, value)
    return False


def _note_too_late() -> None:
    global _too_late
    _too_late = True
    if sys.modules["jax"].default_backend() == "cpu":
        warnings.warn(f"marble_jax: {_ADVICE}", RuntimeWarning, stacklevel=4)


_ADVICE = (
    "expected to be imported before JAX is used; received a process in which JAX has opened the CPU already, where "
    f"jaxlib {jaxlib_version()} gets gradients by sample wrong (import marble_jax first, or start the process with "
    f"XLA_FLAGS={FUSION_FLAG})"
)


def check_backend() -> None:
    """Makes sure that gradients by sample are right on the backend that JAX has opened, or opens now.

    Raises:
      InputError: it is the CPU of an affected release, whose faulty fusion could not be switched off.
    """
    import jax

    if not needs_fusion_off(jaxlib_version()) or jax.default_backend() != "cpu":
        return
    if _too_late:
        raise InputError(f"marble_jax: {_ADVICE}")
    if FUSION_FLAG not in os.environ.get("XLA_FLAGS", ""):
        raise InputError(
            "JAX: expected its CPU to be asked for, as JAX has fallen back to it beside libtpu and jaxlib "
            f"{jaxlib_version()} gets gradients by sample wrong there; received JAX_PLATFORMS="
            f"{os.environ.get('JAX_PLATFORMS', '')!r} (set JAX_PLATFORMS=cpu)"
        )


def _may_use_tpu(environ: MutableMapping[str, str]) -> bool:
    """Whether JAX would load libtpu: it is installed and the platform was not narrowed to others."""
    if importlib.util.find_spec("libtpu") is None:
        return False
    platforms = environ.get("JAX_PLATFORMS", "")
    return not platforms or "tpu" in platforms.split(",")


def _keep_libtpu_out(environ: MutableMapping[str, str]) -> bool:
    """Narrows JAX to the CPU on a machine without TPUs, where it would fall back to it; whether that was done."""
    if has_tpu_chips() or "JAX_FORCE_TPU_INIT" in environ:
        return False
    # Another accelerator may be what computes; then only `check_backend` can tell.
    if any(importlib.util.find_spec(name) for name in _OTHER_PLUGINS):
        return False
    if environ.get("JAX_PLATFORMS", "") not in ("", "tpu,cpu"):
        return False
    environ["JAX_PLATFORMS"] = "cpu"
    jax = sys.modules.get("jax")
    if environ is os.environ and jax is not None and not backend_is_open():
        # It has read the variable already.
        jax.config.update("jax_platforms", "cpu")
    return True


def has_tpu_chips(devices: pathlib.Path | None = None) -> bool:
    """Returns whether TPUs are on this machine's PCI bus; `devices` is where the system lists it."""
    for vendor in (devices or PCI_DEVICES).glob("*/vendor"):
        card = vendor.parent / "device"
        is_network = card.is_file() and card.read_text().strip() == _GOOGLE_NETWORK_CARD
        if vendor.read_text().strip() == GOOGLE_PCI_VENDOR and not is_network:
            return True
    return False


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


def usable_cores() -> int:
    """Returns the cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def host_threads(num_workers: int) -> int:
    """Returns the threads for rewards on the host, where 0 stands for as many as this process may use cores."""
    return num_workers or usable_cores()


def keep_compilations(directory: str = "") -> None:
    """Keeps compiled programs on disk, so that the second run of a configuration starts at once.

    Args:
      directory: where, also in a bucket; `~/.cache/marble_jax/xla` by default. A later call with another one counts
        from there on. JAX's own setting (`JAX_COMPILATION_CACHE_DIR`) wins over both.
    """
    global _compilations
    # Inside the function: `prepare` has to run before JAX opens a backend, and this module is
    # imported for it.
    import jax

    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX adds its options at run time
    if chosen and chosen != _compilations:
        return
    if not directory:
        directory = os.path.expanduser("~/.cache/marble_jax/xla")
    if directory == chosen:
        return
    jax.config.update("jax_compilation_cache_dir", directory)
    if chosen:
        from jax.experimental.compilation_cache import compilation_cache

        # JAX opens the folder once, at the first program.
        compilation_cache.reset_cache()
    _compilations = directory


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kilobytes.
    if sys.platform == "darwin":
        return peak
    return 1024 * peak
