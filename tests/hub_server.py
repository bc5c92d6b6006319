"""A stand-in of the Hugging Face Hub's HTTP interface on loopback: what its own client asks for up- and downloads.

Models and data sets lie in memory; large files go by git-LFS. `TOKEN` may write, `READER` may not, and names that begin
with `hidden/` are answered as gated.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN, READER = "hf_writer", "hf_reader"


class Hub:
    """Repositories by (kind, name): files, commit messages, whether private."""

    def __init__(self):
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.messages: dict[tuple[str, str], list[str]] = {}
        self.private: dict[tuple[str, str], bool] = {}
        self.large: dict[str, bytes] = {}
        self.agents: set[str] = set()

    def add(self, kind: str, name: str, files: dict[str, bytes]) -> None:
        """Makes a repository of some files."""
        self.files[kind, name] = dict(files)
        self.messages[kind, name] = []

    def commit(self, key: tuple[str, str]) -> str:
        """The commit that a repository is at: a hash of its content."""
        digest = hashlib.sha1()
        for path, content in sorted(self.files[key].items()):
            digest.update(path.encode() + b"\0" + content)
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    root: str

    def log_message(self, *_):
        pass

    def _answer(self, status: int, content: object = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _may_write(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == TOKEN:
            return True
        if token == READER:
            self._answer(403, {"error": "no write access"})
        else:
            self._answer(
                401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials"
            )
        return False

    def do_POST(self):
        body, path = self._body(), unquote(urlsplit(self.path).path)
        self.hub.agents.add(self.headers.get("User-Agent", ""))
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if not self._may_write():
            return None
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or "me"
            name = asked["name"] if "/" in asked["name"] else f"{owner}/{asked['name']}"
            key = asked.get("type", "model"), name
            if key in self.hub.files:
                return self._answer(409, {"error": "exists", "url": f"{self.root}/{name}"})
            self.hub.add(*key, {})
            self.hub.private[key] = asked.get("private") or asked.get("visibility") == "private"
            return self._answer(200, {"url": f"{self.root}/{name}", "name": name})
        if match := re.fullmatch(r"/api/(\w+)s/(.+)/preupload/(\w+)", path):
            files = []
            for file in json.loads(body)["files"]:
                mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            return self._answer(200, {"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = []
            for file in json.loads(body)["objects"]:
                href = f"{self.root}/upload/{file['oid']}"
                objects.append(file | {"actions": {"upload": {"href": href, "header": {}}}})
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/(\w+)s/(.+)/commit/(\w+)", path):
            return self._commit((match[1], match[2]), body)
        return self._answer(404, {"error": path})

    def _commit(self, key: tuple[str, str], body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.messages[key].append(value["summary"])
            elif entry["key"] == "file":
                self.hub.files[key][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.files[key][value["path"]] = self.hub.large[value["oid"]]
        oid = self.hub.commit(key)
        url = f"{self.root}/{key[1]}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def do_PUT(self):
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.hub.large[self.path.rpartition("/")[2]] = content
        self._answer(200, ETag='"stored"')

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            key = "dataset" if match[1] else "model", match[2]
            content = self.hub.files.get(key, {}).get(match[4])
            if content is None:
                return self._answer(404, {}, X_Error_Code="EntryNotFound")
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self._answer(200, content, ETag=etag, X_Repo_Commit=self.hub.commit(key))
        match = re.fullmatch(r"/api/(\w+)s/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?.*", path)
        if match is None:
            return self._answer(404, {"error": path})
        key = match[1], match[2]
        if key[1].startswith("hidden/"):
            return self._answer(403, {}, X_Error_Code="GatedRepo")
        if key not in self.hub.files:
            return self._answer(404, {}, X_Error_Code="RepoNotFound")
        commit = self.hub.commit(key)
        if match[4] not in (None, "main", commit):
            return self._answer(404, {}, X_Error_Code="RevisionNotFound")
        entries = []
        for name, content in self.hub.files[key].items():
            oid = hashlib.sha1(content).hexdigest()
            entries.append({"type": "file", "path": name, "size": len(content), "oid": oid})
        if match[3] == "tree":
            return self._answer(200, entries)
        siblings = [{"rfilename": entry["path"]} for entry in entries]
        return self._answer(200, {"id": key[1], "sha": commit, "siblings": siblings})


@contextlib.contextmanager
def served() -> Iterator[tuple[Hub, str]]:
    """A Hub, and its address, for as long as the body runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    root = f"http://127.0.0.1:{server.server_port}"
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub, "root": root})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, root
    finally:
        server.shutdown()
        server.server_close()


def environment(root: str, cache: object, token: str = TOKEN) -> dict[str, str]:
    """The environment of a process for which this is the Hub."""
    chosen = {
        "HF_ENDPOINT": root,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    return {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | chosen
