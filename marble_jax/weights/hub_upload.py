"""Uploads of folders to the Hugging Face Hub, with every refusal as one line that says what to do."""

from __future__ import annotations

import pathlib
from typing import Any

from marble_jax.errors import InputError, one_line
from marble_jax.weights.hub import HUB_NAME

OPTION = "--push_to_hub"


def check_name(name: str, option: str = OPTION) -> None:
    """Raises InputError unless a text is USER/NAME of a repository; `option` names it in the error."""
    if not HUB_NAME.fullmatch(name) or "@" in name:
        raise InputError(f"{option}: expected USER/NAME of a Hub repository; received {name!r}")


def ready_repository(name: str, private: bool, option: str = OPTION) -> None:
    """Makes sure that a model repository is there and may be written to; makes it if need be.

    Before the work whose result goes there: a token that is missing shows at once.

    Args:
      name: USER/NAME.
      private: whether a new repository is; one that is there stays as it is.
      option: names the repository in errors.

    Raises:
      InputError: no name of a repository, no login, no right to write there, or no network.
    """
    check_name(name, option)
    api = _api()
    try:
        api.create_repo(name, private=private, exist_ok=True)
    except Exception as error:
        raise _refusal(name, option, error) from error


def push_folder(folder: pathlib.Path, name: str, message: str, option: str = OPTION) -> str:
    """Uploads all files of a folder as one commit; files of the repository that the folder lacks stay.

    Args:
      folder: on this machine.
      name: USER/NAME of a repository that `ready_repository` has seen.
      message: of the commit.
      option: names the repository in errors.

    Returns:
      Address of the commit.

    Raises:
      InputError: the Hub does not take it.
    """
    try:
        # Leftovers of a system that looks at folders are no part of an export.
        info = _api().upload_folder(
            repo_id=name,
            folder_path=str(folder),
            commit_message=message,
            ignore_patterns=[".DS_Store"],
        )
    except Exception as error:
        raise _refusal(name, option, error) from error
    return str(info.commit_url)


def _api() -> Any:
    from huggingface_hub import HfApi  # needed for uploads only

    from marble_jax.version import VERSION

    return HfApi(library_name="marble_jax", library_version=VERSION)


def _refusal(name: str, option: str, error: Exception) -> InputError:
    """What the Hub or the way there did not allow, with what to do about it."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
        received = "no valid token (log in with `hf auth login`, or set HF_TOKEN)"
    elif status == 403:
        received = "a token without that right (make one with write access to it)"
    elif status is not None:
        received = f"HTTP status {status}: {one_line(error, 160)}"
    else:
        received = one_line(error, 200)
    return InputError(
        f"{option}: expected to write the Hub repository {name!r}; received {received}"
    )
