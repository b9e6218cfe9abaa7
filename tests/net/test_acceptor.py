"""Connections that are accepted, refused, or closed for others, over sockets of this process (T83)."""

import asyncio
import errno
import os
import select
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self, cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from fakes.proxy import until
from mcp_auth_proxy.errors import ClientDisconnected
from mcp_auth_proxy.net import acceptor
from mcp_auth_proxy.net.acceptor import Acceptor
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.connection_limits import ConnectionLimits, ConnectionRules
from mcp_auth_proxy.net.http_server import HttpServerConnection
from mcp_auth_proxy.observability import metrics

GOOD = b"GET /good HTTP/1.1\r\nHost: a\r\n\r\n"
HELD = b"GET /held HTTP/1.1\r\nHost: a\r\n\r\n"
LARGE = b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n"
STREAM = b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n"
BODY = b"POST /good HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"


class Server:
    """Answers ``/large`` with more than the kernel buffers, ``/stream`` without end, ``/held`` when it is told to."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.held = 0
        self.disconnects = 0

    def try_fast_path(self, request: ClientRequest) -> bool:
        return False

    async def serve(self, request: ClientRequest) -> None:
        try:
            await request.body(10**7, lambda size: True)
        except ClientDisconnected:
            self.disconnects += 1
            return
        if request.path == b"/stream":
            await request.start(200, [])
            while not request.disconnected:
                await request.write(b"x" * 65_536)
            self.disconnects += 1
        if request.path == b"/held":
            self.held += 1
            await self.release.wait()
        request.respond(200, [], b"x" * (20_000_000 if request.path == b"/large" else 2))


class Connection(HttpServerConnection):
    body_patience = 0.3
    send_patience = 0.3


class Client:
    """One connection, which reads nothing before it is asked to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    async def open(cls, port: int, first: bytes = b"") -> Self:
        sock = socket.socket()
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", port))
        if first:
            await loop.sock_sendall(sock, first)
        return cls(sock)

    async def read(self) -> bytes:
        """Return what comes first, ``b""`` at the end, ``b"reset"`` if the connection was reset."""
        try:
            return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.sock, 65_536), 5)
        except ConnectionResetError:
            return b"reset"

    async def status(self) -> int:
        return int((await self.read()).split()[1])


class Running:
    def __init__(self, port: int, server: Server) -> None:
        self.port = port
        self.server = server
        self.clients: list[Client] = []

    async def client(self, first: bytes = b"") -> Client:
        self.clients.append(await Client.open(self.port, first))
        return self.clients[-1]

    async def hold(self, count: int) -> list[Client]:
        """Let so many requests run."""
        clients = [await self.client(HELD) for _ in range(count)]
        await until(lambda: self.server.held == count, "requests that run")
        return clients


@asynccontextmanager
async def accepting(
    connections: int, listening: socket.socket | None = None, protocol: type[Connection] = Connection
) -> AsyncIterator[Running]:
    sock = listening or socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(100)
    sock.setblocking(False)
    server, state = Server(), ServerState()
    config = uvicorn.Config(cast(Any, server), log_config=None)
    limits = ConnectionLimits(ConnectionRules.of(connections, connections))
    accepting = Acceptor(sock, limits, lambda slot: protocol(config, state, {}, slot=slot))
    running = Running(sock.getsockname()[1], server)
    try:
        yield running
    finally:
        accepting.close()
        await accepting.wait_closed()
        server.release.set()
        for client in running.clients:
            client.sock.close()
        await until(lambda: not state.connections and not state.tasks, "the end of all connections")
        sock.close()


async def test_a_connection_too_many_is_refused_though_its_client_only_sends() -> None:
    async with accepting(2) as running:
        held = await running.hold(2)
        for first in (b"", GOOD, BODY + b"x" * 100_000):
            refused = await running.client(first)
            response = await refused.read()
            assert response.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nretry-after: 5\r\n" in response
            assert b"\r\nconnection: close\r\n" in response
            assert await refused.read() == b""
        running.server.release.set()
        assert [await client.status() for client in held] == [200, 200]
        # They are idle now, and make room.
        assert await (await running.client(GOOD)).status() == 200


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
async def test_refused_connections_take_few_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "LINGER", 0.3)
    async with accepting(1) as running:
        await running.hold(1)
        before = len(os.listdir("/proc/self/fd"))
        refused = [await running.client(GOOD) for _ in range(60)]
        for client in refused:
            assert await client.status() == 503
        assert len(os.listdir("/proc/self/fd")) <= before + 60 + acceptor.MAX_REFUSED
        await until(lambda: len(os.listdir("/proc/self/fd")) == before + 60, "the end of refused connections")
        assert await (await running.client(GOOD)).status() == 503


async def test_a_slow_body_makes_room_only_after_a_while() -> None:
    async with accepting(2) as running:
        slow = [await running.client(BODY) for _ in range(2)]
        statuses: list[int] = []

        async def ask() -> bool:
            statuses.append(await (await running.client(GOOD)).status())
            return statuses[-1] == 200

        assert not await ask()
        async with asyncio.timeout(5):
            while not await ask():
                for client in slow:
                    await asyncio.get_running_loop().sock_sendall(client.sock, b"x" * 100)
        await until(lambda: running.server.disconnects == 1, "a handler that knows that its client is lost")
        readable, _, _ = select.select([client.sock for client in slow], [], [], 0)
        assert [sock.recv(13) for sock in readable] == [b"HTTP/1.1 408 "]


async def test_an_incomplete_head_and_an_unread_response_make_room() -> None:
    async with accepting(2) as running:
        unread = await running.client(LARGE)
        assert (await unread.read()).startswith(b"HTTP/1.1 200 ")
        head = await running.client(GOOD[:-2])
        for _ in range(3):
            assert await (await running.client(GOOD)).status() == 200
        assert await head.status() == 408
        received = b""
        while (part := await unread.read()) not in (b"", b"reset"):
            received += part
        assert len(received) < 20_000_000


@pytest.mark.skipif(not hasattr(select, "POLLRDHUP"), reason="the system does not tell that a client is gone")
async def test_connections_whose_clients_are_gone_make_room_at_once() -> None:
    async with accepting(2) as running:
        for _ in range(50):
            client = await running.client(GOOD)
            assert await client.status() == 200
            client.sock.close()


async def test_clients_that_never_read_make_room_only_after_a_while() -> None:
    async with accepting(2) as running:
        pipelined = [await running.client(STREAM + GOOD * 20) for _ in range(2)]
        for client in pipelined:
            assert (await client.read()).startswith(b"HTTP/1.1 200 ")
        assert await (await running.client(GOOD)).status() == 503
        statuses = [503]
        for _ in range(100):
            if statuses[-1] == 200:
                break
            await asyncio.sleep(0.05)
            statuses.append(await (await running.client(GOOD)).status())
        assert statuses[-1] == 200
        await until(lambda: running.server.disconnects >= 1, "the end of a response that nobody reads")


async def test_without_descriptors_the_listener_waits_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Exhausted(socket.socket):
        failures = 0

        def accept(self) -> tuple[socket.socket, Any]:
            if self.failures < 5:
                self.failures += 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    monkeypatch.setattr(acceptor, "PAUSE", 0.02)
    listening = Exhausted()
    async with accepting(3, listening) as running:
        assert await (await running.client(GOOD)).status() == 200
        assert listening.failures == 5
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == "new connections of clients have to wait: Too many open files"


async def test_requests_that_are_too_slow_are_named_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Impatient(Connection):
        header_timeout = 0.2
        body_timeout = 0.3

    slow = metrics.closed_connections.labels("slow")
    before = slow.value
    async with accepting(10, protocol=Impatient) as running:
        late = [await running.client(first) for first in (BODY + b"x" * 100_000, BODY, GOOD[:-2], b"")]
        assert [await client.read() for client in late[3:]] == [b""]  # it sent nothing: there is nothing to answer
        assert [await client.status() for client in late[:3]] == [408] * 3
    assert slow.value == before + 3
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == "client 127.0.0.1 sends too slowly: its request was not complete in time (408)"
