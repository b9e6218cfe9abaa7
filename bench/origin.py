"""The origin server behind the proxies, as one uvloop process: ``python -m bench.origin PORT [BLOB_BYTES]``.

It is an authorization server that grants client credentials at once, an MCP endpoint that requires the token
(``/mcp``; ``/events``, ``/apart`` and ``/parts`` answer with event streams), an event stream that is held open
(``/stream``) and a large body (``/blob``). It is raw protocol code, so that it is never the slowest part; if nginx is
installed, nginx serves ``/mcp`` and ``/blob`` instead.
"""

import asyncio
import json
import sys
from collections import deque
from typing import Any, cast

import httptools
import uvloop

from bench.workloads import BODY, EVENT_STREAMS, TOOL_RESULT

TOKEN = "bench-access-token"
CHALLENGE = 'Bearer resource_metadata="{base}/.well-known/oauth-protected-resource{path}"'
RESOURCE_PREFIX = "/.well-known/oauth-protected-resource"
TOOLS = [{"name": "echo", "description": "Repeats its input.", "inputSchema": {"type": "object", "properties": {}}}]
SERVER_INFO = {"name": "bench-origin", "version": "1"}
CHUNK = b"\0" * 65536

REQUEST_BODY = BODY.encode()
AUTHORIZATION = b"Bearer " + TOKEN.encode()
STREAM_REQUESTS = {b"POST " + path.encode(): parts for path, parts in EVENT_STREAMS.items()}

LAG = 16
"""Requests after which the second part of an answer is sent. Sent at once, a busy proxy would read both parts together:
99 of 100 times, as measured with 32 connections."""

MAX_LAG_SECONDS = 0.002
"""Seconds after which the rest is sent although no further requests came, in steps of as much."""


def resource_metadata(base: str, path: str, issuer: str) -> dict[str, Any]:
    """Return protected resource metadata (RFC 9728 §3.2)."""
    return {"resource": base + path, "authorization_servers": [issuer]}


def server_metadata(issuer: str) -> dict[str, Any]:
    """Return authorization server metadata (RFC 8414 §3.2)."""
    return {
        "issuer": issuer,
        "authorization_endpoint": f"{issuer}/authorize",
        "token_endpoint": f"{issuer}/token",
        "response_types_supported": ["code"],
        "grant_types_supported": ["authorization_code", "client_credentials"],
        "code_challenge_methods_supported": ["S256"],
        "token_endpoint_auth_methods_supported": ["client_secret_basic"],
    }


def mcp_answer(message: dict[str, Any]) -> dict[str, Any] | None:
    """Return the answer to one JSON-RPC message, or None for a notification."""
    if "id" not in message:
        return None
    result: dict[str, Any]
    match message.get("method"):
        case "initialize":
            version = message["params"]["protocolVersion"]
            result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": SERVER_INFO}
        case "server/discover":
            result = {
                "resultType": "complete",
                "supportedVersions": ["2026-07-28"],
                "capabilities": {"tools": {}},
                "serverInfo": SERVER_INFO,
                "ttlMs": 3_600_000,
                "cacheScope": "private",
            }
        case "tools/list":
            result = {"resultType": "complete", "tools": TOOLS, "ttlMs": 3_600_000, "cacheScope": "private"}
        case _:
            result = TOOL_RESULT
    return {"jsonrpc": "2.0", "id": message["id"], "result": result}


class DelayedWrites:
    """Send the second parts of answers, each apart from the first (see LAG)."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[asyncio.Transport, bytes]] = deque()
        self.timer: asyncio.TimerHandle | None = None
        self.added = self.written = 0
        self.due = 0
        """How many of those added had been there at the last tick."""

    def add(self, transport: asyncio.Transport, data: bytes) -> None:
        self.waiting.append((transport, data))
        self.added += 1
        if len(self.waiting) > LAG:
            self.write_next()
        if self.timer is None:
            self.due = self.added - 1
            self.timer = asyncio.get_running_loop().call_later(MAX_LAG_SECONDS, self.tick)

    def write_next(self) -> None:
        transport, data = self.waiting.popleft()
        self.written += 1
        if not transport.is_closing():
            transport.write(data)

    def tick(self) -> None:
        while self.written < self.due:
            self.write_next()
        self.due = self.added
        self.timer = asyncio.get_running_loop().call_later(MAX_LAG_SECONDS, self.tick) if self.waiting else None


class Origin(asyncio.Protocol):
    """One client connection; requests are answered in order."""

    def __init__(self, base: str, blob_bytes: int, delayed: DelayedWrites) -> None:
        self.base = base
        self.delayed = delayed
        self.blob_bytes = blob_bytes
        self.writable = asyncio.Event()
        self.writable.set()
        self.blob: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.parser = httptools.HttpRequestParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.blob:
            self.blob.cancel()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        # The load's own request comes whole: to find that out takes a tenth of the time of parsing it.
        if data.endswith(REQUEST_BODY) and AUTHORIZATION in data:
            parts = STREAM_REQUESTS.get(data[: data.find(b" HTTP/")])
            if parts is not None:
                self.send_parts(*parts)
                return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def on_message_begin(self) -> None:
        self.target = self.body = b""
        self.authorized = False

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"authorization":
            self.authorized = value == AUTHORIZATION

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        path = self.target.decode().partition("?")[0]
        if path.startswith(RESOURCE_PREFIX):
            self.json(resource_metadata(self.base, path.removeprefix(RESOURCE_PREFIX), self.base))
        elif path == "/.well-known/oauth-authorization-server":
            self.json(server_metadata(self.base))
        elif path == "/token":
            self.json({"access_token": TOKEN, "token_type": "Bearer", "expires_in": 86400})
        elif path not in ("/mcp", "/stream", "/blob", *EVENT_STREAMS):
            self.head("404 Not Found", "content-length: 0")
        elif not self.authorized:
            challenge = CHALLENGE.format(base=self.base, path=path)
            self.head("401 Unauthorized", "content-length: 0", f"www-authenticate: {challenge}")
        elif path == "/stream" and not self.body:
            event = b'data: {"jsonrpc":"2.0","method":"notifications/message","params":{}}\n\n'
            self.head("200 OK", "content-type: text/event-stream", "transfer-encoding: chunked")
            self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        elif path == "/blob" and not self.body:
            length = f"content-length: {self.blob_bytes}"
            self.head("200 OK", "content-type: application/octet-stream", "connection: close", length)
            self.blob = asyncio.create_task(self.send_blob())
        elif path in EVENT_STREAMS:
            self.send_parts(*EVENT_STREAMS[path])
        else:
            self.answer_mcp()

    def send_parts(self, first: bytes, second: bytes) -> None:
        self.transport.write(first)
        if second:
            self.delayed.add(self.transport, second)

    def answer_mcp(self) -> None:
        answer = mcp_answer(json.loads(self.body)) if self.body else None
        if answer is None:
            self.head("202 Accepted", "content-length: 0")
        else:
            self.json(answer)

    async def send_blob(self) -> None:
        left = self.blob_bytes
        while left > 0:
            await self.writable.wait()
            self.transport.write(CHUNK[:left])
            left -= len(CHUNK)
        self.transport.close()

    def head(self, status: str, *fields: str) -> None:
        self.transport.write("\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode())

    def json(self, value: dict[str, Any]) -> None:
        body = json.dumps(value, separators=(",", ":")).encode()
        fields = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.transport.write(fields.encode() + body)


async def serve(port: int, blob_bytes: int) -> None:
    base = f"http://127.0.0.1:{port}"
    delayed = DelayedWrites()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Origin(base, blob_bytes, delayed), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
