"""Downloads from the Hugging Face Hub, with every refusal as one line that says what to do."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence

from marble_jax.errors import InputError

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""What a Hub name looks like: owner/model."""


def download(
    name: str, patterns: Sequence[str], skipped: Sequence[str] = (), revision: str | None = None
) -> pathlib.Path:
    """The local copy of some files of a Hub model; what is in the cache is not fetched again.

    Args:
      name: owner/model.
      patterns: `fnmatch` patterns of the files wanted.
      skipped: of those, the ones not wanted.
      revision: branch, tag or commit.

    Raises:
      InputError: an unknown or gated model, or no network.
    """
    from huggingface_hub import errors, snapshot_download  # needed for downloads only

    try:
        local = snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(skipped)
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"model {name!r}: expected access to a gated Hub model; received a refusal (accept its licence on "
            "huggingface.co and log in with `hf auth login`)"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(
            f"model {name!r}: expected a directory or a Hub model{at}; received neither"
        ) from error
    except (
        Exception
    ) as error:  # the transport's own errors change between releases; the cause stays attached
        raise InputError(
            f"model {name!r}: expected a directory, a cached Hub model or a reachable Hub; received no such "
            f"directory and {type(error).__name__}"
        ) from error
    return pathlib.Path(local)
