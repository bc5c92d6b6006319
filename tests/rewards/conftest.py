"""Pictures of the synthetic world and stand-ins shared by the reward tests."""
import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def world():
    """tools/embedded/world.py as a module."""
    pytest.importorskip("matplotlib")
    path = Path(__file__).parents[2] / "tools" / "embedded" / "world.py"
    if not path.exists():
        pytest.skip("tools/embedded/world.py is not there")
    spec = importlib.util.spec_from_file_location("embedded_world", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["embedded_world"] = module
    spec.loader.exec_module(module)
    return module
