"""A bucket that no cloud is needed for."""

from __future__ import annotations

import pytest
from etils.epath import backend

from marble_jax.storage.files import is_remote


@pytest.fixture(params=["gs", "s3"])
def bucket(request, monkeypatch):
    """An empty bucket that cannot be appended to, as Google's cannot."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = ("gcs", "gs", "s3")
        store, pseudo_dirs, cachable = {}, [""], False

        def __init__(self, finalize_on_close=True):
            super().__init__()

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + str(path).split("://")[-1].strip("/")

        def _open(self, path, mode="rb", **options):
            assert "a" not in mode, "objects cannot be appended to"
            return super()._open(path, mode, **options)

        def isdir(self, path):
            return path.rstrip("/").count("/") == 2 or super().isdir(path)  # the bucket itself

        def exists(self, path, **options):
            return path.rstrip("/").count("/") == 2 or super().exists(path, **options)

    place = Bucket()
    monkeypatch.setattr(
        backend._FileSystemSpecBackend,
        "fs",
        lambda self, path: place if is_remote(path) else fsspec.filesystem("file"),
    )
    return f"{request.param}://bucket"
