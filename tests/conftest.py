"""Environment of the tests: CPU unless asked otherwise, exact float32 products, compiled programs kept between runs.

Most of the time goes into compiling programs that run once or twice, so LLVM is spared most of its work; a file marked
`optimized` compiles as users do.
"""

import ctypes
import gc
import importlib
import importlib.util
import os
import pathlib
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
_CACHE = (
    pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    / "marble_jax"
    / "compiled"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
_HASTE = "JAX_DISABLE_MOST_OPTIMIZATIONS"
_HASTE_ASKED_FOR = os.environ.setdefault(_HASTE, "1")

MOST_BYTES = 4 << 30
"""Memory of a process from which on compiled programs are given up."""


def pytest_addoption(parser):
    parser.addoption(
        "--check-shapes",
        action="store_true",
        help="check the shapes in signatures of the mathematics at every call",
    )


DEAREST = (
    "api/test_notebook.py",
    "training/test_devices.py",
    "training/test_several_processes.py",
    "families/test_flux1_run.py",
    "cli/test_train.py",
    "convert/test_flux1_lora.py",
    "families/test_wan_run.py",
    "rewards/test_reward_devices.py",
    "plan/test_hlo_costs.py",
    "families/test_flux1_scaling.py",
)
"""Files that take a minute or more, few tests each: begun first, as the one begun last keeps one process alone."""


def pytest_collection_modifyitems(items):
    def place(item):
        """Number of an item's file among the dearest; the others come behind them, in their order."""
        path = item.path.as_posix()
        for number, file in enumerate(DEAREST):
            if path.endswith(f"tests/{file}"):
                return number
        # One behind another: where the way of compiling changes, all programs that are there are given up.
        if item.get_closest_marker("optimized") is not None:
            return len(DEAREST)
        return len(DEAREST) + 1

    items.sort(key=place)


def pytest_configure(config):
    # pytest-xdist would begin with the files of most tests, which are quick.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    # Tracing makes many objects that live on, which Python would look through again and again.
    gc.set_threshold(100_000, 50, 100)
    if config.getoption("--check-shapes"):
        # Before anything of the package is imported.
        importlib.import_module("shape_checks").install()


def _resident_bytes():
    """Memory of this process; 0 where the system does not say."""
    statistics = pathlib.Path("/proc/self/statm")
    if not statistics.exists():
        return 0
    return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_do_not_pile_up():
    """Gives up compiled programs between files once they fill memory: a whole run has thousands, and two processes."""
    yield
    if _resident_bytes() > MOST_BYTES:
        importlib.import_module("jax").clear_caches()
        gc.collect()
        # The C library keeps what was freed unless it is told.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@pytest.fixture(scope="module", autouse=True)
def programs_as_users_compile_them(request):
    """Compiles a file marked `optimized`, or `gpu`, as users do, in processes that it starts, too."""
    marks = {mark.name for mark in request.node.iter_markers()}
    haste = "0" if marks & {"optimized", "gpu"} else _HASTE_ASKED_FOR
    # Left as it is behind a file: the next one may be compiled alike.
    if os.environ[_HASTE] != haste:
        _compile(importlib.import_module("jax"), haste)


def _compile(jax, haste):
    """Says how programs are compiled from here on, those that are there already as well."""
    jax.clear_caches()
    os.environ[_HASTE] = haste
    jax.config.update(_HASTE.lower(), haste != "0")


@pytest.fixture(scope="session")
def world():
    """tools/embedded/world.py as a module."""
    pytest.importorskip("matplotlib")
    path = pathlib.Path(__file__).parents[1] / "tools" / "embedded" / "world.py"
    if not path.exists():
        pytest.skip("tools/embedded/world.py is not there")
    spec = importlib.util.spec_from_file_location("embedded_world", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["embedded_world"] = module
    spec.loader.exec_module(module)
    return module
