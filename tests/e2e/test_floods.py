"""Clients that take connections: kept, silent, slow, unread, streams; from one address and from many (T83)."""

import asyncio
import json
import os
import re
import resource
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import ClassVar, Self, Unpack
from urllib.parse import urlsplit

import pytest

from fakes.fixtures import Servers
from fakes.http_exchange import Channel, FakeResponse, RecordedRequest
from fakes.proxy import ProxyProcess, Sections, proxy_process, until, write_config

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, and all of 127.0.0.0/8")

PING = json.dumps({"jsonrpc": "2.0", "id": 7, "method": "ping"}).encode()
HEAD = b"POST /notes/mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(PING), PING)
STREAM = b"GET /notes/mcp HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"

ATTACKS = {
    "silent": b"",
    "kept": REQUEST,
    "half a head": HEAD,
    "line breaks": b"\r\n",
    "a body that does not come": HEAD + b"Content-Length: 1000\r\n\r\n{",
    "a chunked body": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
    "unread": REQUEST * 20,
    "refused": b"nonsense\r\n\r\n",
    "streams": STREAM,
}
"""What each connection sends, and then no more."""

SMALL = 256
"""A limit on open files: 88 connections of clients, 66 of one address."""

ATTACKER, OTHER = "127.0.0.1", "127.0.0.2"
PROMPT = 5.0
"""Seconds. Usually it takes milliseconds, but the machine is busy with other tests."""


class Connection:
    """One connection from an address of loopback. All that were opened are closed when ``attacked`` ends."""

    opened: ClassVar[list["Connection"]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.opened.append(self)

    @classmethod
    async def open(cls, proxy: ProxyProcess, source: str = ATTACKER, first: bytes = b"") -> Self:
        parts = urlsplit(proxy.origin)
        sock = socket.socket()
        sock.setblocking(False)
        # Without a port: else the system would look for one that is free for all destinations.
        sock.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
        try:
            sock.bind((source, 0))
            await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
            made = cls(*await asyncio.open_connection(sock=sock))
        except BaseException:
            sock.close()
            raise
        made.writer.write(first)
        return made

    async def response(self) -> tuple[int, bytes]:
        """Read one response, of a stream its head only; return its status and its head."""
        async with asyncio.timeout(10):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            await self.reader.readexactly(int(length[1]) if length else 0)
        return int(head.split()[1]), head

    async def closed(self, seconds: float) -> float:
        """Wait until the proxy closes the connection; return how long it took."""
        begun = time.monotonic()
        async with asyncio.timeout(seconds):
            with suppress(ConnectionError):
                await self.reader.read()
        return time.monotonic() - begun

    def close(self) -> None:
        self.writer.transport.abort()


@asynccontextmanager
async def flood(proxy: ProxyProcess, sources: Sequence[str], first: bytes) -> AsyncIterator[list[Connection]]:
    """Keep a connection from each of the addresses until the block ends, and send the same on each.

    Afterwards the descriptors must be free again, and the attacker is served too.
    """
    before = descriptors(proxy)
    opened: list[Connection] = []
    try:
        for start in range(0, len(sources), 100):
            some = sources[start : start + 100]
            opened += await asyncio.gather(*(Connection.open(proxy, source, first) for source in some))
        yield opened
    finally:
        for connection in opened:
            connection.close()
    await until(lambda: descriptors(proxy) <= before + 2, "descriptors that are free again")
    assert await serves(proxy, sources[0])


async def answer(proxy: ProxyProcess, source: str) -> tuple[int, bytes]:
    """Send one request on a connection of its own; it must be answered promptly, whatever the answer is."""
    begun = time.monotonic()
    connection = await Connection.open(proxy, source, REQUEST)
    try:
        response = await connection.response()
    finally:
        connection.close()
    assert time.monotonic() - begun < PROMPT
    return response


async def settled(proxy: ProxyProcess, source: str = OTHER) -> None:
    """Wait, bounded, until the requests of a flood are answered: as long as they run, others may find no place."""
    for _ in range(100):
        if await serves(proxy, source):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("a flood is not over")


async def serves(proxy: ProxyProcess, source: str = OTHER) -> bool:
    return (await answer(proxy, source))[0] == 200


def descriptors(proxy: ProxyProcess) -> int:
    return len(os.listdir(f"/proc/{proxy.process.pid}/fd"))


def warnings(proxy: ProxyProcess) -> list[str]:
    # What one of the attacks sends is refused, which has a line of its own.
    return [line for line in proxy.err.splitlines() if " warning " in line and "is refused:" not in line]


async def closed_connections(proxy: ProxyProcess) -> dict[str, int]:
    """Return the counts of the metric, by reason."""
    connection = await Connection.open(proxy, "127.0.0.99", b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
    page = await connection.reader.read()
    connection.close()
    found = re.findall(rb'_inbound_connections_closed_total\{reason="(\w+)"\} (\d+)', page)
    return {reason.decode(): int(count) for reason, count in found}


@asynccontextmanager
async def attacked(
    servers: Servers, folder: Path, *, max_files: int = SMALL, **sections: Unpack[Sections]
) -> AsyncIterator[ProxyProcess]:
    """Run ``serve`` with a limit on open files, before a server without authorization, whose streams stay open."""
    upstream = await servers.mcp_server(protected=False)
    ended = Channel()

    def stream(_: RecordedRequest) -> FakeResponse:
        async def events() -> AsyncIterator[bytes]:
            yield b": open\n\n"
            async for chunk in ended():
                yield chunk

        return FakeResponse(headers=(("content-type", "text/event-stream"),), stream=events)

    upstream.answers["GET"] = stream
    config = write_config(folder, {"notes": upstream.url}, **sections)
    async with proxy_process(config, max_files=max_files) as proxy:
        try:
            assert await serves(proxy)
            yield proxy
        finally:
            # Also those of a test that failed: what is left open would fail another test.
            while Connection.opened:
                Connection.opened.pop().close()


@pytest.mark.parametrize(("attack", "max_files"), [*((attack, SMALL) for attack in ATTACKS), ("kept", 1024)])
async def test_a_flood_from_one_address_does_not_shut_out_others(
    servers: Servers, tmp_path: Path, attack: str, max_files: int
) -> None:
    async with attacked(servers, tmp_path, max_files=max_files) as proxy:
        async with flood(proxy, [ATTACKER] * (max_files + 50), ATTACKS[attack]):
            assert all([await serves(proxy) for _ in range(5)])
            assert descriptors(proxy) < max_files - 20
        (line,) = warnings(proxy)
        assert f"client {ATTACKER} has " in line
        assert "limits.connections_per_address" in line


async def test_idle_connections_make_room_for_new_ones_of_the_same_address(servers: Servers, tmp_path: Path) -> None:
    async with attacked(servers, tmp_path) as proxy:
        stream = await Connection.open(proxy, ATTACKER, STREAM)
        oldest = await Connection.open(proxy, ATTACKER, REQUEST)
        with closing(stream), closing(oldest):
            assert [(await connection.response())[0] for connection in (stream, oldest)] == [200, 200]
            async with flood(proxy, [ATTACKER] * 300, REQUEST):
                await settled(proxy, ATTACKER)
                assert all([await serves(proxy, ATTACKER) for _ in range(5)])
                await oldest.closed(PROMPT)
                newest = await Connection.open(proxy, ATTACKER, REQUEST)
                with closing(newest):
                    assert (await newest.response())[0] == 200
                    assert all([await serves(proxy, ATTACKER) for _ in range(5)])
                    newest.writer.write(REQUEST)
                    assert (await newest.response())[0] == 200
                assert not stream.reader.at_eof()  # it is not idle
                closed = await closed_connections(proxy)
                assert closed["evicted"] + closed.get("refused", 0) >= 230


async def test_idle_connections_of_many_addresses_make_room_for_others(servers: Servers, tmp_path: Path) -> None:
    crowd = [f"127.0.1.{1 + number % 100}" for number in range(400)]
    async with attacked(servers, tmp_path) as proxy:
        for attack in ("kept", "silent", "half a head"):
            async with flood(proxy, crowd, ATTACKS[attack]):
                await settled(proxy)
                assert all([await serves(proxy) for _ in range(5)])
        (line,) = warnings(proxy)
        assert "clients have 88 connections" in line
        assert re.search(r"limits\.connections\), \d+ of them from 127\.0\.1\.\d+:", line)


async def test_what_finds_no_place_is_answered_at_once(servers: Servers, tmp_path: Path) -> None:
    async with attacked(servers, tmp_path) as proxy, flood(proxy, [ATTACKER] * 66, STREAM) as streams:
        for stream in streams:
            assert (await stream.response())[0] == 200
        for _ in range(20):
            status, head = await answer(proxy, ATTACKER)
            assert (status, b"retry-after: 5\r\n" in head, b"connection: close\r\n" in head) == (503, True, True)
        silent = await Connection.open(proxy, ATTACKER)
        assert (await silent.response())[0] == 503
        await silent.closed(5)
        silent.close()
        assert await serves(proxy)
        assert (await closed_connections(proxy))["refused"] == 21
        streams.pop().close()
        await settled(proxy, ATTACKER)


async def test_160_kb_in_8_s_pass(servers: Servers, tmp_path: Path) -> None:
    async with attacked(servers, tmp_path) as proxy:
        connection = await Connection.open(proxy, ATTACKER, HEAD + b"Content-Length: 160000\r\n\r\n" + PING)
        for _ in range(16):
            await asyncio.sleep(0.5)
            connection.writer.write(b" " * 9990)
        connection.writer.write(b" " * (160_000 - 16 * 9990 - len(PING)))
        assert (await connection.response())[0] == 200
        connection.close()


async def test_addresses_of_trusted_proxies_share_only_the_limit_of_all(servers: Servers, tmp_path: Path) -> None:
    async with (
        attacked(servers, tmp_path, inbound={"trusted_proxies": ["127.0.0.0/31"]}) as proxy,
        flood(proxy, [ATTACKER] * 80, STREAM) as streams,
    ):
        for stream in streams:
            assert (await stream.response())[0] == 200
        assert await serves(proxy)
        assert warnings(proxy) == []


async def test_the_limits_can_be_set_and_changed_by_a_reload(servers: Servers, tmp_path: Path) -> None:
    limits = {"connections": 10, "connections_per_address": 3}
    async with attacked(servers, tmp_path, limits=limits) as proxy, flood(proxy, [ATTACKER] * 3, STREAM) as streams:
        for stream in streams:
            assert (await stream.response())[0] == 200
        assert not await serves(proxy, ATTACKER)
        config = tmp_path / "mcp-auth-proxy.yaml"
        config.write_text(config.read_text().replace("connections_per_address: 3", "connections_per_address: 4"))
        await settled(proxy, ATTACKER)
        streams.append(await Connection.open(proxy, ATTACKER, STREAM))
        assert (await streams[-1].response())[0] == 200
        assert not await serves(proxy, ATTACKER)


async def test_more_connections_than_descriptors_are_never_promised(servers: Servers, tmp_path: Path) -> None:
    async with attacked(servers, tmp_path, limits={"connections": 100_000}) as proxy:
        (line,) = warnings(proxy)
        assert "too few files for limits.connections: 88 connections" in line
        async with flood(proxy, [f"127.0.1.{1 + number % 100}" for number in range(300)], b""):
            assert await serves(proxy)


async def test_a_process_without_descriptors_accepts_again_later(servers: Servers, tmp_path: Path) -> None:
    async with attacked(servers, tmp_path) as proxy:
        pid = proxy.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        # The numbers of stdin, stdout and stderr are taken for as long as the process runs.
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        waiting = [await Connection.open(proxy, OTHER, REQUEST) for _ in range(5)]
        await until(lambda: "Too many open files" in proxy.err, "a warning")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        for connection in waiting:
            assert (await connection.response())[0] == 200
            connection.close()
        assert len(warnings(proxy)) == 1
