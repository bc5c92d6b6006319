"""Text embeddings kept in memory and on disk: the encoders' own values, keyed by content, and no encoder when full."""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.families import embedding_cache as module
from marble_jax.families.base import TextEncoders
from marble_jax.families.embedding_cache import EmbeddingCache
from marble_jax.families.sd3.family import FAMILY
from marble_jax.weights import content_hash

EMBEDDED = Path(str(importlib.resources.files("marble_jax") / "embedded" / "pipeline"))
TEXTS = ["a cat", "two dogs", "", "a cat", "fog"]


class Encoders(TextEncoders):
    """Encoders whose values spell the text; counts the texts they were asked for."""

    prompt_batch = 2

    def __init__(self, dtype=jnp.float32):
        self.dtype, self.seen = dtype, []

    def encode(self, texts, length):
        self.seen += texts
        rows = np.array([[ord(c) for c in t[:3].ljust(3)] for t in texts], np.float32) / 7
        embeds = np.repeat(rows[:, None], length, axis=1)
        return {
            "embeds": jnp.asarray(embeds, self.dtype),
            "pooled": jnp.asarray(rows[:, :2], self.dtype),
        }


@pytest.fixture
def model(tmp_path):
    """The small files of a model: enough to tell one from another."""
    root = tmp_path / "model"
    for name in (
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    ):
        (root / name).mkdir(parents=True)
        (root / name / "file").write_text(name)
    shutil.copy(EMBEDDED / "model_index.json", root)
    return root


def made(root, encoders, cache="", length=4, dtype=jnp.float32, **options):
    return EmbeddingCache(
        FAMILY, root, length, dtype, folder=cache, load=lambda: encoders, **options
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_are_those_of_the_encoders_bit_for_bit(model, tmp_path, dtype):
    encoders = Encoders(dtype)
    want = encoders.encode(TEXTS, 4)
    for cache in ("", tmp_path / "cache"):
        for _ in range(2):  # the second time from disk
            got = made(model, encoders, cache, dtype=dtype)(TEXTS)
            assert got["embeds"].dtype == got["pooled"].dtype == dtype
            assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), got, want))


class PaddedEncoders(Encoders):
    """As Wan's: rows beyond the text are zeros, of which there are many."""

    def encode(self, texts, length):
        cond = super().encode(texts, length)
        beyond = np.arange(length) >= np.array([[len(text.split())] for text in texts])
        return cond | {"embeds": jnp.where(beyond[..., None], 0, cond["embeds"])}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_zeros_take_no_room_and_come_back(model, tmp_path, dtype):
    encoders = PaddedEncoders(dtype)
    want = encoders.encode(TEXTS, 512)
    assert not np.any(want["embeds"][2])
    for cache in ("", tmp_path / "cache"):
        for _ in range(2):  # the second time from disk
            got = made(model, encoders, cache, length=512, dtype=dtype)(TEXTS)
            assert got["embeds"].shape == (5, 512, 3) and got["embeds"].dtype == dtype
            assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), got, want))
    # Two rows of three numbers, the pooled ones and what a file is made of.
    files = list((tmp_path / "cache").glob("*/*.npz"))
    assert len(files) == 4 and all(file.stat().st_size < 1000 for file in files)


def test_every_text_is_encoded_once(model):
    encoders = Encoders()
    cond = made(model, encoders)
    for texts in (TEXTS, TEXTS[::-1], ["fog", "a bird"]):
        cond(texts)
    assert sorted(encoders.seen) == ["", "a bird", "a cat", "fog", "two dogs"]


def test_after_fill_no_encoder_is_needed(model, tmp_path):
    encoders, done = Encoders(), []
    cond = made(model, encoders, tmp_path / "cache")
    assert len(cond.missing(TEXTS)) == 4 and cond.fill(TEXTS, done.append) == 4
    assert sum(done) == 4 and not cond.loaded and cond.missing(TEXTS) == []

    def forbidden():
        pytest.fail("the encoders were loaded")

    later = EmbeddingCache(FAMILY, model, 4, jnp.float32, folder=tmp_path / "cache", load=forbidden)
    assert later.fill(TEXTS) == 0
    np.testing.assert_array_equal(later(TEXTS)["embeds"], encoders.encode(TEXTS, 4)["embeds"])


def test_texts_that_are_cut_are_told_without_loading_an_encoder():
    """A word of the shipped vocabularies is a token; CLIP has two at the ends, 14 in all, and T5 one of 6."""
    root = EMBEDDED
    five, six, twelve, thirteen = (" ".join(["red"] * count) for count in (5, 6, 12, 13))
    refuse = lambda: pytest.fail("an encoder was loaded")  # noqa: E731
    cache = EmbeddingCache(FAMILY, root, 6, jnp.float32, load=refuse)
    found = {}
    for limit, longer in cache.cut([five, six, twelve, thirteen]):
        found[limit.encoder, limit.tokens] = longer
    assert found == {("CLIP", 14): [thirteen], ("T5", 6): [six, twelve, thirteen]}
    without = EmbeddingCache(FAMILY, root, 6, jnp.float32, omit=("text_encoder_3",), load=refuse)
    assert [limit.encoder for limit, _ in without.cut([twelve, thirteen])] == ["CLIP"]


def test_a_killed_fill_goes_on(model, tmp_path):
    class Killed(Exception):
        pass

    encoders, cache = Encoders(), tmp_path / "cache"

    def stop(count):
        raise Killed

    with pytest.raises(Killed):
        made(model, encoders, cache).fill(TEXTS, stop)
    (next(cache.glob("*/*.npz")).parent / ".half.npz.1.partial").write_bytes(b"PK")
    again = made(model, encoders, cache)
    assert (
        len(again.missing(TEXTS)) == 2
        and again.fill(TEXTS) == 2
        and sorted(encoders.seen) == sorted(set(TEXTS))
    )


def test_another_model_length_dtype_or_t5_is_another_entry(model, tmp_path):
    cache = tmp_path / "cache"
    made(model, Encoders(), cache).fill(["a cat"])
    other = shutil.copytree(model, tmp_path / "other")
    assert made(other, Encoders(), cache).missing(["a cat"]) == []  # the same contents elsewhere
    for options in ({"length": 5}, {"dtype": jnp.bfloat16}, {"omit": ("text_encoder_3",)}):
        assert made(model, Encoders(), cache, **options).missing(["a cat"]) == ["a cat"]
    (other / "tokenizer_2" / "file").write_text("another")
    assert made(other, Encoders(), cache).missing(["a cat"]) == ["a cat"]
    (model / "vae").mkdir()
    (model / "vae" / "file").write_text("no matter")
    assert made(model, Encoders(), cache).missing(["a cat"]) == []


def identity(root, omit=(), known=None):
    return content_hash.content_hash(root, FAMILY.text_components(root, omit), known)


def test_hashes_are_kept_and_noticed_when_stale(model, monkeypatch):
    first, hashes = identity(model)
    monkeypatch.setattr(
        content_hash.hashlib, "file_digest", lambda *a: pytest.fail("a known file was read")
    )
    assert identity(model, known=hashes) == (first, hashes)
    monkeypatch.undo()
    (model / "text_encoder_3" / "file").write_text("longer than before")
    assert identity(model, known=hashes)[0] != first
    assert identity(model, ("text_encoder_3",), hashes)[0] != first


def test_another_file_of_the_same_size_and_time_is_noticed(model):
    """As `cp -p`, `tar` and images of containers make it, and by its samples alone where no other sign is left."""
    file = model / "text_encoder_3" / "file"
    content = bytes(100_000)
    file.write_bytes(content)
    first, hashes = identity(model)
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    other = model / "other"
    # In the second of the samples.
    other.write_bytes(content[:6300] + b"x" + content[6301:])
    other.rename(file)
    os.utime(file, ns=times)
    assert file.stat().st_mtime_ns == times[1]
    assert identity(model, known=hashes)[0] != first
    (record,) = [entry for path, entry in hashes.items() if path == str(file.resolve())]
    now = file.stat()
    record[0][2:4] = [now.st_ctime_ns, now.st_ino]
    assert identity(model, known=hashes)[0] != first


def test_memory_is_bounded_and_what_left_comes_back(model, tmp_path):
    encoders = Encoders()
    one = (4 * 3 + 2) * 4
    cond = made(model, encoders, memory=2 * one)
    texts = [f"{i:03d}" for i in range(6)]
    np.testing.assert_array_equal(cond(texts)["embeds"], Encoders().encode(texts, 4)["embeds"])
    assert len(cond._values) == 2
    cond(["000"])
    assert encoders.seen.count("000") == 2
    stored = made(model, encoders, tmp_path / "cache", memory=one)
    stored.fill(texts)
    count = len(encoders.seen)
    stored(texts)
    assert len(encoders.seen) == count and len(stored._values) == 1


def test_the_real_encoders(tmp_path):
    """Values of the shipped pipeline through the cache equal those computed at once."""
    from marble_jax.families.sd3.text import load_text_encoders

    cond = EmbeddingCache(FAMILY, EMBEDDED, 6, jnp.float32, folder=tmp_path)
    got, want = cond(["a red star"]), load_text_encoders(EMBEDDED).encode(["a red star"], 6)
    assert cond.loaded and cond.fill([]) == 0 and not cond.loaded
    np.testing.assert_array_equal(got["embeds"], want["embeds"])
    np.testing.assert_array_equal(got["pooled"], want["pooled"])


def test_bad_places_and_files(model, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(
        InputError, match=f"embedding cache: expected a writable folder; received {file}"
    ):
        made(model, Encoders(), file)
    cache = tmp_path / "cache"
    cond = made(model, Encoders(), cache)
    with pytest.raises(
        InputError, match=r"prompts: expected a list of one or more texts; received \[\]"
    ):
        cond([])
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 10)
    )
    with pytest.raises(
        InputError, match="embedding cache: expected 0.0 GB of free space in .*; received 0.0 GB"
    ):
        cond.fill(TEXTS)
    monkeypatch.undo()
    cond.fill(TEXTS)
    stored = next(cache.glob("*/*.npz"))
    for damaged in cache.glob("*/*.npz"):
        damaged.write_bytes(stored.read_bytes()[:50])
    with pytest.raises(
        InputError, match="embedding cache: expected a readable .*npz; received .* .delete the file"
    ):
        made(model, Encoders(), cache)(["a cat"])
    (cache / "hashes.json").write_text("{")
    assert made(model, Encoders(), cache).missing(["a cat"]) == []
    assert json.loads((cache / "hashes.json").read_text())


def test_hosts_that_share_a_folder_keep_hashes_of_their_own(model, tmp_path, monkeypatch):
    """The same path has other times on another host, and one record of both would be made anew at every start."""
    monkeypatch.setattr(module.distributed, "is_single_process", lambda: False)
    for host in ("one", "two"):
        monkeypatch.setattr(module.socket, "gethostname", lambda host=host: host)
        made(model, Encoders(), tmp_path / "cache")
    assert sorted(file.name for file in (tmp_path / "cache").glob("*.json")) == [
        "hashes_one.json",
        "hashes_two.json",
    ]


def test_files_are_read_together(model, tmp_path, monkeypatch):
    """From a bucket each takes long to come: as many as are read at once are under way before the first has come."""
    texts = [f"text {number}" for number in range(module.READERS)]
    made(model, Encoders(), tmp_path / "cache").fill(texts)
    cond = made(model, Encoders(), tmp_path / "cache")
    barrier, read = threading.Barrier(module.READERS), cond._read

    def slowly(text):
        barrier.wait(60)
        return read(text)

    monkeypatch.setattr(cond, "_read", slowly)
    got = cond(texts)
    want = Encoders().encode(texts, 4)
    np.testing.assert_array_equal(got["embeds"], want["embeds"])


def test_a_full_disk_is_one_line(model, tmp_path, monkeypatch):
    cond = made(model, Encoders(), tmp_path / "cache")

    def full(file, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(
        InputError, match="embedding cache: expected space to write in .*; received No space left"
    ):
        cond.fill(TEXTS)


@pytest.mark.parametrize("shared", [True, False])
def test_processes_share_out_what_they_encode(model, tmp_path, monkeypatch, shared):
    """Two processes in turn, with one folder or one each: every text once in all, or all texts on each."""
    from marble_jax.programs import open_model

    texts = ["a", "b", "c", "d", "e", "a"]
    encoders = [Encoders(), Encoders()]
    folders = [tmp_path / "one", tmp_path / ("one" if shared else "other")]
    caches = [made(model, own, folder) for own, folder in zip(encoders, folders)]
    monkeypatch.setattr(open_model.distributed, "count", lambda: 2)
    monkeypatch.setattr(open_model.distributed, "is_single_process", lambda: False)

    class Stop(Exception):
        pass

    def first_fill(label, call):
        call()
        raise Stop

    # Shares first, on both, as a barrier has it.
    monkeypatch.setattr(open_model.distributed, "run_on_all", first_fill)
    for index, cache in enumerate(caches):
        monkeypatch.setattr(open_model.distributed, "index", lambda index=index: index)
        with pytest.raises(Stop):
            open_model.encode_ahead(cache, texts)
    assert [own.seen for own in encoders] == [["a", "c", "e"], ["b", "d"]]
    monkeypatch.setattr(open_model.distributed, "run_on_all", lambda label, call: call())
    for index, cache in enumerate(caches):
        monkeypatch.setattr(open_model.distributed, "index", lambda index=index: index)
        open_model.encode_ahead(cache, texts)
    both = [sorted(own.seen) for own in encoders]
    everything = sorted(set(texts))
    assert both == ([["a", "c", "e"], ["b", "d"]] if shared else [everything, everything])
    assert all(cache.missing(texts) == [] and not cache.loaded for cache in caches)
