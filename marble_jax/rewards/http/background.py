"""A bounded server that answers from a thread of its own until it is closed."""

from __future__ import annotations

import threading
from typing import Any

from marble_jax.errors import InputError
from marble_jax.rewards.http.connection_handler import ConnectionHandler
from marble_jax.rewards.http.connections import ConnectionServer, ServerOptions


class BackgroundServer(ConnectionServer):
    """Answers until closed; a context manager."""

    def __init__(
        self,
        name: str,
        host: str,
        port: int,
        options: ServerOptions,
        handler: type[ConnectionHandler] = ConnectionHandler,
    ):
        """Binds the address; `start` begins to answer.

        Args:
          name: of the thread.
          host: address to bind, an IPv6 one perhaps in brackets.
          port: to bind; 0 takes a free one.
          options: how it works.
          handler: answers a connection; one that scores unless given.

        Raises:
          InputError: an address that cannot be bound.
        """
        try:
            super().__init__((host.strip("[]"), port), options, handler)
        # The last two: names that no resolver is asked for.
        except (OSError, OverflowError, TypeError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"--host, --port: expected an address that is free; received {host}:{port} "
                f"({reason})"
            ) from None
        self._loop = threading.Thread(
            target=self.serve_forever, args=(0.1,), name=name, daemon=True
        )

    def start(self) -> None:
        """Begins to answer, once all that answers need is there."""
        self._loop.start()

    @property
    def origin(self) -> str:
        """Scheme, host and port that clients use."""
        host = self.server_name
        # The colons of an IPv6 address would be taken for the port's.
        if ":" in host:
            host = f"[{host}]"
        scheme = "http" if self.options.tls is None else "https"
        return f"{scheme}://{host}:{self.server_port}"

    def close(self) -> None:
        """Stops answering."""
        self.shutdown()
        self._loop.join()
        self.server_close()

    def __exit__(self, *_: Any) -> None:
        self.close()
