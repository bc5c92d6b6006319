"""The secret that the processes of one run share, so that nobody else at the coordinator's port becomes one of them.

It is the environment variable `MARBLE_JAX_SECRET` where that is set, the same on every host. Otherwise process 0 makes
one up and leaves it in the workdir, which all hosts of a run share, until all have met. It never crosses the network:
either side proves that it has it by a keyed hash of what the other side just made up.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from typing import Protocol

from etils import epath

from marble_jax.errors import InputError

VARIABLE = "MARBLE_JAX_SECRET"
FILE = ".secret.partial"
"""In a workdir. A kill may leave it behind: like all files of this ending it makes no directory a run's."""
_SHORTEST = 16
"""Characters of a secret that is given."""


class Secret(Protocol):
    """Where the secret of a run comes from."""

    def make(self) -> None:
        """Makes it available to all processes; called by process 0 alone, before it listens."""

    def read(self) -> str | None:
        """Returns the secret; None while process 0 has not made it."""

    def forget(self) -> None:
        """Takes it away again; called by process 0 when all have met, or nobody will."""


class GivenSecret:
    """A secret that every process was given.

    Args:
      text: the secret; an empty one keeps nobody out.
    """

    def __init__(self, text: str = ""):
        self._text = text

    def make(self) -> None:
        """Does nothing."""

    def read(self) -> str:
        """Returns the secret."""
        return self._text

    def forget(self) -> None:
        """Does nothing."""


class WorkdirSecret:
    """A secret in a file that all processes of a run can read.

    Args:
      workdir: of the run; made if it is not there, and taken away again if it stays empty.
    """

    def __init__(self, workdir: epath.PathLike):
        # Whether such a place can be, the run finds out itself: nothing is asked of it before it is used.
        self._folder = epath.Path(os.path.expanduser(os.fspath(workdir)))
        self._file = self._folder / FILE
        self._is_remote = "://" in os.fspath(workdir)
        self._made_folder = False
        self._text: str | None = None

    def __str__(self) -> str:
        return str(self._file)

    def make(self) -> None:
        """Writes a new secret, for this user's eyes alone where the file system knows users.

        Raises:
          InputError: the workdir cannot be written to.
        """
        self._text = secrets.token_hex(32)
        try:
            self._made_folder = not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._is_remote:
                self._file.write_text(self._text)
                return
            # One that a kill left behind may be open to others.
            self._file.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(self._file, flags, 0o600), "w") as handle:
                handle.write(self._text)
        except OSError as error:
            raise InputError(
                f"workdir: expected a writable place; received {self._folder} "
                f"({error.strerror or error})"
            ) from None
        # Whatever the library of a bucket raises where it cannot be reached; the cause stays attached.
        except Exception as error:
            raise InputError(
                f"workdir: expected a writable place; received {self._folder} ({type(error).__name__})"
            ) from error

    def read(self) -> str | None:
        """Returns the secret that is in the file now; None without one."""
        if self._text is not None:
            return self._text
        try:
            return self._file.read_text() or None
        # Also what the library of a bucket raises.
        except Exception:
            return None

    def forget(self) -> None:
        """Removes the file, and the folder if it was made for it."""
        try:
            self._file.unlink(missing_ok=True)
            if self._made_folder and not self._is_remote:
                self._folder.rmdir()
        except Exception:
            # Somebody else's by now, or out of reach: what is left says nothing once all have met.
            pass


def secret_of(workdir: epath.PathLike) -> Secret:
    """Returns where the secret of the run in a workdir comes from.

    Raises:
      InputError: the environment's is too short to be one.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        return WorkdirSecret(workdir)
    if len(given) < _SHORTEST:
        raise InputError(
            f"{VARIABLE}: expected a secret of at least {_SHORTEST} characters; received {len(given)}"
        )
    return GivenSecret(given)


def proof(secret: str, *parts: object) -> str:
    """Returns what only who has the secret can say about `parts`, in hexadecimal digits (HMAC-SHA256)."""
    message = "\0".join(str(part) for part in parts)
    # Halves of surrogate pairs, too: what strangers say, and what an environment of other bytes holds.
    key, content = (text.encode("utf-8", "surrogatepass") for text in (secret, message))
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def is_proof(said: object, secret: str, *parts: object) -> bool:
    """Whether somebody has the secret, by what they said about `parts`."""
    if not isinstance(said, str) or not said.isascii():
        return False
    return hmac.compare_digest(said, proof(secret, *parts))


def challenge() -> str:
    """Returns a text that was never said before."""
    return secrets.token_hex(16)
