"""A TCP server that sends what a script sends, byte by byte, also what no HTTP server would send."""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from typing import Self


class Peer:
    """One connection of a client; ``gone`` is done when the client has closed or reset it."""

    def __init__(self, server: "RawServer", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self.gone = asyncio.Event()

    async def request(self) -> bytes:
        """Return the next request, with a body as long as Content-Length says."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        request = head + await self._reader.readexactly(length)
        self._server.requests.append(request)
        return request

    async def head(self) -> bytes:
        """Return the head of a request and leave the body unread."""
        return await self._reader.readuntil(b"\r\n\r\n")

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    @property
    def alpn(self) -> str | None:
        """Return the protocol negotiated in TLS (ALPN)."""
        tls = self._writer.get_extra_info("ssl_object")
        return tls.selected_alpn_protocol() if tls else None

    async def pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry bytes to and from another connection until one of the two ends."""

        async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65_536):
                    sink.write(data)
                    await sink.drain()

        ways = [asyncio.ensure_future(carry(self._reader, writer)), asyncio.ensure_future(carry(reader, self._writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            writer.close()

    def reset(self) -> None:
        """Close with RST."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def until_gone(self) -> None:
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(65_536):
                pass
        self.gone.set()


Script = Callable[[Peer], Awaitable[None]]


class RawServer:
    """Runs the script for each connection, and closes the connection when the script ends."""

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None) -> None:
        self.peers: list[Peer] = []
        self.requests: list[bytes] = []
        self._script = script
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def idle(self) -> bool:
        """Whether every connection has ended."""
        return not self._tasks

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}/mcp"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(self, reader, writer)
        self.peers.append(peer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._script(peer)
        except (ConnectionError, asyncio.IncompleteReadError):
            peer.gone.set()
        finally:
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()


def answers(*responses: bytes) -> Script:
    """Return a script that answers each request with the next response, then waits until the client disconnects."""

    async def script(peer: Peer) -> None:
        for response in responses:
            await peer.request()
            await peer.send(response)
        await peer.until_gone()

    return script


def ok(body: bytes = b"hi") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
