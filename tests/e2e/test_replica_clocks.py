"""Replicas whose hosts do not agree on the time: what counts is the time of the database."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.postgresql import Server
from fakes.proxy import PROGRAM, link_in, serving, write_config
from fakes.shared_stores import Section, database_of

LIFETIME = 240
AHEAD = 300
"""Seconds: by that clock, each token has expired as soon as it is issued."""

WITH_A_CLOCK_AHEAD = (
    sys.executable,
    "-c",
    f"import runpy, time; true = time.time; time.time = lambda: true() + {AHEAD}; "
    "runpy.run_module('mcp_auth_proxy', run_name='__main__')",
)


@pytest.fixture
def store(postgresql_server: Server, tmp_path: Path) -> Iterator[Section]:
    with database_of(postgresql_server, tmp_path) as section:
        yield section


@pytest.mark.postgresql
@pytest.mark.parametrize("ahead_gives_the_link", [True, False])
async def test_a_replica_whose_clock_is_ahead_refreshes_nothing_early(
    servers: Servers, tmp_path: Path, store: Section, ahead_gives_the_link: bool
) -> None:
    issuer = await servers.authorization_server(auto_consent=True, token_seconds=LIFETIME)
    upstream = await servers.mcp_server(issuer)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization={"wait": "0s"}, store=store)
    options = ("--config", str(config), "--listen", "127.0.0.1:0")
    async with AsyncExitStack() as stack:
        right, ahead = [
            await stack.enter_async_context(
                (await stack.enter_async_context(serving(*options, program=program))).client("notes")
            )
            for program in (PROGRAM, WITH_A_CLOCK_AHEAD)
        ]
        first, second = (ahead, right) if ahead_gives_the_link else (right, ahead)
        link = link_in((await first.call("echo")).message)
        assert link_in((await second.call("echo")).message) == link, "the flow has not expired for the other"
        assert (await consent(link)).status_code == 200
        # The login is noticed by the other replica within a second, or later on a busy machine.
        for _ in range(100):
            if (await second.call("echo", text="in")).text == "in":
                break
            await asyncio.sleep(0.1)
        for client in (first, second, first, second):
            assert (await client.call("echo", text="in")).text == "in"
    assert (issuer.authorizations, issuer.refreshes) == (1, 0)
