"""PostgreSQL stopped, frozen and cut off under load: live tokens go on, nothing is lost, and it recovers by itself."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.cable import Cable
from fakes.fixtures import Servers
from fakes.postgresql import Server, make_server, remove_server
from fakes.replicas import Load, Replica, replicas
from fakes.shared_stores import database_of

pytestmark = pytest.mark.postgresql

LIFETIME = 3.0
"""Seconds that the access tokens of one of the servers last; those of the other one outlast the test."""

PATIENCE = 30.0
"""Seconds within which an outage is noticed, and its end."""


@pytest.fixture
def own_postgresql() -> Iterator[Server]:
    """Run a server that no other test uses."""
    server = make_server()
    try:
        yield server
    finally:
        remove_server(server)


@asynccontextmanager
async def stopped(server: Server) -> AsyncIterator[None]:
    await asyncio.to_thread(server.stop, "immediate")
    try:
        yield
    finally:
        await asyncio.to_thread(server.start)


@asynccontextmanager
async def frozen(server: Server) -> AsyncIterator[None]:
    with server.frozen():
        yield


@asynccontextmanager
async def cut(cable: Cable) -> AsyncIterator[None]:
    cable.cut()
    try:
        yield
    finally:
        cable.mend()


@asynccontextmanager
async def blocked(cable: Cable) -> AsyncIterator[None]:
    cable.block()
    try:
        yield
    finally:
        cable.mend()


async def eventually(condition: Callable[[], Awaitable[object]], what: str) -> None:
    ends = time.monotonic() + PATIENCE
    while not await condition():
        assert time.monotonic() < ends, what
        await asyncio.sleep(0.1)


async def is_ready(made: list[Replica], status: int) -> bool:
    answers = await asyncio.gather(*(replica.get("/readyz") for replica in made))
    return all(answer.status_code == status for answer in answers)


async def works(made: list[Replica], accounts: list[str]) -> bool:
    """Return whether every replica has a token for every account."""
    return all(await asyncio.gather(*(replica.is_connected(account) for replica in made for account in accounts)))


async def assert_live_tokens_go_on(made: list[Replica], account: str) -> None:
    for replica in made:
        for _ in range(3):
            begun = time.monotonic()
            assert await replica.is_connected(account)
            assert time.monotonic() - begun < 2


async def connect(made: list[Replica], accounts: list[str]) -> None:
    for number, account in enumerate(accounts):
        replica = made[number % len(made)]
        message = str((await replica.call(account)).message)
        link = message.partition("/connect/")[2].split()[0].strip("'\"")
        assert (await replica.consent(f"{replica.origin}/connect/{link}")).status_code in (200, 303)
    await eventually(lambda: works(made, accounts), "a consent is not known everywhere")


def ended(issuer: FakeAuthorizationServer) -> int:
    """Return how many grants are lost at the authorization server, which takes no refresh token twice."""
    return sum(grant.ended for grant in issuer.ledger.grants) + issuer.ledger.reused


@pytest.mark.timeout(300)
async def test_outages_of_the_database_cost_no_grant_and_stop_no_live_token(
    servers: Servers, tmp_path: Path, own_postgresql: Server
) -> None:
    """It takes a minute: there are four outages, each of which has to be noticed."""
    brief = await servers.authorization_server(auto_consent=True, token_seconds=LIFETIME)
    steady = await servers.authorization_server(auto_consent=True, token_seconds=600)
    upstreams = {"brief": await servers.mcp_server(brief), "steady": await servers.mcp_server(steady)}
    accounts = ["brief@a", "brief@b", "brief@c"]
    async with Cable.running(own_postgresql.port) as cable:
        with database_of(own_postgresql, tmp_path, port=cable.port) as store:
            urls = {name: upstream.url for name, upstream in upstreams.items()}
            async with replicas(tmp_path, 2, urls, store=store, authorization={"wait": "0s"}) as made:
                await connect(made, [*accounts, "steady"])
                load = Load(made, accounts, random.Random(1))
                async with load.running(each=1):
                    for outage in (stopped(own_postgresql), frozen(own_postgresql), cut(cable), blocked(cable)):
                        async with outage:
                            await eventually(lambda: is_ready(made, 503), "/readyz does not tell of the outage")
                            await assert_live_tokens_go_on(made, "steady")
                            refreshes = brief.refreshes
                            # Every token ends meanwhile.
                            await asyncio.sleep(LIFETIME)
                            assert brief.refreshes == refreshes
                            await assert_live_tokens_go_on(made, "steady")
                        await eventually(lambda: is_ready(made, 200), "/readyz does not tell that it is over")
                        await eventually(lambda: works(made, accounts), "the grants are not used again")
                        assert ended(brief) == 0
                for number, replica in enumerate(made):
                    (tmp_path / f"replica-{number}.log").write_text(replica.everything)
    assert load.lost == [], f"{tmp_path} has the logs"
    assert (ended(brief), brief.authorizations, steady.refreshes) == (0, len(accounts), 0)
