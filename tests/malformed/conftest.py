"""No case of the corpus may hang; on a quiet machine each takes a second at most."""

import signal
import sys
from pathlib import Path

import pytest

from marble_jax import platform

# The made-up run lies with the tests of its report.
sys.path.append(str(Path(__file__).parents[1] / "report"))
SECONDS = 300


class Hangs(BaseException):
    """Raised in the middle of a case that takes far too long; no `except Exception` of the package stops it."""


@pytest.fixture(autouse=True)
def environment_stays(monkeypatch):
    """`plan --topology` prepares its process for another compiler; this one has more tests to run."""
    monkeypatch.setattr(platform, "compile_elsewhere", lambda: None)


@pytest.fixture(autouse=True)
def time_limit():
    """Ends a case that hangs."""

    def late(*_):
        raise Hangs(f"still busy after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
