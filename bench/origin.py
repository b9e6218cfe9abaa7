"""What stands behind the proxies, as one uvloop process: ``python -m bench.origin PORT [BLOB_BYTES]``.

An authorization server that grants client credentials at once; an MCP endpoint that wants the token it
gave (``/mcp``); an event stream that is held open (``/stream``); a large body (``/blob``). Raw protocol
code, so that it is never the slowest part; where nginx is installed it answers ``/mcp`` and ``/blob`` instead.
"""

import asyncio
import json
import sys
from typing import Any, cast

import httptools
import uvloop

TOKEN = "bench-access-token"
CHALLENGE = 'Bearer resource_metadata="{base}/.well-known/oauth-protected-resource{path}"'
RESOURCE_PREFIX = "/.well-known/oauth-protected-resource"
TOOLS = [{"name": "echo", "description": "Says it again.", "inputSchema": {"type": "object", "properties": {}}}]
TOOL_RESULT: dict[str, Any] = {"resultType": "complete", "content": [{"type": "text", "text": "pong " * 40}]}
SERVER_INFO = {"name": "bench-origin", "version": "1"}
CHUNK = b"\0" * 65536


def resource_metadata(base: str, path: str, issuer: str) -> dict[str, Any]:
    """RFC 9728 §3.2."""
    return {"resource": base + path, "authorization_servers": [issuer]}


def server_metadata(issuer: str) -> dict[str, Any]:
    """RFC 8414 §3.2."""
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
    """The answer to one JSON-RPC message, or None for a notification."""
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


class Origin(asyncio.Protocol):
    """One client connection; requests are answered in order."""

    def __init__(self, base: str, blob_bytes: int) -> None:
        self.base = base
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
            self.authorized = value == b"Bearer " + TOKEN.encode()

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
        elif path not in ("/mcp", "/stream", "/blob"):
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
        else:
            self.answer_mcp()

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
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Origin(base, blob_bytes), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
