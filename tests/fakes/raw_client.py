"""An HTTP client that sends bytes as they are, also what no library would send."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

SECONDS = 20


@dataclass
class RawResponse:
    """A response as it was received; ``ended`` is False if the body was cut off."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    ended: bool

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


class RawClient:
    """One connection to the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    @asynccontextmanager
    async def to(cls, origin: str, *, buffer: int | None = None) -> AsyncIterator[Self]:
        """Connect; ``buffer`` limits the kernel's receive buffer, in bytes."""
        parts = urlsplit(origin)
        sock = socket.socket()
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=2**16)
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()

    @property
    def host(self) -> str:
        name, port = self.writer.get_extra_info("peername")[:2]
        return f"{name}:{port}"

    def send(self, data: bytes | str) -> None:
        """Send bytes as they are; in a text, replace ``HOST`` by the proxy's address and line feeds by CRLF."""
        self.writer.write(
            data if isinstance(data, bytes) else data.replace("HOST", self.host).replace("\n", "\r\n").encode()
        )

    def post(self, body: bytes, *fields: str, path: str = "/notes/mcp") -> None:
        """Send one POST with a Content-Length."""
        lines = [f"POST {path} HTTP/1.1", "Host: HOST", "Content-Type: application/json", *fields]
        self.send("\n".join([*lines, f"Content-Length: {len(body)}", "", ""]))
        self.send(body)

    def get(self, path: str = "/notes/mcp", *fields: str) -> None:
        """Send one GET that accepts an event stream."""
        self.send("\n".join([f"GET {path} HTTP/1.1", "Host: HOST", "Accept: text/event-stream", *fields, "", ""]))

    async def answer(self, seconds: float = SECONDS) -> RawResponse:
        """Read one response to its end, or until it is cut off; wait that long for its head, and then for its body."""
        status, headers = await self.head(seconds)
        named = dict(headers)
        try:
            async with asyncio.timeout(seconds):
                if named.get("transfer-encoding") == "chunked":
                    return RawResponse(status, headers, *await self._chunks())
                length = int(named.get("content-length", 0))
                body = await self.reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            return RawResponse(status, headers, error.partial, False)
        return RawResponse(status, headers, body, True)

    async def head(self, seconds: float = SECONDS) -> tuple[int, list[tuple[str, str]]]:
        """Read the head of a response: status, and fields with names in lower case."""
        async with asyncio.timeout(seconds):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = [line.partition(":") for line in lines[1:] if line]
        return int(lines[0].split()[1]), [(name.lower(), value.strip()) for name, _, value in pairs]

    async def rest(self, seconds: float = SECONDS) -> bytes:
        """Read until the proxy closes the connection."""
        async with asyncio.timeout(seconds):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    def drop(self) -> None:
        """Close the connection at once."""
        self.writer.transport.abort()

    async def _chunks(self) -> tuple[bytes, bool]:
        body = b""
        try:
            while True:
                size = int(await self.reader.readuntil(b"\r\n"), 16)
                body += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
                if not size:
                    return body, True
        except (asyncio.IncompleteReadError, ConnectionError):
            return body, False
