"""Downloads from the Hugging Face Hub, with every refusal as one line that says what to do."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from marble_jax.errors import InputError
from marble_jax.storage.files import local_path

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?")
"""What a Hub name looks like: owner/model, or owner/model@revision for a branch, tag or commit of it."""

SCHEME = "hf://"
_URL = re.compile(r"hf://(datasets/)?([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?(?:/(.*))?")
_NOUNS = {"model": "model", "dataset": "data set"}

_commits: dict[str, str] = {}
_held: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class HubPath:
    """A place in a repository of the Hub, as `hf://` names it.

    Attributes:
      name: owner/name, with @revision where one is named.
      kind: "model" or "dataset".
      inside: path of a file or folder in the repository; empty for all of it.
    """

    name: str
    kind: str
    inside: str


def hub_path(text: str) -> HubPath:
    """Reads `hf://datasets/OWNER/NAME[@REVISION][/PATH]`, or the same without `datasets/` for a model.

    Raises:
      InputError: it is written otherwise.
    """
    match = _URL.fullmatch(text)
    inside = (match[4] or "").strip("/") if match else ""
    misplaced = match is not None and not match[1] and match[2].startswith("datasets/")
    if match is None or misplaced or ".." in inside.split("/"):
        raise InputError(
            f"Hub path: expected hf://datasets/OWNER/NAME[@REVISION][/PATH]; received {text!r}"
        )
    kind = "dataset" if match[1] else "model"
    name = match[2] if match[3] is None else f"{match[2]}@{match[3]}"
    return HubPath(name, kind, inside)


def commits() -> dict[str, str]:
    """Returns the commit of every Hub model that this process has used, by owner/model."""
    return dict(_commits)


def hold_to(commits: Mapping[str, str]) -> None:
    """From now on downloads by a name without a revision take these commits.

    Args:
      commits: by owner/model, as `commits` had them when a run began.
    """
    _held.clear()
    _held.update(commits)


def without_revision(name: str) -> str:
    """Returns owner/model of a Hub name."""
    return name.partition("@")[0]


def _pinned(name: str, revision: str | None) -> tuple[str, str | None]:
    """Owner/model and the revision that is asked for, in the name or beside it. Raises InputError for two of them."""
    model, _, pinned = name.partition("@")
    if pinned and revision and pinned != revision:
        raise InputError(
            f"model {name!r}: expected one revision; received {pinned!r} and {revision!r}"
        )
    return model, pinned or revision


def download(
    name: str,
    patterns: Sequence[str],
    skipped: Sequence[str] = (),
    revision: str | None = None,
    kind: str = "model",
) -> pathlib.Path:
    """The local copy of some files of a Hub repository; what is in the cache is not fetched again.

    Args:
      name: owner/model, or owner/model@revision.
      patterns: `fnmatch` patterns of the files wanted.
      skipped: of those, the ones not wanted.
      revision: branch, tag or commit.
      kind: "model" or "dataset".

    Raises:
      InputError: an unknown or gated repository, or no network.
    """
    from huggingface_hub import errors, snapshot_download  # needed for downloads only

    model, revision = _pinned(name, revision)
    revision = revision or _held.get(model)
    noun = _NOUNS[kind]
    try:
        local = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(skipped),
            repo_type=kind,
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{noun} {name!r}: expected access to a gated Hub {noun}; received a refusal (accept its licence on "
            "huggingface.co and log in with `hf auth login`)"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        place = f"a directory or a Hub {noun}"
        if revision:
            place = f"{place} at revision {revision!r}"
        raise InputError(f"{noun} {name!r}: expected {place}; received neither") from error
    # The transport's own errors change between releases; the cause stays attached.
    except Exception as error:
        raise InputError(
            f"{noun} {name!r}: expected a directory, a cached Hub {noun} or a reachable Hub; received no such "
            f"directory and {type(error).__name__}"
        ) from error
    path = pathlib.Path(local)
    # A branch moves on: what was used is on record by its commit, after which the cache names the folder.
    if path.parent.name == "snapshots":
        _commits[model] = path.name
    return path


def cache_hint(folder: pathlib.Path) -> str:
    """Returns what to do about the folder of a download cache, which has the model below `snapshots`; empty for others.

    Args:
      folder: given as a model's directory.
    """
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return ""
    inner = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    if not inner:
        return " (the folder of a download cache without any snapshot: download the model again)"
    return f" (the folder of a download cache: pass {snapshots / inner[-1]})"


def find_model(
    name: pathlib.Path | str,
    folders: Iterable[str],
    skipped: Iterable[str] = (),
    revision: str | None = None,
) -> pathlib.Path:
    """The local directory of a model: `name` itself if it exists, else the Hub model of that name, downloaded.

    Args:
      name: a directory, owner/model, or owner/model@revision.
      folders: component folders to download with `model_index.json`.
      skipped: of those, the ones not wanted.
      revision: branch, tag or commit of a Hub model.

    Raises:
      InputError: no such directory, and not a Hub model that can be had (unknown, gated, or no network); or a
        revision of a directory.
    """
    path = local_path(name)
    if path.is_dir():
        if revision:
            raise InputError(
                f"model {str(name)!r}: expected no revision of a directory on this machine; received {revision!r}"
            )
        return path
    if not HUB_NAME.fullmatch(str(name)):
        raise InputError(
            f"model: expected a directory or a Hub name owner/model; received {str(name)!r}"
        )
    # Components only: the root of such a repository holds all weights a second time in single files. Of the
    # components the full precision only, as a directory with both variants opens with that one.
    patterns = ["model_index.json", *(f"{folder}/*" for folder in folders)]
    unwanted = ["*.fp16*", *(f"{folder}/*" for folder in skipped)]
    return download(str(name), patterns, unwanted, revision)
