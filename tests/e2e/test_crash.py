"""kill -9 at the worst moments: acknowledged data is there after the restart, and a loss is explained."""

import asyncio
import json
import random
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import FakeResponse, RecordedRequest
from fakes.mcp_client import McpResponse, PlainClient
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import ProxyProcess, link_in, proxy_process, run_command, write_config

KILLS = 15


@dataclass(kw_only=True)
class Machine:
    """A machine on which the proxy is started again and again, always at the same address."""

    issuer: FakeAuthorizationServer
    upstream: FakeMcpServer
    config: Path
    listen: str

    @asynccontextmanager
    async def proxy(self) -> AsyncIterator[tuple[ProxyProcess, PlainClient]]:
        async with proxy_process(self.config, listen=self.listen) as proxy, proxy.client("notes") as client:
            yield proxy, client

    async def log_in(self, client: PlainClient) -> None:
        page = await consent(link_in((await client.call("echo")).message))
        assert page.status_code == 200, page.text

    async def status(self) -> dict[str, object]:
        code, out, err = await run_command("status", "--json", "--config", str(self.config))
        assert code == 0, err
        row: dict[str, object] = json.loads(out)[0]
        return row

    def process_but_never_answer(self, received: RecordedRequest) -> FakeResponse:
        """The refresh is processed and the old token used up, but the response never arrives."""
        form = received.form
        client = self.issuer.ledger.clients[form["client_id"]]
        self.issuer.ledger.refresh(client, refresh_token=form["refresh_token"], resource=form["resource"], scopes=())
        return FakeResponse.hang()


@pytest.fixture
async def machine(servers: Servers, tmp_path: Path) -> Machine:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization={"wait": "0s"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = "{}:{}".format(*free.getsockname())
    return Machine(issuer=issuer, upstream=upstream, config=config, listen=listen)


def refused(reply: McpResponse) -> bool:
    """Whether the user is asked to log in."""
    return bool(reply.message.get("result", {}).get("isError"))


async def test_a_grant_is_durable_once_the_page_confirms_it(machine: Machine) -> None:
    async with machine.proxy() as (proxy, client):
        await machine.log_in(client)
        await proxy.stop(signal.SIGKILL)
    async with machine.proxy() as (_, client):
        assert (await client.call("echo", text="in")).text == "in"
    assert machine.issuer.authorizations == 1


async def test_an_open_link_survives_a_crash(machine: Machine) -> None:
    async with machine.proxy() as (proxy, client):
        link = link_in((await client.call("echo")).message)
        await proxy.stop(signal.SIGKILL)
    async with machine.proxy() as (_, client):
        assert (await consent(link)).status_code == 200
        assert (await client.call("echo", text="in")).text == "in"


async def test_a_refresh_whose_answer_was_lost_costs_one_login_and_says_why(machine: Machine) -> None:  # F6
    issuer = machine.issuer
    async with machine.proxy() as (proxy, client):
        await machine.log_in(client)
        issuer.answers["token"] = machine.process_but_never_answer
        issuer.end_access_tokens()
        call = asyncio.create_task(client.call("echo"))
        await issuer.log.wait_for(lambda received: received.form.get("grant_type") == "refresh_token")
        await proxy.stop(signal.SIGKILL)
        with pytest.raises(httpx2.HTTPError):
            await call
    del issuer.answers["token"]
    async with machine.proxy() as (_, client):
        assert refused(await client.call("echo"))
        assert refused(await client.call("echo"))
        # At the start, and once more when the server has refused the access token.
        assert issuer.refreshes == 3
        row = await machine.status()
        assert row["state"] == "ended"
        assert "interrupted" in str(row["reason"])
        await machine.log_in(client)
        assert (await client.call("echo", text="in")).text == "in"
    assert issuer.authorizations == 2


async def test_a_refresh_that_never_arrived_costs_nothing(machine: Machine) -> None:  # F6
    issuer = machine.issuer
    async with machine.proxy() as (proxy, client):
        await machine.log_in(client)
        issuer.gates["token"] = asyncio.Event()
        issuer.end_access_tokens()
        call = asyncio.create_task(client.call("echo"))
        await issuer.log.wait_for(lambda received: received.form.get("grant_type") == "refresh_token")
        await proxy.stop(signal.SIGKILL)
        with pytest.raises(httpx2.HTTPError):
            await call
    issuer.gates.clear()
    async with machine.proxy() as (_, client):
        assert (await client.call("echo", text="in")).text == "in"
    assert (issuer.refreshes, issuer.authorizations) == (2, 1)


@pytest.mark.timeout(120)
async def test_no_acknowledged_grant_is_lost_to_kills_at_any_moment(machine: Machine) -> None:  # F7
    """The issuer has no grace: a refresh token that comes twice ends its grant.

    So a kill between the issuer's commit and ours must cost a login. It may do so only if that renewal was never
    acknowledged to anyone: its access token was not used yet. Once it was, the grant must be there.
    """
    issuer, upstream = machine.issuer, machine.upstream
    chance = random.Random(20260728)
    survived = lost = 0
    needs_login = True
    for number in range(KILLS):
        async with machine.proxy() as (proxy, client):
            reply = await client.call("echo", text="in")
            if refused(reply):
                if not needs_login:
                    newest = next(reversed(issuer.ledger.tokens))
                    assert newest not in upstream.bearers, "a renewal that was in use is lost"
                    assert "interrupted" in str((await machine.status())["reason"])
                    lost += 1
                await machine.log_in(client)
            else:
                survived += 1
            needs_login = False
            load = [asyncio.create_task(keep_asking(client)) for _ in range(4)]
            moment = asyncio.create_task(moment_to_kill(issuer, chance, in_a_renewal=number % 2 == 1))
            while not moment.done():
                # Only what has been in use: a server that refuses three new tokens in a row is another case.
                if upstream.bearers[-10:] == [next(reversed(issuer.ledger.tokens))] * 10:
                    issuer.end_access_tokens()
                await asyncio.wait([moment], timeout=0.01)
            await moment
            await proxy.stop(signal.SIGKILL)
            await asyncio.gather(*load)
    assert survived + lost == KILLS - 1
    assert survived > 0
    assert issuer.refreshes > KILLS
    assert issuer.authorizations == 1 + lost


async def moment_to_kill(issuer: FakeAuthorizationServer, chance: random.Random, *, in_a_renewal: bool) -> None:
    """Any moment of the load, or one while a renewal is on its way."""
    await asyncio.sleep(chance.uniform(0.01, 0.2))
    if in_a_renewal:
        seen = issuer.refreshes
        await issuer.log.wait_for(lambda received: received.form.get("grant_type") == "refresh_token", count=seen + 1)
        await asyncio.sleep(chance.uniform(0, 0.01))


async def keep_asking(client: PlainClient) -> None:
    """Ask until the proxy is gone; until then every request must succeed."""
    while True:
        try:
            reply = await client.call("echo", text="load")
        except httpx2.HTTPError:
            return
        assert reply.text == "load", reply.message
