"""A stand-in for the Hugging Face hub: files of repositories over HTTP, as huggingface_hub asks for them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

__all__ = ["serve_hub"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(
    repositories: Mapping[str, Mapping[str, bytes]], gated: frozenset[str] = frozenset()
) -> Iterator[tuple[str, list[str]]]:
    """Serve {repository: {file: content}} until the block ends; gives the address and what is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = unquote(self.path.partition("?")[0]).strip("/")
            asked.append(f"{self.command} {path}")
            repo = next((each for each in repositories if f"{each}/" in f"{path}/"), None)
            if not path:
                self._send(200, b"", with_body)
            elif repo is None:
                self._send(404, b"", with_body, {"X-Error-Code": "RepoNotFound"})
            elif repo in gated:
                self._send(403, b"", with_body, {"X-Error-Code": "GatedRepo"})
            elif path.startswith(f"api/models/{repo}/tree/"):
                files = repositories[repo].items()
                listed = [
                    {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
                    for name, content in files
                ]
                self._send(200, json.dumps(listed).encode(), with_body)
            elif path.startswith("api/"):
                names = [{"rfilename": name} for name in repositories[repo]]
                content = {"id": repo, "sha": COMMIT, "siblings": names, "private": False, "tags": []}
                self._send(200, json.dumps(content).encode(), with_body)
            else:
                _, _, rest = path.partition(f"{repo}/resolve/")
                revision, _, name = rest.partition("/")
                content = repositories[repo].get(name)
                if content is None:
                    self._send(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})
                else:
                    found = {
                        "X-Repo-Commit": revision if len(revision) == 40 else COMMIT,
                        "ETag": f'"{_digest(content)}"',
                    }
                    self._send(200, content, with_body, found)

        def _send(
            self, status: int, content: bytes, with_body: bool, headers: Mapping[str, str] | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Not on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
