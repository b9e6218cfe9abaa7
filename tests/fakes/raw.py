"""HTTP byte by byte, on either side of the proxy: what no library would send, or would hide."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

SECONDS = 10
Turn = Callable[["RawExchange"], Awaitable[None]]


@dataclass
class RawAnswer:
    """A response as it came in. ``ended`` tells a body that was complete from one that broke off."""

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
        """Connect; ``buffer`` bounds in bytes what the kernel takes for us while we don't read."""
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
        """Send as it is; ``HOST`` in a text stands for the proxy's address, and line feeds for CRLF."""
        self.writer.write(
            data if isinstance(data, bytes) else data.replace("HOST", self.host).replace("\n", "\r\n").encode()
        )

    def post(self, body: bytes, *fields: str, path: str = "/notes/mcp") -> None:
        """Send one POST with a Content-Length."""
        lines = [f"POST {path} HTTP/1.1", "Host: HOST", "Content-Type: application/json", *fields]
        self.send("\n".join([*lines, f"Content-Length: {len(body)}", "", ""]))
        self.send(body)

    def get(self, path: str = "/notes/mcp", *fields: str) -> None:
        """Send one GET that asks for events."""
        self.send("\n".join([f"GET {path} HTTP/1.1", "Host: HOST", "Accept: text/event-stream", *fields, "", ""]))

    async def answer(self) -> RawAnswer:
        """Read one response to its end, or to where it breaks off."""
        status, headers = await self.head()
        named = dict(headers)
        try:
            async with asyncio.timeout(SECONDS):
                if named.get("transfer-encoding") == "chunked":
                    return RawAnswer(status, headers, *await self._chunks())
                length = int(named.get("content-length", 0))
                body = await self.reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            return RawAnswer(status, headers, error.partial, False)
        return RawAnswer(status, headers, body, True)

    async def head(self) -> tuple[int, list[tuple[str, str]]]:
        """Read the head of a response; names in lower case."""
        async with asyncio.timeout(SECONDS):
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
        """Be gone at once."""
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


@dataclass
class RawExchange:
    """One request to a raw server, and the connection to answer it on."""

    head: bytes
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int
    """Counts the requests of this connection, from 1."""

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


@dataclass
class RawServer:
    """Reads requests and answers each as ``turn`` says; the connection is kept unless ``turn`` closes it."""

    turn: Turn
    origin: str = ""
    requests: list[RawExchange] = field(default_factory=list)
    connections: int = 0

    @property
    def url(self) -> str:
        return f"{self.origin}/mcp"

    @classmethod
    @asynccontextmanager
    async def running(cls, turn: Turn | bytes) -> AsyncIterator[Self]:
        """One that listens on loopback; bytes are said to every request, and the connection is closed then."""

        async def say_and_close(exchange: RawExchange) -> None:
            assert isinstance(turn, bytes)
            await exchange.say(turn)
            exchange.writer.close()

        server = cls(say_and_close if isinstance(turn, bytes) else turn)
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(server._serve(reader, writer))
            tasks.add(task)

        listener = await asyncio.start_server(accept, "127.0.0.1", 0)
        server.origin = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        try:
            yield server
        finally:
            listener.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = 0
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(x[15:]) for x in head.split(b"\r\n") if x.startswith(b"content-length:")), 0)
                number += 1
                exchange = RawExchange(head, await reader.readexactly(length), reader, writer, number)
                self.requests.append(exchange)
                await self.turn(exchange)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()


def ok(body: bytes = b"{}", *fields: str) -> bytes:
    """A plain JSON response."""
    lines = ["HTTP/1.1 200 OK", "content-type: application/json", *fields, f"content-length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body
