"""Processes on one store of which one is killed or stopped while it renews, also in pid namespaces of their own."""

import asyncio
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fakes import postgresql
from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import RecordedRequest
from fakes.mcp_client import McpResponse, PlainClient
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import PROGRAM, ProxyProcess, Sections, link_in, serving, until, wait_until_stable, write_config

NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def has_namespaces() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False, timeout=10).returncode == 0


@dataclass(kw_only=True)
class Machines:
    """Processes on one store, before one authorization server."""

    issuer: FakeAuthorizationServer
    upstream: FakeMcpServer
    config: Path
    stack: AsyncExitStack
    waiting: list["asyncio.Task[McpResponse]"] = field(default_factory=list)

    async def start(self, *program: str, server: str = "notes") -> tuple[ProxyProcess, PlainClient]:
        options = ("--config", str(self.config), "--listen", "127.0.0.1:0")
        proxy = await self.stack.enter_async_context(serving(*options, program=(*program, *PROGRAM)))
        return proxy, await self.stack.enter_async_context(proxy.client(server))

    async def connect(self, *clients: PlainClient) -> None:
        """Authorize with the first client, and let the processes of all use the grant."""
        page = await consent(link_in((await clients[0].call("echo")).message))
        assert page.status_code == 200, page.text
        for client in clients:
            assert (await client.call("echo", text="in")).text == "in"

    async def stuck_refresh(self, client: PlainClient) -> asyncio.Event:
        """Let a process send a refresh that is not answered before the event is set; later ones are answered."""
        before = self.issuer.refreshes
        gate = self.issuer.gates["token"] = asyncio.Event()
        self.issuer.end_access_tokens()
        self.ask(client)
        await self.issuer.log.wait_for(is_refresh, count=before + 1)
        del self.issuer.gates["token"]
        return gate

    def ask(self, client: PlainClient) -> "asyncio.Task[McpResponse]":
        task = asyncio.create_task(client.call("echo", text="in"))
        self.waiting.append(task)
        return task


def is_refresh(received: RecordedRequest) -> bool:
    return received.form.get("grant_type") == "refresh_token"


on_both_engines = pytest.mark.parametrize(
    "each_engine", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)


@pytest.fixture
async def machines(each_engine: str, servers: Servers, tmp_path: Path) -> AsyncIterator[Machines]:
    issuer = await servers.authorization_server(auto_consent=True, token_seconds=3600)
    upstream = await servers.mcp_server(issuer)
    sections: Sections = {"authorization": {"wait": "0s"}}
    if (url := postgresql.database_url(tmp_path)) is not None:
        sections["store"] = {"url": url, "keys": [f"file:{postgresql.write_key(tmp_path)}"]}
    config = write_config(tmp_path, {"notes": upstream.url, "tasks": upstream.url}, **sections)
    async with AsyncExitStack() as stack:
        made = Machines(issuer=issuer, upstream=upstream, config=config, stack=stack)
        yield made
        for task in made.waiting:
            task.cancel()
        await asyncio.gather(*made.waiting, return_exceptions=True)


@on_both_engines
async def test_a_killed_process_is_succeeded_at_once(machines: Machines) -> None:  # F13
    (first, client), (_, other) = await machines.start(), await machines.start()
    await machines.connect(client, other)
    await machines.stuck_refresh(client)
    requests = len(machines.upstream.bearers)
    waiting = [machines.ask(other) for _ in range(20)]
    await until(lambda: len(machines.upstream.bearers) >= requests + 20, "requests with the dead token")
    assert machines.issuer.refreshes == 1
    killed_at = time.monotonic()
    await first.stop(signal.SIGKILL)
    assert {(await each).text for each in waiting} == {"in"}
    assert time.monotonic() - killed_at < 3
    assert (machines.issuer.refreshes, machines.issuer.authorizations) == (2, 1)
    assert machines.issuer.ledger.reused == 0


@on_both_engines
async def test_a_killed_process_is_succeeded_without_any_request(machines: Machines) -> None:  # F13
    """Servers accept the previous refresh token for some seconds only."""
    (first, client), (_, other) = await machines.start(), await machines.start()
    await machines.connect(client)
    await machines.stuck_refresh(client)
    killed_at = time.monotonic()
    await first.stop(signal.SIGKILL)
    await machines.issuer.log.wait_for(is_refresh, count=2)
    assert time.monotonic() - killed_at < 3
    assert (await other.call("echo", text="in")).text == "in"
    assert (machines.issuer.refreshes, machines.issuer.authorizations) == (2, 1)


@on_both_engines
@pytest.mark.skipif(not has_namespaces(), reason="this user may not make pid namespaces")
async def test_processes_in_pid_namespaces_of_their_own_are_not_taken_for_dead(machines: Machines) -> None:
    """Containers of one host name, each of whose processes has pid 1."""
    (first, client), (_, other) = await machines.start(*NAMESPACE), await machines.start(*NAMESPACE)
    await machines.connect(client, other)
    gate = await machines.stuck_refresh(client)
    requests = len(machines.upstream.bearers)
    waiting = machines.ask(other)
    await until(lambda: len(machines.upstream.bearers) > requests, "a request with the dead token")
    assert await wait_until_stable(lambda: machines.issuer.refreshes) == 1
    gate.set()
    assert (await waiting).text == "in"
    assert machines.issuer.refreshes == 1
    await machines.stuck_refresh(client)
    waiting = machines.ask(other)
    killed_at = time.monotonic()
    await first.stop(signal.SIGKILL)
    assert (await waiting).text == "in"
    assert time.monotonic() - killed_at < 3
    assert (machines.issuer.refreshes, machines.issuer.authorizations, machines.issuer.ledger.reused) == (3, 1, 0)


@on_both_engines
@pytest.mark.timeout(90)
async def test_stopped_processes_are_succeeded_if_that_is_needed_and_do_no_harm_later(
    machines: Machines,
) -> None:  # F13
    """Half a minute: it is the one test of a lease that ends, with real processes.

    The renewal of ``notes`` is needed elsewhere. Nobody else asks for ``tasks``, whose process finds the answer when it
    goes on, after all its time-outs: the new refresh token is in it.
    """
    machines.issuer.configure(rotate=False)
    (first, client), (_, other) = await machines.start(), await machines.start()
    second, of_tasks = await machines.start(server="tasks")
    await machines.connect(client, other)
    await machines.connect(of_tasks)
    gate = await machines.stuck_refresh(of_tasks)
    second.process.send_signal(signal.SIGSTOP)
    gate.set()
    gate = await machines.stuck_refresh(client)
    sent_at = time.monotonic()
    first.process.send_signal(signal.SIGSTOP)
    try:
        waiting = [machines.ask(other) for _ in range(5)]
        assert {(await each).text for each in waiting} == {"in"}
        assert 20 < time.monotonic() - sent_at < 30
        newest = machines.upstream.bearers[-1]
        # The server answers the stopped process too; its result comes too late to be stored.
        answered = len(machines.issuer.ledger.tokens)
        gate.set()
        await until(lambda: len(machines.issuer.ledger.tokens) > answered, "the late answer")
    finally:
        first.process.send_signal(signal.SIGCONT)
        second.process.send_signal(signal.SIGCONT)
    assert [(await late).text for late in machines.waiting[:2]] == ["in", "in"]
    for each in (client, other):
        assert (await each.call("echo", text="in")).text == "in"
        assert machines.upstream.bearers[-1] == newest
    assert (machines.issuer.refreshes, machines.issuer.authorizations) == (3, 2)
