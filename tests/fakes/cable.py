"""A TCP forwarder between a client and a server, which can be cut, or let nothing through any more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self


class Cable:
    """Forward each connection to ``port`` of loopback. ``cut`` and ``block`` last until ``mend``."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._server: asyncio.Server
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self._open = asyncio.Event()
        self._open.set()

    @classmethod
    @asynccontextmanager
    async def running(cls, target: int) -> AsyncIterator[Self]:
        """Forward until the block ends."""
        cable = cls(target)
        cable._server = await asyncio.start_server(cable._accept, "127.0.0.1", 0)
        try:
            yield cable
        finally:
            cable.cut()
            cable._server.close()
            await cable._server.wait_closed()

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut(self) -> None:
        """End all connections, and new ones at once."""
        self._is_cut = True
        self._open.set()
        for writer in self._writers:
            writer.transport.abort()

    def block(self) -> None:
        """Let nothing through: connections stay open, and nobody hears anything."""
        self._open.clear()

    def mend(self) -> None:
        """Forward again; what was held back goes on."""
        self._is_cut = False
        self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        await self._open.wait()
        try:
            if self._is_cut:
                return
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(back)
            try:
                await asyncio.gather(self._copy(reader, back), self._copy(there, writer))
            finally:
                self._writers.discard(back)
                back.transport.abort()
        except OSError:
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            await self._open.wait()
            target.write(data)
            await target.drain()
        target.transport.abort()
