"""When the compiler setting is made, and that it is made for this very process."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

import marble_jax
from marble_jax import platform


def test_only_the_affected_releases_need_it():
    assert platform.needs_fusion_off("0.10.0") and platform.needs_fusion_off("0.10.2")
    assert not any(platform.needs_fusion_off(v) for v in ("0.9.2", "0.8.3", "0.100.0", "1.10.2"))


def test_the_flag_is_appended_once_and_keeps_what_was_there(monkeypatch):
    monkeypatch.setattr(platform, "jaxlib_version", lambda: "0.10.2")
    environ = {"XLA_FLAGS": "--xla_a=1", "JAX_PLATFORMS": "cpu"}
    assert platform.prepare(environ)
    assert environ["XLA_FLAGS"] == "--xla_a=1 " + platform.FUSION_FLAG
    assert not platform.prepare(environ)
    chosen = {"XLA_FLAGS": platform.FUSION_FLAG + "LIBRARY_FUSION_TYPE_DOT"}
    assert not platform.prepare(chosen)


def test_other_releases_machines_without_jaxlib_and_tpus_are_left_alone(monkeypatch):
    environ = {}
    for version in ("0.9.2", ""):
        monkeypatch.setattr(platform, "jaxlib_version", lambda version=version: version)
        assert not platform.prepare(environ)
    monkeypatch.setattr(platform, "jaxlib_version", lambda: "0.10.2")
    monkeypatch.setattr(platform.importlib.util, "find_spec", lambda name: object())
    assert not platform.prepare(environ) and environ == {}
    monkeypatch.setattr(
        platform.importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None
    )
    monkeypatch.setattr(platform, "has_tpu_chips", lambda: True)
    assert not platform.prepare(environ) and environ == {}
    assert platform.prepare({"JAX_PLATFORMS": "cpu"})


def test_importing_the_package_has_made_the_setting():
    version = importlib.metadata.version("jaxlib")
    assert platform.jaxlib_version() == version
    libtpu = (
        platform.importlib.util.find_spec("libtpu") and os.environ.get("JAX_PLATFORMS") != "cpu"
    )
    assert marble_jax.__version__
    assert (
        (platform.FUSION_FLAG in os.environ.get("XLA_FLAGS", ""))
        or not platform.needs_fusion_off(version)
        or libtpu
    )


def test_libtpu_as_a_compiler_alone():
    environ = {
        "XLA_FLAGS": f"--xla_a=1 {platform.FUSION_FLAG}",
        "TPU_WORKER_HOSTNAMES": "here",
        "JAX_PLATFORMS": "tpu",
    }
    platform.compile_elsewhere(environ)
    assert environ["XLA_FLAGS"] == "--xla_a=1" and environ["JAX_PLATFORMS"] == "cpu"
    assert environ["TPU_SKIP_MDS_QUERY"] == "1" and environ["TPU_WORKER_HOSTNAMES"] == "here"


@pytest.mark.parametrize("platforms", [None, "", "tpu,cpu"])
def test_without_a_tpu_the_fall_back_is_asked_for(monkeypatch, platforms):
    monkeypatch.setattr(platform, "jaxlib_version", lambda: "0.10.2")
    monkeypatch.setattr(
        platform.importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None
    )
    monkeypatch.setattr(platform, "has_tpu_chips", lambda: False)
    environ = {} if platforms is None else {"JAX_PLATFORMS": platforms}
    assert platform.prepare(environ)
    assert environ == {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": platform.FUSION_FLAG}
    for mine in ({"JAX_PLATFORMS": "tpu"}, {"JAX_FORCE_TPU_INIT": "1"}):
        environ = dict(mine)
        assert not platform.prepare(environ) and environ == mine


def test_chips_are_told_from_a_network_card(tmp_path):
    for name, vendor, device in (("a", "0x1ae0", "0x0042"), ("b", "0x8086", "0x0063")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "device").write_text(f"{device}\n")
    assert not platform.has_tpu_chips(tmp_path)
    (tmp_path / "b" / "vendor").write_text("0x1ae0\n")
    assert platform.has_tpu_chips(tmp_path)


CHILD = """
import os, sys, warnings
os.environ.pop("XLA_FLAGS", None)
import jax
if sys.argv[1] == "used":
    jax.devices()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import marble_jax
from marble_jax import platform
from marble_jax.errors import InputError
lines = [str(w.message) for w in caught if "marble_jax" in str(w.message)]
try:
    platform.check_backend()
    print("right", len(lines))
except InputError as error:
    print("refused", len(lines), "\\n" in str(error), lines[0] == str(error))
"""


@pytest.mark.skipif(
    not platform.needs_fusion_off(platform.jaxlib_version()), reason="the release has no such fault"
)
@pytest.mark.parametrize("how, says", [("used", "refused 1 False True"), ("imported", "right 0")])
def test_jax_that_was_used_before_the_import_is_noticed(how, says):
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, how], capture_output=True, text=True, env=environ
    )
    assert done.stdout.strip() == says, done.stderr


CACHED = """
import os, pathlib, sys
import jax
import marble_jax
from marble_jax import platform
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
for folder in sys.argv[1:]:
    platform.keep_compilations(folder)
    jax.jit(lambda x: x + len(folder))(1.0)
    print(len(list(pathlib.Path(folder).glob("*"))) > 0)
"""


@pytest.mark.parametrize("own, kept", [(False, ["True", "True"]), (True, ["False", "False"])])
def test_compiled_programs_move_to_a_later_folder_unless_the_user_has_chosen_one(
    tmp_path, own, kept
):
    environ = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    if own:
        environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "own")
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    done = subprocess.run(
        [sys.executable, "-c", CACHED, *folders],
        capture_output=True,
        text=True,
        env=environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout.split() == kept, done.stderr[-1000:]


def test_cores_that_may_be_used():
    assert platform.usable_cores() == len(os.sched_getaffinity(0))
