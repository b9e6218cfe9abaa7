"""Names that are never answered: they cost the servers that have them, and nobody else (T81)."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from fakes.fixtures import Servers
from fakes.http_exchange import FakeResponse, RecordedRequest
from fakes.mcp_client import PlainClient
from fakes.names import Names, lookups_out, names
from fakes.proxy import RunningProxy, proxy_process, running_proxy, until, write_config
from fakes.raw_client import RawClient
from mcp_auth_proxy.net import resolver
from mcp_auth_proxy.net.resolver import MAX_PER_OWNER

SECONDS = 1.0
"""How long a call of a clean server takes at most while all others hang."""

PING = json.dumps({"jsonrpc": "2.0", "id": 7, "method": "ping"}).encode()
HANGING = "http://hang{}.localhost:9/mcp"


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    with names(monkeypatch) as fake:
        fake.addresses = {"good.localhost": "127.0.0.1", "evil.localhost": "127.0.0.1"}
        yield fake


async def clean_server(servers: Servers) -> str:
    server = await servers.mcp_server(protected=False, response_headers=(("connection", "close"),))
    return f"http://good.localhost:{server.local.port}/mcp"


async def is_served_promptly(good: PlainClient) -> None:
    """Call the clean server a few times; each call needs a new connection."""
    for _ in range(5):
        begun = time.monotonic()
        assert (await good.call("echo", text="x")).text == "x"
        assert time.monotonic() - begun < SECONDS


@asynccontextmanager
async def calls(proxy: RunningProxy, *names: str) -> AsyncIterator[list[RawClient]]:
    """Call servers at the same time, each over a connection of its own; the clients give up when the block ends."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(RawClient.to(proxy.origin)) for _ in names]
        for client, name in zip(clients, names, strict=True):
            client.post(PING, path=f"/{name}/mcp")
        yield clients


async def errors(clients: Iterable[RawClient]) -> list[tuple[int, str]]:
    """Return the status and the error message that each client gets."""
    answers = await asyncio.gather(*(client.answer() for client in clients))
    return [(answer.status, json.loads(answer.body)["error"]["message"]) for answer in answers]


@pytest.mark.parametrize("number", [2, 4, 50])
async def test_servers_whose_names_are_never_answered_delay_no_other(  # T81
    servers: Servers, tmp_path: Path, system: Names, number: int
) -> None:
    hostile = {f"h{index}": HANGING.format(index) for index in range(number)}
    async with (
        running_proxy(tmp_path, {"good": await clean_server(servers), **hostile}) as proxy,
        proxy.client("good") as good,
    ):
        for _ in range(3):  # the clients of the hostile ones give up and come again: the look-ups are still out
            async with calls(proxy, *hostile, *hostile):
                await until(lambda: lookups_out() == number, "look-ups out")
                await is_served_promptly(good)
        assert sorted(name for name in system.asked if "hang" in name) == sorted(
            f"hang{index}.localhost" for index in range(number)
        )
        system.released.set()
        await until(lambda: lookups_out() == 0, "the end of the look-ups")
        await is_served_promptly(good)


async def test_a_thousand_requests_for_one_name_wait_for_one_look_up_and_are_logged_once(  # T81
    servers: Servers,
    tmp_path: Path,
    system: Names,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(resolver, "LOOKUP_TIMEOUT", 2.0)
    urls = {"good": await clean_server(servers), "bad": HANGING.format(0)}
    async with (
        running_proxy(tmp_path, urls, limits={"held": 4000}) as proxy,
        proxy.client("good") as good,
        calls(proxy, *["bad"] * 1000) as clients,
    ):
        await until(lambda: lookups_out() == 1, "a look-up")
        await is_served_promptly(good)
        assert lookups_out() == 1
        found = set(await errors(clients))
        assert {status for status, _ in found} == {502}
        assert all("hang0.localhost can't be looked up now" in message for _, message in found)
    assert system.asked.count("hang0.localhost") == 1
    (line,) = [message for message in caplog.messages if "hang0.localhost" in message]
    assert line.startswith("server bad: ")


async def test_a_server_that_names_many_such_hosts_in_its_challenges_delays_nobody(  # T81
    servers: Servers,
    tmp_path: Path,
    system: Names,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(resolver, "LOOKUP_TIMEOUT", 3.0)
    named: list[str] = []

    def challenge(request: RecordedRequest) -> FakeResponse:
        named.append(f"hang{len(named)}.localhost")
        value = f'Bearer resource_metadata="http://{named[-1]}:9/metadata"'
        return FakeResponse(status=401, headers=(("www-authenticate", value), ("connection", "close")))

    evil = await servers.mcp_server(intercept=challenge)
    # 100 tenants of one server: each is discovered on its own.
    tenants = {f"t{index}": f"http://evil.localhost:{evil.local.port}/{index}/mcp" for index in range(100)}
    async with (
        running_proxy(tmp_path, {"good": await clean_server(servers), **tenants}) as proxy,
        proxy.client("good") as good,
        calls(proxy, *tenants) as attack,
    ):
        await until(lambda: len(named) == 100, "challenges")
        await until(lambda: lookups_out() == MAX_PER_OWNER, "look-ups out")
        await is_served_promptly(good)
        for name, (status, message) in zip(tenants, await errors(attack), strict=True):
            assert status == 503
            assert name in message
            assert "can't be looked up now" in message
        assert len([name for name in system.asked if "hang" in name]) == MAX_PER_OWNER
        assert lookups_out() == MAX_PER_OWNER
        # The documents' names do not stop what the same server still serves.
        evil.intercept, evil.protected = None, False
        evil.path = "/1/mcp"
        async with proxy.client("t1") as tenant:
            await is_served_promptly(tenant)
    lines = [message for message in caplog.messages if "can't be looked up now" in message]
    assert sorted(line.split(": ")[0] for line in lines) == sorted(f"server {name}" for name in tenants)


async def test_the_last_good_address_serves_while_a_look_up_is_out(  # T81
    servers: Servers, tmp_path: Path, system: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "FRESH", -1.0)
    urls = {"good": await clean_server(servers)}
    async with running_proxy(tmp_path, urls) as proxy, proxy.client("good") as good:
        await is_served_promptly(good)
        system.hanging.add("good.localhost")
        await is_served_promptly(good)
        assert lookups_out() == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
async def test_look_ups_that_are_out_take_little_memory_and_delay_no_exit(servers: Servers, tmp_path: Path) -> None:
    replacement = (
        "import socket, threading\n"
        "def getaddrinfo(host, port, *_, **__):\n"
        "    if 'hang' in host:\n"
        "        threading.Event().wait()\n"
        "    return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('127.0.0.1', port))]\n"
        "socket.getaddrinfo = getaddrinfo\n"
    )
    (tmp_path / "sitecustomize.py").write_text(replacement)
    hostile = {f"h{index}": HANGING.format(index) for index in range(50)}
    config = write_config(tmp_path, {"good": await clean_server(servers), **hostile})
    path = f"{tmp_path}:{Path(resolver.__file__).parents[2]}"
    async with proxy_process(config, env={"PYTHONPATH": path}) as proxy, proxy.client("good") as good:

        def status(field: str) -> int:
            text = Path(f"/proc/{proxy.process.pid}/status").read_text()
            return int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{field}:")))

        await is_served_promptly(good)
        threads, memory = status("Threads"), status("VmRSS")
        for _ in range(4):
            async with calls(proxy, *hostile):
                await until(lambda: status("Threads") >= threads + 50, "threads")
                await is_served_promptly(good)
        assert status("Threads") <= threads + 51
        assert status("VmRSS") - memory < 16 * 1024
        begun = time.monotonic()
        assert await proxy.stop() == 0
        assert time.monotonic() - begun < 5
