"""A run's checkpoints: written behind the training's back, never loaded when damaged, and what is kept."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import fake_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.storage import checkpoint
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.storage.intact import HAS_MANIFEST


def state_of(step):
    numbers = np.random.default_rng(step).standard_normal((40, 30)).astype(np.float32)
    return {
        "adapter": {"a": jnp.asarray(numbers)},
        "moments": (jnp.full(3, step, jnp.float32), jnp.asarray(step)),
        "key": jnp.asarray([0, step], jnp.uint32),
    }


def same(found, step):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(state_of(step)), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of steps 1, 2 and 3."""
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(path)
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step))
    checkpoints.close()
    return path


@pytest.fixture
def place(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def files(place, step):
    return sorted(p for p in (place / str(step)).rglob("*") if p.is_file())


def contents(place):
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def damages(whole):
    """Every way in which the test spoils a file of these bytes."""
    size = len(whole)
    yield from (("cut", at, whole[:at]) for at in sorted({0, 1, size // 2, size - 1}))
    for at in sorted({0, size // 3, size // 2, size - 1}):
        yield "flipped", at, whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
    yield "longer", size, whole + b"\0"
    yield "gone", 0, None


def test_nothing_that_is_cut_or_changed_anywhere_is_loaded(place):
    """Of every file: cut at several places, one bit flipped at several, a byte more, and missing."""
    like, seen = state_of(0), 0
    assert {p.name for p in files(place, 3)} >= {
        "manifest.json",
        "_CHECKPOINT_METADATA",
        "_METADATA",
        "manifest.ocdbt",
    }
    for file in files(place, 3):
        whole = file.read_bytes()
        for kind, at, damage in damages(whole):
            file.unlink() if damage is None else file.write_bytes(damage)
            said = []
            step, found = Checkpoints(place, say=said.append).restore(like)
            assert step == 2 and same(found, 2), (file, kind, at)
            (line,) = said
            assert (
                line.startswith("checkpoint of step 3 is damaged, going on from step 2: ")
                and "\n" not in line
            )
            assert str(place / "3") in line
            seen += 1
            file.write_bytes(whole)
    assert seen > 100
    step, found = Checkpoints(place, say=pytest.fail).restore(like)
    assert step == 3 and same(found, 3)


def test_what_is_wrong_is_named(place):
    file = max(files(place, 3), key=lambda p: p.stat().st_size)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    said = []
    checkpoints = Checkpoints(place, say=said.append)
    assert checkpoints.latest() == 2 and checkpoints.latest() == 2  # said once
    assert said == [
        f"checkpoint of step 3 is damaged, going on from step 2: {file}: expected {size} bytes (its "
        f"manifest); received {size - 1} bytes"
    ]
    with pytest.raises(
        InputError, match=r"checkpoint of step 3: expected an intact one; received .* bytes$"
    ):
        checkpoints.restore(state_of(0), 3)
    assert checkpoints.restore(state_of(0), 1)[0] == 1


def test_a_damaged_one_is_put_aside_when_its_step_comes_again(place):
    (place / "3" / "manifest.json").write_text("{")
    checkpoints = Checkpoints(place, keep=2, say=lambda line: None)
    assert checkpoints.latest() == 2 and (place / "3").exists()  # reading changes nothing
    checkpoints.save(3, state_of(3))
    checkpoints.close()
    assert sorted(p.name for p in place.iterdir()) == ["2", "3", "damaged_3"]
    step, found = Checkpoints(place, say=pytest.fail).restore(state_of(0))
    assert step == 3 and same(found, 3)


def test_another_state_takes_the_place_of_a_checkpoint(place):
    checkpoints = Checkpoints(place, keep=2, say=pytest.fail)
    assert checkpoints.latest() == 3
    checkpoints.replace(3, state_of(7) | {"step": 3})
    checkpoints.save(4, state_of(4))
    checkpoints.close()
    assert sorted(p.name for p in place.iterdir()) == ["3", "4"]
    _, found = Checkpoints(place, say=pytest.fail).restore(state_of(0) | {"step": 0}, 3)
    found.pop("step")
    assert same(found, 7)


def test_a_kill_while_a_checkpoint_is_replaced_brings_the_old_one_back(place):
    """Before the new one is there, with half of it there, and with all of it."""
    new, aside = place / "3", place / "superseded_3"
    other = place.parent / "other"
    shutil.copytree(new, other)
    for left in (None, "half", "whole"):
        shutil.rmtree(new)
        shutil.copytree(other, aside)
        if left is not None:
            shutil.copytree(place / "2", new)
            (new / "manifest.json").unlink()
        if left == "whole":
            shutil.rmtree(new)
            shutil.copytree(other, new)
            (aside / "manifest.json").write_text("{}")  # tells them apart
        checkpoints = Checkpoints(place, say=pytest.fail)
        checkpoints.recover()
        assert checkpoints.latest() == 3 and same(checkpoints.restore(state_of(0))[1], 3)
        assert sorted(p.name for p in place.iterdir()) == ["1", "2", "3"]


def test_the_last_good_one_outlives_damaged_newer_ones(place):
    """With room for one, saving step 2 anew may not push out step 1 in favour of the damaged 2 and 3."""
    for step in (2, 3):
        (place / str(step) / "default" / "_METADATA").write_bytes(b"")
    checkpoints = Checkpoints(place, keep=1, say=lambda line: None)
    assert checkpoints.latest() == 1
    checkpoints.save(2, state_of(2))
    checkpoints.close()
    assert sorted(p.name for p in place.iterdir()) == ["2", "damaged_2", "damaged_3"]


def test_all_damaged_is_one_line_and_nothing_is_touched(place):
    for step in (1, 2, 3):
        (place / str(step) / "default" / "manifest.ocdbt").unlink()
    before = contents(place)
    with pytest.raises(
        InputError,
        match=r"expected an intact checkpoint; received 3 damaged \(of step 3: .*t.ocdbt:"
        r" expected \d+ bytes \(its manifest\); received no such file\); nothing was",
    ):
        Checkpoints(place, say=pytest.fail).restore(state_of(0))
    assert contents(place) == before


def without_manifest(place, step):
    """As an older version would have left it."""
    (place / str(step) / "manifest.json").unlink()
    notes = place / str(step) / "_CHECKPOINT_METADATA"
    notes.write_text(
        json.dumps(
            {k: v for k, v in json.loads(notes.read_text()).items() if k != "custom_metadata"}
        )
    )
    assert HAS_MANIFEST not in notes.read_text()


def test_one_that_never_had_a_manifest_is_tried(place):
    without_manifest(place, 3)
    step, found = Checkpoints(place, say=pytest.fail).restore(state_of(0))
    assert step == 3 and same(found, 3)
    for file in (place / "3" / "default" / "d").iterdir():
        file.write_bytes(b"")
    said = []
    assert Checkpoints(place, say=said.append).latest() == 2
    assert (
        len(said) == 1
        and "/3/default: expected the metadata of a checkpoint; received none" in said[0]
    )
    (place / "3" / "default" / "_METADATA").unlink()
    shutil.rmtree(place / "2" / "default" / "d")
    without_manifest(place, 2)
    assert Checkpoints(place, say=lambda line: None).latest() == 1


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The write cannot end before the next steps are done, which overwrite every donated buffer."""
    may_end, checksum = threading.Event(), checkpoint.checksum

    def waiting(path):
        assert may_end.wait(60)
        return checksum(path)

    monkeypatch.setattr(checkpoint, "checksum", waiting)
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"big": jnp.zeros((2000, 1000)), "small": jnp.zeros(3)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    for _ in range(5):
        state = step(state)
    assert float(state["big"][0, 0]) == 5 and not (tmp_path / "1").exists()
    may_end.set()
    checkpoints.wait()
    _, found = checkpoints.restore(state)
    checkpoints.close()
    assert not np.any(found["big"]) and not np.any(found["small"])


def test_milestones_are_kept_for_good(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every=3)
    for step in range(1, 9):
        checkpoints.save(step, {"x": jnp.ones(2)})
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "6", "8"]


def test_a_full_disk_is_said_and_the_next_one_is_written(tmp_path, monkeypatch, capfd):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    checksum, said = checkpoint.checksum, []
    checkpoints = Checkpoints(tmp_path, keep=1, say=said.append)
    checkpoints.save(1, state_of(1))
    checkpoints.wait()
    monkeypatch.setattr(checkpoint, "checksum", full)
    checkpoints.save(2, state_of(2))
    checkpoints.wait()
    assert said == [
        "checkpoint of step 2 could not be written: OSError: [Errno 28] No space left on device"
    ]
    assert checkpoints.latest() == 1
    monkeypatch.setattr(checkpoint, "checksum", checksum)
    checkpoints.save(3, state_of(3))
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
        checkpoints = Checkpoints(tmp_path, keep=1, say=said.append)
        checkpoints.save(4, state_of(4))
        assert said[1:] == [
            "checkpoint of step 4 could not be written: OSError: [Errno 28] No space left on device"
        ]
    monkeypatch.setattr(checkpoint, "checksum", full)
    checkpoints.save(4, state_of(4))
    with pytest.raises(
        InputError,
        match="expected a place with room for the checkpoint of step 4; received OSError",
    ):
        checkpoints.close()
    assert Checkpoints(tmp_path).latest() == 3
    assert "Traceback" not in capfd.readouterr().err


def test_there_is_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.latest() is None and checkpoints.steps() == []
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="checkpoints.keep: expected at least 1; received 0"):
        Checkpoints(tmp_path, keep=0)


def on_eight_devices(path):
    """In a process with eight devices: reads what one device wrote, and writes it split and repeated."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    assert jax.device_count() == 8
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    everywhere, split = (
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec(("data", "fsdp"))),
    )
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=split if leaf.shape[:1] == (40,) else everywhere
        ),
        state_of(0),
    )
    checkpoints = Checkpoints(path, keep=9)
    step, found = checkpoints.restore(like)
    assert step == 3 and same(found, 3)
    assert (
        found["adapter"]["a"].sharding.is_equivalent_to(split, 2)
        and found["key"].sharding.is_fully_replicated
    )
    state = jax.device_put(state_of(10), jax.tree.map(lambda leaf: leaf.sharding, like))
    # Two parts, each of which four devices hold.
    twice = NamedSharding(mesh, PartitionSpec("fsdp"))
    state["key"] = jax.device_put(state["key"], twice)
    made = []

    def hear(event, seconds, **_):
        if event.startswith("/jax/core/compile/"):
            made.append(event)

    jax.monitoring.register_event_duration_secs_listener(hear)
    checkpoints.save(10, state)
    checkpoints.close()
    programs = list(made)
    # What is heard is heard.
    jax.lax.slice_in_dim(state["adapter"]["a"], 0, 1).block_until_ready()
    assert len(made) > len(programs)
    return programs


def test_from_one_device_to_eight_and_back(place):
    # Saving runs no program, which would wait for those that the devices are still at.
    assert fake_devices.call(on_eight_devices, place) == []
    step, found = Checkpoints(place, say=pytest.fail).restore(state_of(0))
    assert step == 10 and same(found, 10)
    without_manifest(place, 10)  # the trial copes with what eight devices wrote, too
    assert Checkpoints(place, say=pytest.fail).latest() == 10
