"""No case of the corpus may take longer than a minute."""

import signal
import sys
from pathlib import Path

import pytest

# The made-up run lies with the tests of its report.
sys.path.append(str(Path(__file__).parents[1] / "report"))

SECONDS = 60


@pytest.fixture(autouse=True)
def time_limit():
    """Raises in the middle of a case that hangs."""

    def late(*_):
        raise TimeoutError(f"still busy after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
