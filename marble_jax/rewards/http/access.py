"""Who may talk to a reward server: tokens from outside the configuration, and addresses of this machine alone."""

from __future__ import annotations

import ipaddress
import os
import stat

from marble_jax.errors import InputError
from marble_jax.storage.files import local_path


def read_token(reward: str, variable: str, file: str) -> str:
    """A token from an environment variable or a file.

    Args:
      reward: whose token it is, for messages.
      variable: name of the environment variable; empty for none.
      file: path of the file; empty for none.

    Returns:
      The token without the white space around it; empty when neither is named.

    Raises:
      InputError: both are named, or the one that is holds nothing usable.
    """
    if variable and file:
        raise InputError(f"reward {reward}: expected token_env or token_file; received both")
    if variable:
        expected = f"the environment variable {variable} to hold a token"
        return _token_in(os.environ.get(variable, ""), reward, expected)
    if file:
        expected = f"a token in {file}"
        try:
            path = local_path(file)
            text = path.read_text(encoding="utf-8")
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            raise InputError(
                f"reward {reward}: expected {expected}; received {type(error).__name__}"
            ) from None
        # Readable by others it is no secret; a pipe of this process's own has no mode of that kind.
        if stat.S_ISREG(mode) and mode & (
            stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH
        ):
            raise InputError(
                f"reward {reward}: expected a token file for its owner alone; received {file} of mode "
                f"{stat.S_IMODE(mode):o} (chmod 600 {file})"
            )
        return _token_in(text, reward, expected)
    return ""


def _token_in(text: str, reward: str, expected: str) -> str:
    token = text.strip()
    # The message does not show the text: it may be a secret all the same.
    if not token:
        raise InputError(f"reward {reward}: expected {expected}; received nothing")
    if not _fits_header(token):
        raise InputError(f"reward {reward}: expected {expected}; received other text")
    return token


def _fits_header(token: str) -> bool:
    """Whether a text can be sent as it is: line breaks would end the header, and a blank would end the token."""
    return token.isascii() and token.isprintable() and " " not in token


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    # An IPv6 address may come in brackets, as in a URL, and with a zone after "%".
    address = host.strip("[]").partition("%")[0]
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return host == "localhost"
