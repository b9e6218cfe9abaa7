"""Large and many requests: memory is bounded and given back, nobody waits for them, and one log line names them."""

import asyncio
import contextlib
import gzip
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import FakeResponse
from fakes.mcp_client import PlainClient
from fakes.mcp_server import FakeMcpServer, big
from fakes.proxy import ProxyProcess, proxy_process, running_proxy, until, write_config
from fakes.raw_client import RawClient, RawResponse

MIB = 1024 * 1024
LARGEST = 16 * MIB
HEAD = b"POST /notes/mcp HTTP/1.1\r\nhost: localhost\r\n"
KEY = b"io.mcp-auth-proxy/authorization"

SECONDS = 1.0
"""How long others wait at most, while this process sends the attack, too. The first body of these took 1.3 s, alone."""

PEAK = 160 * MIB
"""Bytes over those at the start: limits.memory, a body twice while it is put together, and what the allocator keeps."""

KEPT = 16 * MIB
"""Bytes that may stay. Ten bodies left 320 MiB."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def padded(before: bytes, part: bytes, after: bytes, size: int = LARGEST) -> bytes:
    return before + part * ((size - len(before) - len(after)) // len(part)) + after


CALL = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{'
BODIES = {
    "key first": padded(CALL + b'"inputResponses":{"%s":{"action":"accept"}},"x":[' % KEY, b"[],", b"0]}}"),
    "key last": padded(CALL + b'"x":[', b"[],", b'0],"inputResponses":{"%s":{"action":"accept"}}}}' % KEY),
    "key nested": padded(CALL + b'"x":[', b"[],", b'[[{"y":{"%s":[]}}]]]}}' % KEY),
    "members": padded(CALL + b'"%s":0,' % KEY, b'"a":{},', b'"b":0}}'),
    "escaped key": padded(CALL + b'"io.mcp-auth-pro\\u0078y/authorization":0,"x":[', b"[],", b"0]}}"),
    "objects": padded(CALL + b'"%s":0,"x":[' % KEY, b"{},", b"0]}}"),
    "numbers": padded(CALL + b'"%s":0,"x":[' % KEY, b"1.2345678901234567e-300,", b"0]}}"),
    "a string": padded(CALL + b'"%s":0,"x":"' % KEY, b"s", b'"}}'),
    "nesting": padded(CALL + b'"%s":0,"x":' % KEY, b"[", b""),
    "a batch": padded(b"[", b'{"jsonrpc":"2.0","id":1,"method":"%s"},' % KEY, b"{}]"),
    "not JSON": padded(KEY, b"]", b""),
}
SMALLER = {
    "lists": padded(CALL + b'"%s":0,"x":[' % KEY, b"[],", b"0]}}", MIB),
    "deep lists": padded(CALL + b'"%s":0,"x":[' % KEY, b"[" * 300 + b"]" * 300 + b",", b"0]}}", MIB),
    "numbers": padded(CALL + b'"%s":0,"x":[' % KEY, b"1.2345678901234567e-300,", b"0]}}", MIB),
    "integers": padded(CALL + b'"%s":0,"x":[' % KEY, b"9" * 4300 + b",", b"0]}}", MIB),
}
SMALL_CALL = CALL + b'"name":"echo","arguments":{"text":"x"}}}'


def resident(proxy: ProxyProcess) -> int:
    status = Path(f"/proc/{proxy.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


@dataclass
class Flooded:
    """A proxy process with a server ``notes`` that is flooded, and a server ``good`` that is not."""

    proxy: ProxyProcess
    upstream: FakeMcpServer
    good: PlainClient
    base: int
    peak: int = 0
    slowest: float = 0.0

    async def flood(self, bodies: list[bytes], *fields: str) -> list[RawResponse]:
        """Send requests at the same time, and meanwhile call the good server and look at the memory."""
        attack = asyncio.gather(*(self.post(body, *fields) for body in bodies))
        while True:
            over = attack.done()
            begun = time.monotonic()
            assert (await self.good.call("echo", text="x")).text == "x"
            self.slowest = max(self.slowest, time.monotonic() - begun)
            self.peak = max(self.peak, resident(self.proxy) - self.base)
            if over:
                return attack.result()

    async def post(self, body: bytes, *fields: str) -> RawResponse:
        async with RawClient.to(self.proxy.origin) as client:
            client.post(body, *fields)
            with contextlib.suppress(ConnectionError):
                await client.writer.drain()
            return await client.answer(40)

    async def ask(self) -> None:
        """Make the proxy ask for an authorization."""
        async with RawClient.to(self.proxy.origin) as client:
            client.post(SMALL_CALL)
            await self.proxy.next_link()

    async def post_many(self, stack: AsyncExitStack, count: int) -> list[RawClient]:
        """Send small calls, each on a connection of its own, which ends with ``stack``."""
        clients = [await stack.enter_async_context(RawClient.to(self.proxy.origin)) for _ in range(count)]
        for client in clients:
            client.post(SMALL_CALL)
        return clients

    async def assert_given_back(self, kept: int = KEPT) -> None:
        await until(lambda: resident(self.proxy) - self.base < kept, "memory is given back")
        assert await self.gauge("mcp_auth_proxy_buffered_bytes") == 0
        assert await self.gauge("mcp_auth_proxy_held_requests") == 0

    async def gauge(self, name: str) -> float:
        text = (await self.good.http.get(f"{self.proxy.origin}/metrics")).text
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        assert found
        return float(found[1])

    async def until_gauge(self, name: str, value: float) -> None:
        """Wait, bounded, until a gauge has a value."""
        async with asyncio.timeout(20):
            while await self.gauge(name) != value:  # noqa: ASYNC110  # it is in another process
                await asyncio.sleep(0.01)

    def overloads(self, key: str) -> list[str]:
        """Return the log lines that name a limit; each must name server and client."""
        lines = [line for line in self.proxy.err.splitlines() if f"{key} is used up" in line]
        assert all("server notes:" in line and "127.0.0.1" in line for line in lines)
        return lines


@asynccontextmanager
async def flooded(servers: Servers, folder: Path, *, wait: str = "1s", **limits: object) -> AsyncIterator[Flooded]:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    good = await servers.mcp_server(protected=False)
    config = write_config(
        folder, {"notes": upstream.url, "good": good.url}, authorization={"wait": wait}, limits=limits
    )
    async with proxy_process(config) as proxy, proxy.client("good") as client:
        assert (await client.call("echo", text="x")).text == "x"
        setup = Flooded(proxy, upstream, client, 0)
        await setup.ask()
        setup.base = resident(proxy)
        yield setup


def is_refused(answer: RawResponse) -> bool:
    """Return whether this is the answer to a request that was not parsed: 503 with the link."""
    error = json.loads(answer.body)
    return (
        answer.status == 503
        and error["id"] is None
        and "/connect/notes?flow=" in error["error"]["data"]["authorization_url"]
        and answer.all("retry-after") == ["5"]
    )


@pytest.mark.parametrize("name", BODIES)
async def test_a_large_body_stops_nobody_whatever_is_in_it(servers: Servers, tmp_path: Path, name: str) -> None:  # T82
    async with flooded(servers, tmp_path) as setup:
        (answer,) = await setup.flood([BODIES[name]])
        assert is_refused(answer)
        assert setup.slowest < SECONDS
        assert setup.peak < 60 * MIB
        await setup.assert_given_back()


@pytest.mark.parametrize("name", SMALLER)
async def test_a_body_that_takes_long_to_parse_is_not_parsed(
    servers: Servers, tmp_path: Path, name: str
) -> None:  # T82
    async with flooded(servers, tmp_path) as setup:
        answers = await setup.flood([SMALLER[name]] * 10)
        assert all(map(is_refused, answers))
        assert setup.slowest < SECONDS
        await setup.assert_given_back()


async def test_held_bodies_are_bounded_in_all_and_given_back(servers: Servers, tmp_path: Path) -> None:  # T82
    async with flooded(servers, tmp_path) as setup:
        for name in ("key last", "a string"):
            answers = await setup.flood([BODIES[name]] * 10)
            assert all(map(is_refused, answers))
        assert setup.slowest < SECONDS
        assert setup.peak < PEAK
        await setup.assert_given_back()
        assert len(setup.overloads("limits.memory")) == 1
        assert len(setup.proxy.err) < 10_000


async def test_a_body_for_which_there_is_no_memory_is_refused_at_once(servers: Servers, tmp_path: Path) -> None:  # T82
    async with flooded(servers, tmp_path, wait="30s", memory="40MiB") as setup:
        async with AsyncExitStack() as stack:
            held = await stack.enter_async_context(RawClient.to(setup.proxy.origin))
            held.post(BODIES["a string"])
            await setup.until_gauge("mcp_auth_proxy_buffered_bytes", len(BODIES["a string"]))
            begun = time.monotonic()
            assert is_refused(await setup.post(BODIES["a string"]))
            assert time.monotonic() - begun < 5
            # Small ones are held all the same.
            small = await stack.enter_async_context(RawClient.to(setup.proxy.origin))
            small.post(SMALL_CALL)
            await setup.until_gauge("mcp_auth_proxy_held_requests", 2)
            await consent(setup.proxy.links[0])
            assert (await held.answer()).status == 200
            assert (await small.answer()).status == 200
        assert max(len(call.body) for call in setup.upstream.calls("tools/call")) == len(BODIES["a string"])


async def test_a_body_that_never_fits_is_413(servers: Servers, tmp_path: Path) -> None:  # T82
    async with flooded(servers, tmp_path, memory="4MiB") as setup:
        answer = await setup.post(BODIES["a string"])
        assert (answer.status, b"limits.memory allows more" in answer.body) == (413, True)


@pytest.mark.parametrize("size", [1, 3])
async def test_a_body_in_tiny_chunks_takes_no_more_memory(servers: Servers, tmp_path: Path, size: int) -> None:  # T82
    async with flooded(servers, tmp_path) as setup:
        content = padded(CALL + b'"x":"', b"s", b'"}}', MIB // 2)
        chunks = b"".join(
            b"%x\r\n%s\r\n" % (len(part := content[at : at + size]), part) for at in range(0, len(content), size)
        )
        head = "POST /notes/mcp HTTP/1.1\nHost: HOST\nTransfer-Encoding: chunked\n\n"

        async def post() -> RawResponse:
            async with RawClient.to(setup.proxy.origin) as client:
                client.send(head)
                client.send(chunks + b"0\r\n\r\n")
                return await client.answer()

        attack = asyncio.create_task(post())
        while not attack.done():
            begun = time.monotonic()
            assert (await setup.good.call("echo", text="x")).text == "x"
            setup.slowest = max(setup.slowest, time.monotonic() - begun)
            setup.peak = max(setup.peak, resident(setup.proxy) - setup.base)
        assert b"/connect/notes" in attack.result().body
        assert setup.slowest < SECONDS
        assert setup.peak < 40 * MIB


HEADS = {
    "long heads": HEAD + b"x-a: " + b"a" * 60_000,
    "many fields": HEAD + b"".join(b"x-%d: %s\r\n" % (number, b"a" * 300) for number in range(190)),
    "bodies": HEAD + b"content-length: 100000\r\n\r\n" + b"a" * 60_000,
}


@pytest.mark.parametrize("name", HEADS)
async def test_what_clients_leave_incomplete_is_given_back(servers: Servers, tmp_path: Path, name: str) -> None:  # T82
    async with flooded(servers, tmp_path) as setup:
        async with AsyncExitStack() as stack:
            for _ in range(500):
                client = await stack.enter_async_context(RawClient.to(setup.proxy.origin))
                client.send(HEADS[name])
            await until(lambda: resident(setup.proxy) - setup.base > 20 * MIB, "heads that have arrived")
        await until(lambda: resident(setup.proxy) - setup.base < 2 * KEPT, "memory is given back", timeout=15)


async def test_requests_that_wait_are_bounded_in_number(servers: Servers, tmp_path: Path) -> None:  # T82
    async with flooded(servers, tmp_path, wait="60s", held=2000) as setup:
        await setup.until_gauge("mcp_auth_proxy_held_requests", 0)
        async with AsyncExitStack() as stack:
            await setup.post_many(stack, 1000)
            await setup.until_gauge("mcp_auth_proxy_held_requests", 1000)
        await setup.until_gauge("mcp_auth_proxy_held_requests", 0)
        # What the allocator keeps of these, the next ones use.
        setup.base = resident(setup.proxy)
        async with AsyncExitStack() as stack:
            # One of two servers gets half of the places; the others are answered at once.
            answers = [asyncio.create_task(client.answer(50)) for client in await setup.post_many(stack, 1100)]
            completed = asyncio.as_completed(answers)
            at_once = [await next(completed) for _ in range(100)]
            assert all(b"/connect/notes" in answer.body for answer in at_once)
            assert await setup.gauge("mcp_auth_proxy_held_requests") == 1000
            issuer = setup.upstream.authorization_servers[0]
            assert isinstance(issuer, FakeAuthorizationServer)
            issuer.authorize_error = ("access_denied", "no")
            await consent(setup.proxy.links[0])
            assert {(await answer).status for answer in answers} == {200}
        (line,) = setup.overloads("limits.held")
        assert "(1000 requests)" in line
        await setup.assert_given_back(KEPT // 2)


async def test_one_server_leaves_half_of_the_places_to_the_other(servers: Servers, tmp_path: Path) -> None:  # T82
    issuer = await servers.authorization_server()
    notes, mail = await servers.mcp_server(issuer), await servers.mcp_server(issuer)
    async with (
        running_proxy(
            tmp_path,
            {"notes": notes.url, "mail": mail.url},
            authorization={"wait": "30s"},
            limits={"held": 10},
        ) as proxy,
        AsyncExitStack() as stack,
    ):
        held = proxy.application.forwarder.held

        async def hold(path: str) -> RawClient:
            client = await stack.enter_async_context(RawClient.to(proxy.origin))
            client.post(SMALL_CALL, path=path)
            return client

        first = [await hold("/notes/mcp") for _ in range(1)]
        await until(lambda: proxy.links, "a link")
        first += [await hold("/notes/mcp") for _ in range(4)]
        await until(lambda: held.used == 5, "5 held requests")
        answers = [await (await hold("/notes/mcp")).answer() for _ in range(3)]
        assert all(b"/connect/notes" in answer.body for answer in answers)
        waiting = [await hold("/mail/mcp") for _ in range(5)]
        await until(lambda: held.used == 10, "10 held requests")
        await consent(await proxy.next_link(1))
        await consent(await proxy.next_link(2))
        assert [(await client.answer()).status for client in [*first, *waiting]] == [200] * 10
        await until(lambda: held.used == 0, "nothing held")


RESPONSES = {
    "JSON": FakeResponse.json({"jsonrpc": "2.0", "id": 1, "result": {"x": "s" * LARGEST}}),
    "lists": FakeResponse.json({"jsonrpc": "2.0", "id": 1, "result": {"x": [[]] * (LARGEST // 4)}}),
    "an event": FakeResponse(
        headers=(("content-type", "text/event-stream"),), body=b"data: " + b"s" * LARGEST + b"\n\n"
    ),
    "chunks": big(LARGEST),
    "a bomb": FakeResponse(
        headers=(("content-type", "application/json"), ("content-encoding", "gzip")),
        body=gzip.compress(b'{"jsonrpc":"2.0","id":1,"result":[' + b" " * LARGEST + b"]}", 9),
    ),
}


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("name", RESPONSES)
async def test_a_large_response_stops_nobody(servers: Servers, tmp_path: Path, name: str, started: bool) -> None:  # T82
    async with flooded(servers, tmp_path, wait="30s" if started else "1s") as setup:
        setup.upstream.answers["tools/call"] = RESPONSES[name]
        if not started:
            await consent(setup.proxy.links[0])
        fields = ["Accept: application/json, text/event-stream"]
        flood = asyncio.create_task(setup.flood([SMALL_CALL] * 3, *fields))
        if started:
            await setup.until_gauge("mcp_auth_proxy_held_requests", 3)
            async with RawClient.to(setup.proxy.origin) as last:
                last.post(SMALL_CALL, *fields)
                await last.head()  # comes with the comment after five seconds, which starts the event stream
            await consent(setup.proxy.links[0])
        answers = await flood
        assert all(answer.ended and answer.status == 200 for answer in answers)
        if name != "chunks" or not started:
            assert all(len(answer.body) >= min(LARGEST, len(RESPONSES[name].body)) for answer in answers)
        assert setup.slowest < SECONDS
        assert setup.peak < 40 * MIB
        await setup.assert_given_back()


async def test_streams_that_nobody_reads_are_bounded(servers: Servers, tmp_path: Path) -> None:  # T82
    upstream = await servers.mcp_server(protected=False)
    good = await servers.mcp_server(protected=False)
    upstream.answers["tools/call"] = big(64 * MIB)
    config = write_config(tmp_path, {"notes": upstream.url, "good": good.url}, limits={"memory": "1MiB"})
    async with proxy_process(config) as proxy, proxy.client("good") as client, AsyncExitStack() as stack:
        setup = Flooded(proxy, upstream, client, resident(proxy))
        clients = [await stack.enter_async_context(RawClient.to(proxy.origin, buffer=4096)) for _ in range(8)]
        for reader in clients:
            reader.post(SMALL_CALL)
            await reader.head()
            reader.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: setup.overloads("limits.memory"), "the log names the client")
        assert (await client.call("echo", text="x")).text == "x"
        assert 0 < await setup.gauge("mcp_auth_proxy_buffered_bytes") <= MIB / 2
        for reader in clients:
            reader.drop()
        await setup.until_gauge("mcp_auth_proxy_buffered_bytes", 0)
