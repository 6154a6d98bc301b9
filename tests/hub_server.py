"""A stand-in for the model hub: it takes repositories, files and commits, and keeps what it was sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """`files` holds the content of each committed file, `repositories` what was asked when each was made."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repositories: list[dict[str, Any]] = []
        self.tokens: set[str] = set()
        self.status = 200
        self.url = ""
        self.objects: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """What the hub says to a request."""
        if self.status != 200:
            return self.status, {"error": "no"}
        if path.startswith("/objects/"):
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            return 200, {"url": f"{self.url}/team/policy", "id": "team/policy"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {
                        "path": each["path"],
                        "uploadMode": modes[each["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for each in asked
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.url}/objects/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    self.files[entry["value"]["path"]] = self.objects[entry["value"]["oid"]]
            return 200, {"commitUrl": f"{self.url}/team/policy/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
        if method == "GET" and path.startswith("/api/models/"):
            return 200, {"id": "team/policy", "modelId": "team/policy", "sha": "0" * 40, "siblings": [], "tags": []}
        return 404, {"error": f"{method} {path} is not known here"}


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub at a port of its own."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            hub.tokens.add((self.headers.get("authorization") or "").removeprefix("Bearer "))
            status, value = hub.answer(self.command, self.path.partition("?")[0], body)
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _reply

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
