"""A real HTTP server of a test's own, that answers as the test says."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable


class Endpoint:
    """Answers every POST with `reply(number, handler, body)`: (status, headers, bytes), or None to hang up.

    Attributes:
      bodies: what was received.
      headers: of each request.
    """

    def __init__(self, reply: Callable):
        self.bodies, self.headers, self.lock, owner = [], [], threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with owner.lock:
                    number = len(owner.bodies)
                    owner.bodies.append(body)
                    owner.headers.append((self.path, dict(self.headers)))
                answer = reply(number, self, body)
                if answer is None:
                    return
                status, headers, data = answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    self.wfile.write(data)
                except ConnectionError:
                    pass

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.server.server_address[:2])

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
