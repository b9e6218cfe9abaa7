"""What the fakes share: a recorded request, a log of them, and a scripted response."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self
from urllib.parse import parse_qs, parse_qsl

from starlette.types import Receive, Scope, Send

Abort = Callable[[tuple[str, int]], None]
"""Resets the connection of a peer; ``LocalServer.abort``."""


class Absent(Enum):
    """A value that removes its key, in a mapping of changes."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


def changed(document: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """Return the document with the changes; a value of ABSENT removes the key."""
    return {key: value for key, value in {**document, **changes}.items() if value is not ABSENT}


@dataclass(kw_only=True)
class RecordedRequest:
    """One request as it was received. ``gone`` is set if the client disconnects before the response ends."""

    method: str
    path: str
    query_string: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    client: tuple[str, int]
    endpoint: str = ""
    """Of an authorization server: metadata, register, authorize, consent, token, revoke, userinfo or other."""
    gone: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    done: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @classmethod
    async def read(cls, scope: Scope, receive: Receive) -> Self:
        """Read a request with its whole body."""
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        return cls(
            method=scope["method"],
            path=scope["raw_path"].decode("latin-1"),
            query_string=scope["query_string"].decode("latin-1"),
            headers=list(scope["headers"]),
            body=body,
            client=tuple(scope["client"]),
        )

    def header(self, name: str) -> str | None:
        """Return the first field of this name, or None."""
        return next(iter(self.all(name)), None)

    def all(self, name: str) -> list[str]:
        """Return every field of this name."""
        return [value.decode("latin-1") for key, value in self.headers if key.decode("latin-1") == name.lower()]

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(self.query_string, keep_blank_values=True)

    @property
    def form(self) -> dict[str, str]:
        """Return the form in the body, or the query if there is no body."""
        source = self.body.decode("utf-8", "replace") if self.body else self.query_string
        return dict(parse_qsl(source, keep_blank_values=True))

    @property
    def message(self) -> dict[str, Any]:
        """Return the JSON object in the body; empty if it is not one."""
        try:
            found = json.loads(self.body)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def bearer(self) -> str | None:
        """Return the bearer token of the Authorization header, or None."""
        scheme, _, token = (self.header("authorization") or "").partition(" ")
        return token if scheme.lower() == "bearer" else None

    @property
    def rpc_method(self) -> str:
        return str(self.message.get("method", ""))

    @property
    def tool(self) -> str:
        """Return the name of the tool that is called, or an empty string."""
        params = self.message.get("params")
        return str(params.get("name", "")) if self.rpc_method == "tools/call" and isinstance(params, dict) else ""


class Channel:
    """A stream whose chunks a test sends one by one, open until it is closed."""

    def __init__(self) -> None:
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()

    def put(self, chunk: bytes) -> None:
        self._chunks.put_nowait(chunk)

    def event(self, message: Mapping[str, object]) -> None:
        """Put one server-sent event with this JSON-RPC message."""
        self.put(sse(message))

    def close(self) -> None:
        """End the stream after the chunks put so far."""
        self._chunks.put_nowait(None)

    def __call__(self) -> AsyncIterator[bytes]:
        return self._read()

    async def _read(self) -> AsyncIterator[bytes]:
        while (chunk := await self._chunks.get()) is not None:
            yield chunk


@dataclass(kw_only=True)
class FakeResponse:
    """A response. With ``stream`` the body comes from there in chunks, else it has a Content-Length."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    stream: Callable[[], AsyncIterator[bytes]] | None = None
    gate: asyncio.Event | None = None
    """If given, nothing is sent until it is set."""
    head: bool = True
    """False: nothing is sent; with ``reset`` the connection breaks, else it stays silent."""
    reset: bool = False
    """True: the connection is reset instead of ending the body."""

    @classmethod
    def json(cls, document: object, status: int = 200, **headers: str) -> Self:
        body = json.dumps(document).encode()
        return cls(status=status, headers=(("content-type", "application/json"), *_named(headers)), body=body)

    @classmethod
    def html(cls, body: str = "<html><h1>Maintenance</h1></html>", status: int = 200, **headers: str) -> Self:
        return cls(status=status, headers=(("content-type", "text/html"), *_named(headers)), body=body.encode())

    @classmethod
    def gzipped(cls, document: object, content_type: str = "application/json") -> Self:
        """Return a compressed response, which the proxy must forward byte by byte."""
        body = gzip.compress(json.dumps(document).encode(), mtime=0)
        return cls(headers=(("content-type", content_type), ("content-encoding", "gzip")), body=body)

    @classmethod
    def events(cls, stream: Callable[[], AsyncIterator[bytes]], *, reset: bool = False, **headers: str) -> Self:
        """Return a stream of server-sent events."""
        return cls(headers=(("content-type", "text/event-stream"), *_named(headers)), stream=stream, reset=reset)

    @classmethod
    def redirect(cls, location: str, status: int = 302) -> Self:
        return cls(status=status, headers=(("location", location),))

    @classmethod
    def too_many(cls, retry_after: str = "7") -> Self:
        return cls(
            status=429, headers=(("retry-after", retry_after), ("content-type", "text/plain")), body=b"slow down"
        )

    @classmethod
    def hang(cls) -> Self:
        """Return a response that never comes, until the client disconnects."""
        return cls(head=False)

    @classmethod
    def drop(cls) -> Self:
        """Return a response that is a closed connection, after the request was read."""
        return cls(head=False, reset=True)

    async def deliver(self, received: RecordedRequest, receive: Receive, send: Send, abort: Abort) -> None:
        """Send it; notice if the client disconnects meanwhile."""
        try:
            if self.stream is None and self.gate is None and self.head and not self.reset:
                await self._produce(send)
                return
            if await finished_before_leaving(self._produce(send), received, receive) and self.reset:
                abort(received.client)
                await _left(receive)
        finally:
            received.done.set()

    async def _produce(self, send: Send) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if not self.head:
            if not self.reset:
                await asyncio.Event().wait()
            return
        framing = () if self.stream or self.reset else (("content-length", str(len(self.body))),)
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (*self.headers, *framing)]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        if self.stream is not None:
            async for chunk in self.stream():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                # uvicorn's send() to a disconnected client returns at once: yield, so that the loop can report it.
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": self.body, "more_body": self.reset})


FakeResponses = FakeResponse | Callable[[RecordedRequest], FakeResponse | None]
"""A response, or a function from request to response; None lets the fake answer."""


def resolve(answers: FakeResponses | None, received: RecordedRequest) -> FakeResponse | None:
    return answers(received) if callable(answers) else answers


async def finished_before_leaving(work: Any, received: RecordedRequest, receive: Receive) -> bool:
    """Await ``work`` and return True; if the client disconnects first, cancel it and return False."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
            return True
        received.gone.set()
        return False
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def sse(message: Mapping[str, object], event_id: str | None = None) -> bytes:
    """Return one server-sent event."""
    lines = [f"id: {event_id}"] if event_id is not None else []
    return "\n".join([*lines, "event: message", f"data: {json.dumps(message)}", "", ""]).encode()


def _named(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((name.replace("_", "-"), value) for name, value in headers.items())


class RequestLog:
    """The requests that a fake received, in order."""

    def __init__(self) -> None:
        self.requests: list[RecordedRequest] = []
        self._news = asyncio.Event()

    def add(self, received: RecordedRequest) -> None:
        self.requests.append(received)
        self._news.set()
        self._news = asyncio.Event()

    async def wait_for(
        self, wanted: Callable[[RecordedRequest], bool] = lambda _: True, *, count: int = 1
    ) -> RecordedRequest:
        """Return the ``count``-th request that is wanted, past or future. Raises TimeoutError after 5 seconds."""
        async with asyncio.timeout(5):
            while True:
                found = [received for received in self.requests if wanted(received)]
                if len(found) >= count:
                    return found[count - 1]
                await self._news.wait()
