#   Copyright 2026 - present The PyMC Developers
#
#   Licensed under the Apache License, Version 2.0 (the "License");
#   you may not use this file except in compliance with the License.
#   You may obtain a copy of the License at
#
#       http://www.apache.org/licenses/LICENSE-2.0
#
#   Unless required by applicable law or agreed to in writing, software
#   distributed under the License is distributed on an "AS IS" BASIS,
#   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
#   See the License for the specific language governing permissions and
#   limitations under the License.
"""An S3 server on loopback, and a proxy before it that fails as object stores do."""

import http.client
import re
import threading

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

import pytest

__all__ = ["FAULTS", "Proxy", "s3_server"]

FAULTS = ("throttle", "error", "expire", "refuse", "drop", "truncate", "stall")
"""SlowDown, a 500, an expired credential, no answer, half a body, a short answer, and an answer that never ends."""

_ANSWERS = {
    "throttle": (503, "SlowDown"),
    "error": (500, "InternalError"),
    "expire": (400, "ExpiredToken"),
}
_LATENCY = 0.2
_STALL = 60.0
"""Seconds; longer than a client should wait."""


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the S3 protocol at a ``host:port``, with credentials for it in the environment."""
    server_module = pytest.importorskip("moto.server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        # All servers of a process share what they hold.
        urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
        yield f"{host}:{port}"
    finally:
        server.stop()


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    first: int
    """Byte at which the range begins."""
    length: int
    """Bytes of the answer."""
    signed: bool
    fault: str | None


@dataclass
class Proxy:
    """Passes requests on to *upstream*, except for those that it fails."""

    upstream: str
    endpoint: str = ""
    """Where it listens."""
    fault: str | None = None
    times: int = 0
    """How many of the next ranged reads that match fail."""
    only: str = ""
    """Part of the path of reads that fail."""
    span: tuple[int, int] = (0, 1 << 60)
    """Bytes between which a read that fails begins."""
    requests: list[Request] = field(default_factory=list)
    reading: int = 0
    """Number of ranged reads that wait for their answers."""
    most_reading: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def serve(self) -> Iterator[None]:
        """Listen at *endpoint*."""
        handler = type("Handler", (_Handler,), {"proxy": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            self.endpoint = "{}:{}".format(*server.server_address)
            yield
        finally:
            self.stop.set()
            server.shutdown()
            thread.join()
            server.server_close()

    def fail(self, fault: str, *, times: int = 1 << 30, only: str = "", span=(0, 1 << 60)) -> None:
        """Fail the next *times* reads that begin in *span* of paths with *only* in them."""
        self.fault, self.times, self.only, self.span = fault, times, only, span

    def choose(self, path: str, first: int | None) -> str | None:
        """Return the fault of a read, if it has one."""
        with self.lock:
            if first is None or not self.times or self.only not in path:
                return None
            if not self.span[0] <= first < self.span[1]:
                return None
            self.times -= 1
            return self.fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def do_GET(self) -> None:
        found = re.fullmatch(r"bytes=(\d+)-\d+", self.headers.get("Range", ""))
        first = int(found[1]) if found and self.command == "GET" else None
        fault = self.proxy.choose(self.path, first)
        status, headers, body = self.ask()
        if fault == "wait":
            self.wait()
            fault = None
        signed = "Authorization" in self.headers
        request = Request(self.command, self.path, first or 0, len(body), signed, fault)
        self.proxy.requests.append(request)
        if fault == "refuse":
            self.close_connection = True
        elif fault in _ANSWERS:
            status, code = _ANSWERS[fault]
            text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
            self.answer(status, {"Content-Type": "application/xml"}, text.encode())
        elif fault == "truncate":
            self.answer(status, headers, body[: len(body) // 2])
        elif fault:
            self.answer(status, headers, body[: len(body) // 2], length=len(body))
            self.proxy.stop.wait(_STALL if fault == "stall" else 0)
            self.close_connection = True
        else:
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            self.answer(status, headers, body, length=length)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def wait(self) -> None:
        with self.proxy.lock:
            self.proxy.reading += 1
            self.proxy.most_reading = max(self.proxy.reading, self.proxy.most_reading)
        self.proxy.stop.wait(_LATENCY)
        with self.proxy.lock:
            self.proxy.reading -= 1

    def ask(self) -> tuple[int, dict[str, str], bytes]:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=30)
        upstream.request(self.command, self.path, sent, dict(self.headers))
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        return answer.status, dict(answer.getheaders()), body

    def answer(self, status: int, headers: dict, body: bytes, *, length=None) -> None:
        skipped = ("content-length", "connection", "transfer-encoding", "date", "server")
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in skipped:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass
