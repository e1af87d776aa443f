"""Transport of the loopback Hub: requests, answers, and the faults that a test asks for."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from loopback_hub_store import HubError

FAULTS = ("drop", "reset", "lose", "status", "truncate", "corrupt", "stall")


@dataclass
class Fault:
    """Misbehaviour of the next `times` requests that match.

    Attributes:
        match: Searched in "METHOD /unquoted/path?query".
        kind: One of FAULTS.
        times: Requests still to spoil.
        after: Bytes of the body that pass before a drop, reset or stall, or that a truncated body keeps; for
            `corrupt` the position of the wrong byte. None: half of an answer, nothing of an upload.
        status: Answer of `status`.
        retry_after: Seconds in its header Retry-After.
        code: Its header X-Error-Code.
        seconds: Length of a stall.
        fired: Requests spoilt so far.
    """

    match: re.Pattern
    kind: str
    times: int = 1
    after: int | None = None
    status: int = 503
    retry_after: int | None = None
    code: str | None = None
    seconds: float = 0.0
    fired: int = 0


@dataclass
class Answer:
    """What goes back to the client."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    @classmethod
    def of_error(cls, error: HubError) -> Answer:
        message = error.message.encode("ascii", "replace").decode().replace("\n", " ")
        headers = {"X-Error-Message": message, **error.headers}
        if error.code:
            headers["X-Error-Code"] = error.code
        return cls.of_json({"error": error.message}, error.status, headers)


@dataclass(frozen=True)
class Exchange:
    """One request in the log; `status` is 0 where no answer was sent."""

    method: str
    path: str
    status: int
    headers: dict[str, str] = field(repr=False)


class HubServer(ThreadingHTTPServer):
    """A listener on a free port of 127.0.0.1.

    Args:
        hub: Owner; has `answer(method, path, headers, body, cdn)`, `take`, `log` and `closing`.
        cdn: This is the listener of the large files, another origin than the Hub itself.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: Any, cdn: bool):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.cdn = hub, cdn
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave early are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: `hub.requests` is the log."""

    def serve(self) -> None:
        hub = self.server.hub
        path = unquote(self.path)
        request = f"{self.command} {path}"
        has_body = self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers

        def log(status: int) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.log.append(Exchange(self.command, path, status, headers))

        # An upload is cut while its body comes in, a download while its body goes out (in `send`).
        cut = hub.take(request, "drop", "reset") if has_body else None
        if cut:
            self.read_body(limit=cut.after or 0)
            log(0)
            return self.hang_up(reset=cut.kind == "reset")
        body = self.read_body()
        refused = hub.take(request, "status")
        lost = None if refused else hub.take(request, "lose")
        stalled = hub.take(request, "stall", before_body=True)
        if stalled:
            hub.closing.wait(stalled.seconds)
        if refused:
            headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
            message = HTTPStatus(refused.status).phrase
            answer = Answer.of_error(HubError(refused.status, message, refused.code, headers))
        else:
            answer = hub.answer(self.command, self.path, self.headers, body, self.server.cdn)
        if lost:
            log(0)
            return self.hang_up()
        log(answer.status)
        with contextlib.suppress(ConnectionError):
            self.send(answer, request)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = serve

    def read_body(self, limit: int | None = None) -> bytes:
        """The body of the request, or its first `limit` bytes."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(length if limit is None else min(length, limit))
        body = b""
        while limit is None or len(body) < limit:
            size = int(self.rfile.readline().split(b";")[0], 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        return body

    def send(self, answer: Answer, request: str) -> None:
        hub = self.server.hub
        body, fault = answer.body, None
        if body and self.command != "HEAD" and 200 <= answer.status < 300:
            fault = hub.take(request, "drop", "reset", "truncate", "corrupt", "stall")
        keep = len(body)
        if fault:
            keep = len(body) // 2 if fault.after is None else min(fault.after, len(body))
        if fault and fault.kind == "corrupt":
            at = min(keep, len(body) - 1)
            body, keep = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :], len(body)
        elif fault and fault.kind == "truncate":
            body = body[:keep]
        self.send_response(answer.status)
        for name, value in {"X-Request-Id": "loopback", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:keep])
        if fault and fault.kind in ("drop", "reset"):
            return self.hang_up(reset=fault.kind == "reset")
        if keep < len(body):
            hub.closing.wait(fault.seconds)
            self.wfile.write(body[keep:])

    def hang_up(self, reset: bool = False) -> None:
        """Close the connection, politely or with a TCP reset."""
        self.close_connection = True
        if reset:
            # The kernel sends RST only once every handle of the socket is closed.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()
