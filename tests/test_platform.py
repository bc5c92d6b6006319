"""When the compiler setting is made, and that it is made for this very process."""

import importlib.metadata
import os

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
