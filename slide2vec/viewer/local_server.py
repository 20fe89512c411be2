"""A web server for the page, for this machine and this user alone.

It listens on the loopback address, and every address begins with a random token. A request is refused
without it; by another host name than this machine's own, so that no site can reach it by having its own name
lead here (DNS rebinding); and when a page of another origin makes it. Nothing that is asked for is ever used
as a path: files of the page are looked up by name, slides by number.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from slide2vec.errors import ConfigError, Slide2VecError
from slide2vec.files import as_path, is_remote
from slide2vec.pictures import attention_key, encoded_picture, pca_key
from slide2vec.report.page import own_file
from slide2vec.viewer.viewed_run import ViewedRun

__all__ = ["ViewerServer", "viewer_server"]

logger = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
#: By which it may be called.
_HOSTS = {_LOOPBACK, "localhost"}
#: Seconds after which a connection that is not used is closed.
_IDLE_S = 60
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_TEXT, _JPEG, _PNG = "{}; charset=utf-8", "image/jpeg", "image/png"

Answer = tuple[str, bytes]


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class ViewerServer(ThreadingHTTPServer):
    """Serves a run until `shutdown`; a context manager.

    Attributes:
        address: of the page, with the token.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, run: ViewedRun, port: int) -> None:
        self.run, self.token = run, secrets.token_urlsafe(24)
        super().__init__((_LOOPBACK, port), _Handler)

    @property
    def address(self) -> str:
        return f"http://{_LOOPBACK}:{self.server_address[1]}/{self.token}/"

    def server_close(self) -> None:
        super().server_close()
        self.run.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a connection of the viewer failed", exc_info=True)  # a browser that went away, mostly


def viewer_server(
    run: str | Path,
    *,
    port: int = 0,
    encoder: str | None = None,
    slides_dir: Path | None = None,
    weights: str | None = None,
) -> ViewerServer:
    """The server of a page that shows a run; it answers within `serve_forever`.

    Args:
        run, encoder, slides_dir, weights: see `ViewedRun`.
        port: of 127.0.0.1; 0: one that is free.

    Raises:
        ArtifactError: it is no output directory of a run.
        ConfigError: the run has no such encoder or is behind a URL, or the port cannot be had.
    """
    directory = as_path(run)
    if is_remote(directory):
        raise ConfigError(f"{directory} is behind a URL: copy the run to local storage to view it")
    viewed = ViewedRun(directory, encoder, slides_dir, weights)
    try:
        return ViewerServer(viewed, port)
    except OSError as error:
        raise ConfigError(
            f"--port {port}: {error.strerror or error}; without --port a free one is taken"
        ) from error


class _Handler(BaseHTTPRequestHandler):
    server: ViewerServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "slide2vec", ""
    timeout = _IDLE_S
    disable_nagle_algorithm = True  # headers and body are two packets: the second waited 40 ms for the first

    def do_GET(self) -> None:
        try:
            kind, body = self._answer()
            self._send(HTTPStatus.OK, kind, body, kept=kind == _JPEG)
        except _Refused as error:
            self._send_sentence(error.status, str(error))
        except (Slide2VecError, OSError) as error:
            if isinstance(error, ConnectionError):
                raise
            self._send_sentence(HTTPStatus.NOT_FOUND, str(error))
        except Exception as error:
            logger.exception("the viewer cannot answer")
            self._send_sentence(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                f"an error of slide2vec itself: {type(error).__name__}: {error}",
            )

    do_HEAD = do_GET

    def _answer(self) -> Answer:
        self._check_origin()
        parts = urlsplit(self.path)
        token, _, path = parts.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            raise _Refused(
                HTTPStatus.FORBIDDEN,
                "the address lacks the token: take the whole address that slide2vec view printed",
            )
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, path):
                return answer(self.server.run, query, *map(int, found.groups()))
        if path in _FILES:
            return _FILES[path]()
        raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing of this name")

    def _check_origin(self) -> None:
        """Only what this page itself asks for, and whoever has typed or followed its address."""
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in _HOSTS and host not in _HOSTS:
            raise _Refused(
                HTTPStatus.FORBIDDEN, f"the viewer is at {_LOOPBACK} only, not at the host that was asked for"
            )
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        followed = self.headers.get("Sec-Fetch-Mode") == "navigate"
        if (origin is not None and origin != f"http://{host}") or not (
            site in ("same-origin", "none") or followed
        ):
            raise _Refused(HTTPStatus.FORBIDDEN, "pages of other origins may not ask for anything here")

    def _send(self, status: HTTPStatus, kind: str, body: bytes, *, kept: bool = False) -> None:
        self.send_response(status)
        cached = "private, max-age=3600" if kept else "no-store"
        for name, value in {**_HEADERS, "Content-Type": kind, "Cache-Control": cached}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_sentence(self, status: HTTPStatus, sentence: str) -> None:
        self._send(status, *_json({"error": sentence}))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses: other methods, malformed requests."""
        self.close_connection = True
        self._send_sentence(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses have the token."""


def _json(found: Any) -> Answer:
    return _TEXT.format("application/json"), json.dumps(found, separators=(",", ":")).encode()


def _number(query: Mapping[str, str], name: str, default: int | None = None) -> int | None:
    """Of a query; what is no number of at most nine digits is refused."""
    text = query.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise _Refused(HTTPStatus.BAD_REQUEST, f"{name} must be a number")
    return int(text)


def _encoder(query: Mapping[str, str]) -> int:
    return _number(query, "encoder", 0) or 0


def _colours(run: ViewedRun, query: Mapping[str, str], slide: int) -> Answer:
    by, tile = query.get("by", "pca"), _number(query, "tile")
    return _json(run.colours(slide, _encoder(query), by, tile, query.get("text")))


def _similar(run: ViewedRun, query: Mapping[str, str]) -> Answer:
    count, slide = _number(query, "count", 24) or 1, _number(query, "slide", 0) or 0
    return _json(run.similar(_encoder(query), count, slide, _number(query, "tile"), query.get("text")))


_N = "([0-9]{1,9})"
_SLIDE = f"slides/{_N}"
#: Pattern of a path -> what answers; numbers in the path are its arguments.
_ROUTES: list[tuple[str, Callable[..., Answer]]] = [
    (
        f"{_SLIDE}/image_files/{_N}/{_N}_{_N}\\.jpg",
        lambda run, query, *place: (_JPEG, run.picture(*place)),
    ),
    (f"{_SLIDE}/image\\.dzi", lambda run, query, slide: ("application/xml", run.descriptor(slide).encode())),
    (f"{_SLIDE}/slide\\.json", lambda run, query, slide: _json(run.slide(slide, _encoder(query)))),
    (f"{_SLIDE}/tissue\\.json", lambda run, query, slide: _json(run.outlines(slide, _encoder(query)))),
    (f"{_SLIDE}/colours\\.json", _colours),
    (
        f"{_SLIDE}/tiles/{_N}\\.jpg",
        lambda run, query, slide, tile: (_JPEG, run.tile(slide, _encoder(query), tile)),
    ),
    (r"similar\.json", _similar),
    (r"run\.json", lambda run, query: _json(run.facts())),
]


def _page(name: str, kind: str, shared: str = "") -> Callable[[], Answer]:
    """A file of the page, behind one of the report's."""

    def answer() -> Answer:
        own = files("slide2vec.viewer").joinpath(name).read_text(encoding="utf-8")
        return _TEXT.format(kind), ((own_file(shared) if shared else "") + own).encode()

    return answer


#: Whole paths -> what answers.
_FILES: dict[str, Callable[[], Answer]] = {
    "": _page("viewer.html", "text/html"),
    "viewer.css": _page("viewer.css", "text/css", "page.css"),
    "viewer.js": _page("viewer.js", "text/javascript", "elements.js"),
    "keys/pca.png": lambda: (_PNG, encoded_picture(pca_key(92), ".png")),
    "keys/nearness.png": lambda: (_PNG, encoded_picture(attention_key(92), ".png")),
}
