"""A proxy between a client and an S3 server that makes trouble by rules and counts the calls.

    with FaultProxy("http://127.0.0.1:5000", seed=1).serving() as proxy:
        proxy.fail("503", operation=Operation.PUT, times=1)  # the next PUT is answered with 503
        proxy.fail("reset_after", probability=0.3)           # 30 % of all calls
        ... a client that uses proxy.endpoint ...
        assert proxy.count(Operation.PUT) == 2
        proxy.clear()                                        # no trouble from here on

It is a thread of the test's own process, so rules and calls are plain objects; other processes (a
driver, Ray's workers) reach it by its address. The integration tests have it as the fixtures
`fault_proxy` and `faulty_bucket`, before the S3 server that they share.

The first rule that matches a call and has times left decides it. What a kind does:

    500 503 429 409     the error answer of S3, and the server is not asked. 409 is
                        ConditionalRequestConflict
    403 skew no_bucket  so too: AccessDenied, RequestTimeTooSkewed, NoSuchBucket
    reset_before        the connection is reset, and the server is not asked
    reset_after         the server does it, then the connection is reset: the answer is lost
    500_after           the server does it, and the client is told 500
    error_in_200        status 200 with an error in its body, as CompleteMultipartUpload may answer;
                        the server is not asked
    hang, hang_after    no answer until the client goes; the server is not asked, or does it
    truncate            half of the answer's body, or of its first line if it has no body
    slow                the answer's body comes at SLOW_BYTES_PER_S

Headers and bodies pass unchanged, so the signatures of servers that check them stay right.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import socket
import struct
import threading
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

SLOW_BYTES_PER_S = 10

Answered = Literal["500", "503", "429", "409", "403", "skew", "no_bucket"]
Kind = (
    Answered
    | Literal["reset_before", "reset_after", "500_after", "error_in_200"]
    | Literal["hang", "hang_after", "truncate", "slow"]
)

QUICK: tuple[Kind, ...] = (
    "500",
    "503",
    "429",
    "reset_before",
    "reset_after",
    "500_after",
    "truncate",
)
"""Trouble that costs no waiting."""
ERRORS: dict[Answered, tuple[int, str, str]] = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "429": (429, "TooManyRequests", "Please reduce your request rate."),
    "409": (
        409,
        "ConditionalRequestConflict",
        "The conditional request cannot succeed due to a conflicting operation.",
    ),
    "403": (403, "AccessDenied", "Access Denied"),
    "skew": (
        403,
        "RequestTimeTooSkewed",
        "The difference between the request time and the current time is too large.",
    ),
    "no_bucket": (404, "NoSuchBucket", "The specified bucket does not exist"),
}


class Operation(StrEnum):
    """What a call asks of S3."""

    GET = "GET"
    HEAD = "HEAD"
    LIST = "LIST"
    PUT = "PUT"
    DELETE = "DELETE"
    CREATE_UPLOAD = "CreateMultipartUpload"
    UPLOAD_PART = "UploadPart"
    COMPLETE = "CompleteMultipartUpload"
    ABORT = "AbortMultipartUpload"
    OTHER = "other"


def operation_of(method: str, target: str) -> Operation:
    """Tell what a call asks, by its method and what follows the host in its address."""
    query = target.partition("?")[2]
    match method:
        case "GET" if "list-type=" in query or "prefix=" in query:
            return Operation.LIST
        case "GET" | "HEAD":
            return Operation(method)
        case "PUT":
            return Operation.UPLOAD_PART if "partNumber=" in query else Operation.PUT
        case "POST" if "uploadId=" in query:
            return Operation.COMPLETE
        case "POST" if "uploads" in query:
            return Operation.CREATE_UPLOAD
        case "DELETE":
            return Operation.ABORT if "uploadId=" in query else Operation.DELETE
        case _:
            return Operation.OTHER


@dataclass
class Rule:
    """Trouble for some calls."""

    kind: Kind
    operation: Operation | None = None
    """None: whatever is asked."""
    contains: str = ""
    """Part of the address, such as a key."""
    times: int | None = None
    """How many calls are left for it; None: no end."""
    probability: float = 1.0

    def takes(self, call: Call, dice: random.Random) -> bool:
        """Tell whether it decides a call, and count it."""
        if self.times == 0 or self.operation not in (None, call.operation):
            return False
        if self.contains not in call.target or dice.random() >= self.probability:
            return False
        if self.times is not None:
            self.times -= 1
        return True


class Call(NamedTuple):
    """One request that came to the proxy."""

    operation: Operation
    method: str
    target: str
    """The address without the host."""
    kind: Kind | None = None
    """The trouble that it got."""


@dataclass
class FaultProxy:
    """The proxy; `serving` runs it."""

    server: str
    """Address of the S3 server."""
    seed: int = 1
    rules: list[Rule] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    """All calls in the order in which they came; a test may clear it."""
    endpoint: str = ""
    """Where clients connect."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._dice = random.Random(self.seed)

    def fail(
        self,
        kind: Kind,
        *,
        operation: Operation | None = None,
        contains: str = "",
        times: int | None = None,
        probability: float = 1.0,
    ) -> Rule:
        """Add a rule and return it; set its `times` to 0 to end it."""
        known = {name for part in get_args(Kind) for name in (get_args(part) or [part])}
        assert kind in known, kind
        rule = Rule(kind, operation, contains, times, probability)
        with self._lock:
            self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget the rules and the calls."""
        with self._lock:
            self.rules, self.calls = [], []

    def count(self, *operations: Operation, contains: str = "") -> int:
        """Return how many calls came: of some operations, or of all."""
        with self._lock:
            wanted = [c for c in self.calls if not operations or c.operation in operations]
            return sum(contains in call.target for call in wanted)

    @property
    def faults(self) -> int:
        """How many calls got trouble."""
        with self._lock:
            return sum(call.kind is not None for call in self.calls)

    @contextlib.contextmanager
    def serving(self) -> Iterator[FaultProxy]:
        """Serve on a free port of this machine."""
        ready, loop = threading.Event(), asyncio.new_event_loop()
        thread = threading.Thread(target=self._serve, args=(loop, ready), name="fault proxy")
        thread.start()
        ready.wait()
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _serve(self, loop: asyncio.AbstractEventLoop, ready: threading.Event) -> None:
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(
            asyncio.start_server(self._connected, "127.0.0.1", 0, limit=1 << 20)
        )
        self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        loop.run_forever()
        loop.run_until_complete(_wind_up(server))
        loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._handle(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # ends come and go, and so does the proxy
        finally:
            writer.transport.abort()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request; the connection ends with it."""
        request = await _read_request(reader, writer)
        kind = self._decide(request)
        match kind:
            case "reset_before":
                return _reset(writer)
            case "hang":
                await reader.read()
                return None
            case "error_in_200":
                return await _send(writer, _error(request, 200, *ERRORS["500"][1:]))
            case "500" | "503" | "429" | "409" | "403" | "skew" | "no_bucket":
                return await _send(writer, _error(request, *ERRORS[kind]))
            case _:
                answer = await self._ask(request)
        match kind:
            case "reset_after":
                return _reset(writer)
            case "hang_after":
                await reader.read()
                return None
            case "500_after":
                return await _send(writer, _error(request, *ERRORS["500"]))
            case "truncate":
                head, end, body = answer.partition(b"\r\n\r\n")
                half = head + end + body[: len(body) // 2] if body else head[: len("HTTP/1.1")]
                return await _send(writer, half)
            case "slow":
                return await _send_slowly(writer, answer)
            case _:
                return await _send(writer, answer)

    def _decide(self, request: _Request) -> Kind | None:
        call = Call(operation_of(request.method, request.target), request.method, request.target)
        with self._lock:
            kind = next((rule.kind for rule in self.rules if rule.takes(call, self._dice)), None)
            self.calls.append(call._replace(kind=kind))
        return kind

    async def _ask(self, request: _Request) -> bytes:
        """Have the server do it; return its whole answer."""
        address = urlsplit(self.server)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(request.raw)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()


async def _wind_up(server: asyncio.Server) -> None:
    """End what is under way, also what was accepted just now."""
    server.close()
    for _ in range(3):
        await asyncio.sleep(0.02)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


class _Request(NamedTuple):
    method: str
    target: str
    raw: bytes
    """Head and body, for the server, which is to close the connection after its answer."""


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Request:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b"".join([block async for block in _chunks(reader)])
    else:
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    kept = [
        line
        for line in lines
        if line.partition(":")[0].lower()
        not in ("connection", "expect", "content-length", "transfer-encoding")
    ]
    kept += ["Connection: close", f"Content-Length: {len(body)}"]
    return _Request(method, target, "\r\n".join([first, *kept, "", ""]).encode("latin-1") + body)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    for _ in itertools.count():
        size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        block = await reader.readexactly(size)
        await reader.readuntil(b"\r\n")
        if not size:
            return
        yield block


def _error(request: _Request, status: int, code: str, message: str) -> bytes:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code>'
        f"<Message>{message}</Message><RequestId>1</RequestId></Error>"
    ).encode()
    head = (
        f"HTTP/1.1 {status} Trouble\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    return head if request.method == "HEAD" else head + body


async def _send(writer: asyncio.StreamWriter, answer: bytes) -> None:
    writer.write(answer)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def _send_slowly(writer: asyncio.StreamWriter, answer: bytes) -> None:
    head, end, body = answer.partition(b"\r\n\r\n")
    writer.write(head + end)
    for start in range(0, len(body), SLOW_BYTES_PER_S // 5):
        writer.write(body[start : start + SLOW_BYTES_PER_S // 5])
        await writer.drain()
        await asyncio.sleep(0.2)
    await _send(writer, b"")


def _reset(writer: asyncio.StreamWriter) -> None:
    # A connection that is closed without lingering is reset: the other end gets RST, not FIN.
    found: socket.socket = writer.get_extra_info("socket")
    found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
