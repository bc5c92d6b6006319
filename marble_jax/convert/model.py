"""Converting a whole model: component by component into a directory beside the target, renamed when it is complete.

A kill leaves the target as it was. The next run with the same arguments keeps the components that were complete and
starts with the first that was not; with other arguments, or other files, it starts afresh.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

from marble_jax.console import Console, duration
from marble_jax.convert.directory import ABSENT, INDEX
from marble_jax.convert.original_folder import (
    check_has_folder,
    original_names,
    original_path,
    write_component,
)
from marble_jax.convert.sources import Model, open_model
from marble_jax.convert.workspace import (
    JOB,
    claimed,
    disk_errors_in_one_line,
    free_target,
    record,
    take_up,
)
from marble_jax.convert.writing import (
    CHOICES,
    KEEP,
    Cast,
    FileRecords,
    Progress,
    write_params,
    write_safetensors,
)
from marble_jax.errors import InputError, one_of
from marble_jax.platform import peak_memory
from marble_jax.storage.manifest import MANIFEST, checksum, write_json
from marble_jax.version import VERSION
from marble_jax.weights.formats import FileFormats

LAYOUTS = ("orbax", "diffusers", "original")
_OTHER_LAYOUT = {"orbax": "diffusers", "diffusers": "orbax", "original": "orbax"}
"""What a model is converted to unless the user says, by the kind it is of."""
_SLACK = 32_000_000  # bytes for configs, tokenizers and what the file system takes for itself
_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Where a config.json says the dtype of its weights: new and old versions of transformers."""


def convert(
    name: str,
    out: str,
    formats: Sequence[FileFormats],
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
      out: directory to make; it must not exist yet, or be empty.
      formats: of the families that the model may be of.
      layout: "orbax" (ours), "diffusers" or "original" (the folder of the family's own repository); by default "orbax"
        for what is not ours, and "diffusers" for what is.
      dtype: of floating tensors, of `CHOICES`; "keep" leaves every bit as it is.
      components: the ones wanted; all that the model has without it.
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
    target = free_target(out)
    model = open_model(name, formats, revision, companion, components, ignore)
    if not layout:
        layout = _OTHER_LAYOUT[model.kind]
    if layout == "original":
        check_has_folder(model.formats)
    conversion = Conversion(model, layout, dtype, shard_bytes, tuple(ignore))
    start = time.perf_counter()
    manifest = _run(conversion, target, console)
    seconds = time.perf_counter() - start
    total = sum(conversion.sizes.values())
    console.say(
        f"converted {model.kind} to {layout}: {total / 1e9:.3f} GB in {duration(seconds)}, "
        f"peak memory {peak_memory() / 1e9:.2f} GB: {target}"
    )
    _say_what_is_missing(model, console)
    return manifest


def _run(conversion: Conversion, target: pathlib.Path, console: Console) -> dict[str, Any]:
    """Makes the result beside the target and puts it in its place; returns the manifest."""
    partial = target.parent / f".{target.name}.partial"
    job = conversion.job()
    with claimed(partial), disk_errors_in_one_line(target):
        done = take_up(partial, job, console)
        left = [part for part in conversion.sources if part not in done]
        size = sum(conversion.sizes[part] for part in left)
        _check_free(target, partial, size)
        with console.bar(size, "convert", "B") as bar:
            for part in left:
                bar.set_description(part)
                began = time.perf_counter()
                done[part] = conversion.write(partial, part, bar.update)
                # After every component: a kill from here on costs no more than the one that is being written.
                record(partial, job, done)
                console.say(conversion.component_line(part, time.perf_counter() - began))
        manifest = conversion.finish(partial, done)
        (partial / JOB).unlink()
        if target.exists():
            target.rmdir()  # empty, as `free_target` saw
        partial.rename(target)
    return manifest


def _check_free(target: pathlib.Path, partial: pathlib.Path, left: int) -> None:
    """Raises InputError unless the disk has room for the bytes left to write."""
    free = shutil.disk_usage(partial).free
    needed = left + _SLACK
    if needed > free:
        raise InputError(
            f"{target}: expected {needed / 1e9:.2f} GB of free disk; received {free / 1e9:.2f} GB"
        )


def _say_what_is_missing(model: Model, console: Console) -> None:
    """Says what of the source is not in the result, and what of a whole pipeline the source did not have."""
    family = model.formats
    for name in model.skipped:
        console.say(f"  not part of {family.article} {family.name} model, left out: {name}")
    index = model.written.get(INDEX, {})
    missing = [part for part in family.folders if index.get(part) == ABSENT]
    if missing:
        console.say(
            f"  not in the source: {', '.join(missing)} (--companion=DIR takes them from another model)"
        )


@dataclasses.dataclass
class Conversion:
    """A model on its way to a layout.

    Attributes:
      model: what is converted.
      layout: of the result, "orbax", "diffusers" or "original".
      dtype: of floating tensors, of `CHOICES`.
      shard_bytes: largest safetensors file.
      ignore: patterns of tensors that were passed over.
      sources: tensors of each component as they are written.
      sizes: bytes of each component's tensors.
    """

    model: Model
    layout: str
    dtype: str
    shard_bytes: int
    ignore: tuple[str, ...]
    sources: dict[str, Cast] = dataclasses.field(init=False, default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for part, component in self.model.components.items():
            source = Cast(component, self.dtype)
            entries = self.model.layouts[part].entries
            self.sources[part] = source
            self.sizes[part] = sum(source.nbytes(entry.key) for entry in entries)

    def job(self) -> dict[str, Any]:
        """Everything that the result depends on: two runs with the same job make the same files."""
        files = []
        for file in self.model.files():
            status = file.stat()
            files.append([str(file), status.st_size, status.st_mtime_ns])
        return {
            "version": VERSION,
            "layout": self.layout,
            "dtype": self.dtype,
            "shard_bytes": self.shard_bytes,
            "ignore": list(self.ignore),
            "components": list(self.sources),
            "files": files,
        }

    def write(self, partial: pathlib.Path, part: str, progress: Progress) -> FileRecords:
        """Writes one component with its config; returns size and hash by file."""
        if self.layout == "original":
            return self._write_original(partial, part, progress)
        directory = partial / part
        try:
            files = self._write_tensors(directory, part, progress)
        except Exception:
            # Half a component is of no use to a later run, and a full disk should not stay full.
            shutil.rmtree(directory, ignore_errors=True)
            raise
        write_json(directory / "config.json", self._config(part))
        files["config.json"] = checksum(directory / "config.json")
        return {f"{part}/{file}": file_record for file, file_record in files.items()}

    def _write_original(self, partial: pathlib.Path, part: str, progress: Progress) -> FileRecords:
        """Writes the file of one component in its original layout, which has no config of its own."""
        component, plan = self.model.components[part], self.model.layouts[part]
        keys = [entry.key for entry in plan.entries]
        names = original_names(self.model.formats, part, keys, component.config)
        return write_component(
            partial,
            self.model.formats,
            part,
            component,
            names,
            self.dtype,
            self.shard_bytes,
            progress,
        )

    def _config(self, part: str) -> dict[str, Any]:
        """A component's config, which says the dtype after the cast."""
        config = dict(self.model.components[part].config)
        if self.dtype == KEEP:
            return config
        for key in _DTYPE_KEYS:
            if key in config:
                config[key] = self.dtype
        return config

    def _write_tensors(self, directory: pathlib.Path, part: str, progress: Progress) -> FileRecords:
        """Writes a component's tensors."""
        source, plan = self.sources[part], self.model.layouts[part]
        if self.layout == "orbax":
            return write_params(directory, source, plan, progress)
        # In the order of the source, which is the order it is read in best; tensors that are ignored stay behind.
        wanted = {entry.key for entry in plan.entries}
        keys = [key for key in source.keys() if key in wanted]
        stem = self.model.formats.stems[part]
        return write_safetensors(directory, stem, source, keys, self.shard_bytes, progress)

    def component_line(self, part: str, seconds: float) -> str:
        """What is said about a component that is complete."""
        tensors, size = len(self.model.layouts[part].entries), self.sizes[part]
        return (
            f"  {part:15} {tensors:5} tensors  {size / 1e9:7.3f} GB  {duration(seconds):>6}  "
            f"{size / 1e6 / seconds:6.0f} MB/s"
        )

    def finish(self, partial: pathlib.Path, done: dict[str, FileRecords]) -> dict[str, Any]:
        """Copies and writes the small files, then the manifest, which is returned."""
        files = self._small_files(partial)
        for records in done.values():
            files |= records
        manifest = self._manifest(files)
        write_json(partial / MANIFEST, manifest)
        return manifest

    def _small_files(self, partial: pathlib.Path) -> FileRecords:
        """Copies the files that go along and writes the others; returns size and hash by file."""
        files: FileRecords = {}
        carried, written = self._small()
        for name, source in carried.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / name)
            files[name] = checksum(partial / name)
        for name, value in written.items():
            write_json(partial / name, value)
            files[name] = checksum(partial / name)
        return files

    def _small(self) -> tuple[dict[str, pathlib.Path], dict[str, Any]]:
        """Files to copy and JSON contents to write, by their path in the result."""
        model = self.model
        folder = model.formats.original_folder
        if self.layout != "original" or folder is None:
            return model.carried, model.written
        carried = {}
        for name, source in model.carried.items():
            path = original_path(name, model.formats)
            if path is not None:
                carried[path] = source
        configs = {part: component.config for part, component in model.components.items()}
        return carried, dict(folder.written(configs))

    def _manifest(self, files: FileRecords) -> dict[str, Any]:
        """What the result is, what it came from, and every file with size and hash."""
        model = self.model
        components = {}
        for part, plan in model.layouts.items():
            components[part] = {"tensors": len(plan.entries), "bytes": self.sizes[part]}
        return {
            "format": "marble_jax model",
            "version": VERSION,
            "layout": self.layout,
            "dtype": self.dtype,
            "source": {"name": model.name, "kind": model.kind, "path": str(model.path)},
            "left_out": model.skipped,
            "components": components,
            "tensors": sum(len(plan.entries) for plan in model.layouts.values()),
            "bytes": sum(self.sizes.values()),
            "files": dict(sorted(files.items())),
        }
