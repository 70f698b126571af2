"""A proxy before the S3 server of the tests that does what networks and servers do: slow down, break, stall, go away.

It hands requests on with the Host that the client signed, so the server still checks every signature.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from tests.s3_server import S3Server

FOR_EVER = 10**9
ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>injected</Message></Error>'
BUSY, EXPIRED = (503, "SlowDown"), (403, "ExpiredToken")


class Request(NamedTuple):
    method: str
    path: str  # /bucket/key?query
    range: str
    token: str  # session token
    time: float  # monotonic seconds


@dataclass
class Fault:
    """What happens to the next `times` requests of objects whose key ends with `suffix`, after `after` good ones."""

    suffix: str
    method: str = "GET"
    times: int = 1
    after: int = 0
    status: tuple[int, str] | None = None  # answer with this error
    after_bytes: int | None = None  # send so many bytes of the body (-1: not even the status), then ...
    ending: str = "reset"  # ... "reset" the connection, "close" it, or "stall": keep it open and silent
    byte_s: float = 0  # send the body a byte at a time, so many seconds apart
    change: Callable[[bytes], bytes] | None = None  # send another body, as of an object of another size
    is_short: bool = False  # ... as less than was asked for of the same object
    seen: int = 0

    def hits(self) -> bool:
        self.seen += 1
        return self.after < self.seen <= self.after + self.times


@dataclass
class S3Proxy:
    """Forward to `server` within a `with` block, at an endpoint of its own."""

    server: S3Server
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    refused_tokens: set[str] = field(default_factory=set)

    def inject(self, suffix: str = "", **about) -> Fault:
        self.faults.append(Fault(suffix, **about))
        return self.faults[-1]

    def go_away(self) -> None:
        """Refuse connections and break those that are open."""
        self._is_away.set()
        self._http.shutdown()
        self._http.server_close()

    def come_back(self) -> None:
        self._is_away.clear()
        self._listen(self.port)

    def gets(self, suffix: str) -> list[Request]:
        return [request for request in self.requests if request.method == "GET" and request.path.endswith(suffix)]

    def __enter__(self) -> S3Proxy:
        self._lock, self._is_away, self._is_over = threading.Lock(), threading.Event(), threading.Event()
        self._listen(0)
        self.port = self._http.server_port
        self.endpoint = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *error) -> None:
        self._is_over.set()
        if not self._is_away.is_set():
            self.go_away()

    def _listen(self, port: int) -> None:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _answer(self) -> None:
                proxy._answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

            def log_message(self, *args) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *args) -> None:
                pass  # clients hang up: that is what is tested

        self._http = Server(("127.0.0.1", port), Handler)
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _answer(self, client: BaseHTTPRequestHandler) -> None:
        if self._is_away.is_set():
            _reset(client)
            return
        body = client.rfile.read(int(client.headers.get("Content-Length") or 0))
        token = client.headers.get("X-Amz-Security-Token") or ""
        request = Request(client.command, client.path, client.headers.get("Range") or "", token, time.monotonic())
        key = client.path.partition("?")[0]
        is_object = key.count("/") > 1
        with self._lock:
            self.requests.append(request)
            asked = [fault for fault in self.faults if fault.method == client.command and key.endswith(fault.suffix)]
            fault = next((fault for fault in asked if is_object and fault.hits()), None)
        if token in self.refused_tokens:
            _send_error(client, *EXPIRED)
        elif fault and fault.status:
            _send_error(client, *fault.status)
        else:
            self._forward(client, body, fault)

    def _forward(self, client: BaseHTTPRequestHandler, body: bytes, fault: Fault | None) -> None:
        upstream = http.client.HTTPConnection(self.server.endpoint.removeprefix("http://"))
        with contextlib.closing(upstream):
            upstream.putrequest(client.command, client.path, skip_host=True, skip_accept_encoding=True)
            for name, value in client.headers.items():
                if name.lower() not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            data = response.read()
        if fault and fault.change:
            changed = fault.change(data)
            if "Content-Range" in response.headers and not fault.is_short:
                more = len(changed) - len(data)
                begin, end, total = re.split("[-/]", response.headers["Content-Range"])
                response.headers.replace_header("Content-Range", f"{begin}-{int(end) + more}/{int(total) + more}")
            data = changed
        if not fault or fault.after_bytes != -1:
            self._send_head(client, response, len(data))
        if client.command == "HEAD":
            return
        if fault and fault.byte_s:
            for byte in data:
                client.wfile.write(bytes([byte]))
                time.sleep(fault.byte_s)
        elif fault and fault.after_bytes is not None:
            client.wfile.write(data[: max(fault.after_bytes, 0)])
            if fault.ending == "stall":
                while not self._is_over.wait(0.05) and _is_open(client.connection):
                    pass
            if fault.ending == "reset":
                _reset(client)
            client.close_connection = True
        else:
            client.wfile.write(data)

    def _send_head(self, client: BaseHTTPRequestHandler, response: http.client.HTTPResponse, num_bytes: int) -> None:
        client.send_response_only(response.status)
        for name, value in response.headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                client.send_header(name, value)
        is_head = client.command == "HEAD"
        client.send_header("Content-Length", response.headers["Content-Length"] if is_head else str(num_bytes))
        client.end_headers()


def _send_error(client: BaseHTTPRequestHandler, status: int, code: str) -> None:
    data = ERROR.format(code).encode()
    client.send_response_only(status)
    client.send_header("Content-Type", "application/xml")
    client.send_header("Content-Length", str(len(data)))
    client.end_headers()
    client.wfile.write(b"" if client.command == "HEAD" else data)


def _reset(client: BaseHTTPRequestHandler) -> None:
    """Close with an RST: what was sent and not yet read is lost, too."""
    client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close_connection = True
    client.connection.close()


def _is_open(connection: socket.socket) -> bool:
    try:
        connection.settimeout(0.01)
        return connection.recv(1, socket.MSG_PEEK) != b""
    except TimeoutError:
        return True
    except OSError:
        return False
