"""A web server of a folder that can misbehave; it also answers as S3 does, enough for reading."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from s3fs import S3FileSystem


class Server:
    """Serves ``folder`` from a thread; use it as a context manager.

    Attributes:
        faults: path -> what to do wrong at its next requests, one after the other: a status such
            as ``500``, ``short`` (half of it, honestly), ``cut`` (half of it, claiming all),
            ``wrong`` (other bytes), ``more`` (a byte too many), ``stall``, ``drip``.
        rate: bytes per second of every answer; 0: as fast as it goes.
        requests: path -> number of GET requests.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.rate = 0
        self.requests: Counter[str] = Counter()
        self.stopped = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _QuietServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Server:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()

    def answers_s3(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let ``s3://bucket/`` be this server's folder ``bucket``."""
        monkeypatch.setenv("AWS_ENDPOINT_URL", self.url)
        monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})
        # fsspec keeps what it once opened, and with it the address of an earlier test's server.
        S3FileSystem.clear_instance_cache()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients are killed, and connections with them."""


class _Handler(BaseHTTPRequestHandler):
    owner: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        fault = ""
        if not head:
            self.owner.requests[path] += 1
            if self.owner.faults[path]:
                fault = self.owner.faults[path].pop(0)
        file = self.owner.folder / path
        if fault.isdigit() or not file.is_file():
            self.send_error(int(fault or 404))
            return
        content = file.read_bytes()
        if fault == "wrong":
            content = bytes(len(content))
        elif fault == "more":
            content += b"!"
        elif fault == "short":
            content = content[: len(content) // 2]
        status, total = 200, len(content)
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last or total) + 1]
            status = 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if status == 206:
            end = int(first) + len(content) - 1
            self.send_header("Content-Range", f"bytes {first}-{end}/{total}")
        self.send_header("Last-Modified", formatdate(usegmt=True))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if not head:
            self._send(content, fault)

    def _send(self, content: bytes, fault: str) -> None:
        try:
            if fault in ("cut", "stall"):
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                if fault == "stall":
                    self.owner.stopped.wait(60)
                self.close_connection = True
                return
            rate = 2000 if fault == "drip" else self.owner.rate
            piece = max(1, rate // 50) if rate else len(content) or 1
            for start in range(0, len(content), piece):
                self.wfile.write(content[start : start + piece])
                self.wfile.flush()
                if rate:
                    time.sleep(piece / rate)
        except OSError:  # the client has gone
            self.close_connection = True
