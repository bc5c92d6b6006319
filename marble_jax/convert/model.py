"""Converting a whole model: component by component into a directory beside the target, renamed when it is complete.

A kill leaves the target as it was. The next run with the same arguments keeps the components that were complete and
starts with the first that was not; with other arguments, or other files, it starts afresh.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from marble_jax.console import Console, duration
from marble_jax.convert.layouts import CARRIED, COMPONENTS, STEMS
from marble_jax.convert.sources import Model, open_model
from marble_jax.convert.writing import CHOICES, KEEP, Cast, write_params, write_safetensors
from marble_jax.errors import InputError, one_of
from marble_jax.storage.manifest import MANIFEST, checksum, write_json
from marble_jax.version import VERSION

LAYOUTS = ("orbax", "diffusers")
_JOB = ".convert.json"
_SLACK = 32_000_000  # bytes for small files


def convert(
    name: str,
    out: str,
    layout: str = "",
    dtype: str = KEEP,
    components: Sequence[str] = (),
    companion: str = "",
    revision: str | None = None,
    shard_bytes: int = 10_000_000_000,
    ignore: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Converts a model.

    Args:
      name: what to convert, see `open_model`.
      out: directory to make; it must not be there yet.
      layout: "orbax" (ours) or "diffusers"; by default the one that `name` does not have.
      dtype: of floating tensors, of `CHOICES`; "keep" leaves every bit as it is.
      components: the ones wanted; all there are without it.
      companion: where to take missing parts from.
      revision: of a Hub model.
      shard_bytes: largest safetensors file.
      ignore: patterns of tensors to pass over.
      console: where to report.

    Returns:
      The manifest.

    Raises:
      InputError: bad input, an output that exists, or no room on the disk; `out` is then as it was.
    """
    console = console or Console()
    one_of("--dtype", dtype, CHOICES)
    one_of("--to", layout, ("", *LAYOUTS))
    target = _free_target(out)
    model = open_model(name, revision, companion, components, ignore)
    layout = layout or ("diffusers" if model.kind == "orbax" else "orbax")
    sources = {part: Cast(source, dtype) for part, source in model.components.items()}
    sizes = {
        part: sum(source.nbytes(e.key) for e in model.layouts[part].entries)
        for part, source in sources.items()
    }
    partial = target.parent / f".{target.name}.partial"
    job = {
        "version": VERSION, "layout": layout, "dtype": dtype, "shard_bytes": shard_bytes, "ignore": list(ignore),
        "components": list(sources),
        "files": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in model.files()],
    }  # fmt: skip
    start = time.perf_counter()
    with _claimed(partial), _named(target):
        done = _resumed(partial, job, console)
        left = sum(size for part, size in sizes.items() if part not in done)
        free = shutil.disk_usage(partial).free
        if left + _SLACK > free:
            raise InputError(
                f"{target}: expected {(left + _SLACK) / 1e9:.2f} GB of free disk; received "
                f"{free / 1e9:.2f} GB"
            )
        with console.bar(left, "convert", "B") as bar:
            for part, source in sources.items():
                if part in done:
                    continue
                bar.set_description(part)
                began = time.perf_counter()
                done[part] = _write(
                    partial, part, model, source, layout, dtype, shard_bytes, bar.update
                )
                write_json(partial / _JOB, {"job": job, "done": done})
                seconds = time.perf_counter() - began
                console.say(
                    f"  {part:15} {len(model.layouts[part].entries):5} tensors  {sizes[part] / 1e9:7.3f} GB  "
                    f"{duration(seconds):>6}  {sizes[part] / 1e6 / seconds:6.0f} MB/s"
                )
        manifest = _finish(partial, model, layout, dtype, done, sizes)
        (partial / _JOB).unlink()
        if target.exists():
            target.rmdir()  # empty, as was seen above
        partial.rename(target)
    total, seconds = sum(sizes.values()), time.perf_counter() - start
    console.say(
        f"converted {model.kind} to {layout}: {total / 1e9:.3f} GB in {duration(seconds)}, peak memory "
        f"{peak_memory() / 1e9:.2f} GB: {target}"
    )
    for what in model.skipped:
        console.say(f"  not part of an SD3 model, left out: {what}")
    index = model.written.get("model_index.json", {})
    missing = [part for part in (*COMPONENTS, *CARRIED) if index.get(part, 0) == [None, None]]
    if missing:
        console.say(
            f"  not in the source: {', '.join(missing)} (--companion=DIR takes them from another model)"
        )
    return manifest


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _write(
    partial: pathlib.Path,
    part: str,
    model: Model,
    source: Cast,
    layout: str,
    dtype: str,
    shard_bytes: int,
    progress: Any,
) -> dict[str, Any]:
    """One component with its config; returns size and hash by file."""
    directory, plan = partial / part, model.layouts[part]
    try:
        if layout == "orbax":
            files = write_params(directory, source, plan, progress)
        else:
            order = {key: number for number, key in enumerate(source.keys())}
            keys = sorted((entry.key for entry in plan.entries), key=order.__getitem__)
            files = write_safetensors(directory, STEMS[part], source, keys, shard_bytes, progress)
    except Exception:
        shutil.rmtree(directory, ignore_errors=True)  # a full disk should not stay full
        raise
    config = dict(model.components[part].config)
    for key in ("dtype", "torch_dtype"):
        if dtype != KEEP and key in config:
            config[key] = dtype
    write_json(directory / "config.json", config)
    files["config.json"] = checksum(directory / "config.json")
    return {f"{part}/{file}": record for file, record in files.items()}


def _finish(
    partial: pathlib.Path,
    model: Model,
    layout: str,
    dtype: str,
    done: dict[str, dict[str, Any]],
    sizes: dict[str, int],
) -> dict[str, Any]:
    """Copies and writes the small files, then the manifest."""
    files = {name: record for part in done.values() for name, record in part.items()}
    small = [*model.carried, *model.written]
    for name, source in model.carried.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, partial / name)
    for name, value in model.written.items():
        write_json(partial / name, value)
    files |= {name: checksum(partial / name) for name in small}
    manifest = {
        "format": "marble_jax model", "version": VERSION, "layout": layout, "dtype": dtype,
        "source": {"name": model.name, "kind": model.kind, "path": str(model.path)}, "left_out": model.skipped,
        "components": {part: {"tensors": len(plan.entries), "bytes": sizes[part]}
                       for part, plan in model.layouts.items()},
        "tensors": sum(len(plan.entries) for plan in model.layouts.values()),
        "bytes": sum(sizes.values()), "files": dict(sorted(files.items())),
    }  # fmt: skip
    write_json(partial / MANIFEST, manifest)
    return manifest


def _free_target(out: str) -> pathlib.Path:
    if not out or "://" in out:
        raise InputError(f"--out: expected a directory on this machine; received {out!r}")
    target = pathlib.Path(out).absolute()
    if target.is_dir() and not any(target.iterdir()):
        return target
    if target.exists() or target.is_symlink():
        raise InputError(f"--out: expected a new directory; received {target}, which exists")
    return target


def _resumed(
    partial: pathlib.Path, job: dict[str, Any], console: Console
) -> dict[str, dict[str, Any]]:
    """Components that an earlier, killed run of the same job completed; clears what else it left."""
    try:
        record = json.loads((partial / _JOB).read_text(encoding="utf-8"))
        done = record["done"] if record["job"] == job else {}
    except (OSError, ValueError, KeyError, TypeError):
        done = {}
    complete = {
        part: files
        for part, files in done.items()
        if all(
            (partial / f).is_file() and (partial / f).stat().st_size == r["bytes"]
            for f, r in files.items()
        )
    }
    for path in partial.iterdir():
        if path.name not in complete and path.name != _JOB:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if complete:
        console.say(f"  resuming: {', '.join(complete)} complete already")
    return complete


@contextlib.contextmanager
def _claimed(partial: pathlib.Path) -> Iterator[None]:
    """Makes the directory and holds a lock on it that ends with this process, however it ends.

    The directory goes again unless a component in it is complete.
    """
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise InputError(
            f"--out: expected a place to write; received {partial.parent} ({error.strerror})"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"--out: expected no other conversion to it at the same time; received {partial}, in use "
                "by one"
            ) from error
        try:
            yield
        finally:
            if partial.exists() and not (partial / _JOB).exists():
                shutil.rmtree(partial)  # nothing in it is complete
    finally:
        os.close(handle)


@contextlib.contextmanager
def _named(target: pathlib.Path) -> Iterator[None]:
    """Turns a full or failing disk into one line."""
    try:
        yield
    except InputError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # TensorStore puts the system's errors in a ValueError
        text = " ".join(str(error).split())
        full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in text
        if not full and not isinstance(error, OSError):
            raise
        raise InputError(
            f"{target}: expected {'room' if full else 'to write'} on the disk; received "
            f"{os.strerror(errno.ENOSPC) if full else text[:200]} (nothing was changed; the same command "
            "goes on from the last complete component)"
        ) from error
