"""Lifetimes, clocks and servers that make no sense: bounded, without a storm, and never a 401 to the client."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import FakeResponse
from fakes.proxy import running_proxy, until
from fakes.proxy_setup import ProxySetup, ask_many, numbered, proxy_setup, texts
from fakes.unattended import unattended

HOUR = 3600.0


# odd lifetimes and clocks


@pytest.mark.parametrize(
    "value", ["-5", "0", "true", '"abc"', "1e400", "9" * 400, f'"{"9" * 400}"', "null", "[]", "0.5e-300", "-1e999"]
)
async def test_an_odd_lifetime_causes_neither_errors_nor_a_storm(
    servers: Servers, tmp_path: Path, value: str
) -> None:  # T21
    async with proxy_setup(servers, tmp_path) as setup:
        token = setup.issuer.issue(resource=setup.upstream.url)
        body = f'{{"access_token": "{token}", "token_type": "Bearer", "refresh_token": "rt", "expires_in": {value}}}'
        setup.issuer.answers["token"] = FakeResponse(
            headers=(("content-type", "application/json"),), body=body.encode()
        )
        await setup.connect()
        assert texts(await ask_many(setup, 20)) == numbered(20)
        for number in numbered(5):
            assert (await setup.ask(number)).text == number
        assert setup.issuer.refreshes <= 1


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
async def test_a_clock_that_jumps_causes_no_storm(servers: Servers, tmp_path: Path, jump: float) -> None:  # F9
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        for ahead in (jump, 0.0, jump):
            setup.clock.ahead = ahead
            assert texts(await ask_many(setup, 30)) == numbered(30)
            assert texts(await ask_many(setup, 30)) == numbered(30)
        assert setup.issuer.refreshes <= 2
        before = setup.issuer.refreshes
        setup.issuer.end_access_tokens()
        assert texts(await ask_many(setup, 30)) == numbered(30)
        assert (setup.issuer.refreshes, setup.issuer.authorizations) == (before + 1, 1)


async def test_a_token_that_seems_expired_is_used_if_it_can_not_be_renewed(  # F9
    servers: Servers, tmp_path: Path
) -> None:
    async with proxy_setup(servers, tmp_path, issuer={"refresh": False}) as setup:
        await setup.connect()
        setup.clock.ahead = HOUR
        assert (await setup.ask("still")).text == "still"
        assert setup.issuer.authorizations == 1


# servers that are never content


def never_content(setup: ProxySetup, knob: str, value: object) -> None:
    setattr(setup.upstream, knob, value)


ENDLESS: dict[str, Callable[[ProxySetup], None]] = {
    "401": lambda setup: never_content(setup, "endless_401", True),
    "403 for the same scope": lambda setup: never_content(setup, "endless_403", "same"),
    "403 for more each time": lambda setup: never_content(setup, "endless_403", "growing"),
}


@pytest.mark.parametrize("connected", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize("make_endless", ENDLESS.values(), ids=ENDLESS)
async def test_an_endless_challenge_ends_in_an_error(  # T19
    servers: Servers, tmp_path: Path, make_endless: Callable[[ProxySetup], None], connected: bool
) -> None:
    async with proxy_setup(servers, tmp_path, wait="20s") as setup:
        if connected:
            call = asyncio.create_task(setup.ask())
            await consent(await setup.proxy.next_link())
            await call
        make_endless(setup)
        seen = len(setup.proxy.links)
        sent, asked = len(setup.upstream.bearers), setup.issuer.token_requests()
        call = asyncio.create_task(setup.ask())
        while not call.done():
            await until(lambda: call.done() or len(setup.proxy.links) > seen)  # noqa: B023
            if len(setup.proxy.links) > seen:
                seen += 1
                await consent(setup.proxy.links[seen - 1])
        reply = call.result()
        assert reply.status == 200
        assert setup.issuer.authorizations <= 4
        assert len(setup.upstream.bearers) - sent <= 8
        assert setup.issuer.token_requests() - asked <= 6
        assert "www-authenticate" not in reply.headers
        assert "/connect/" not in str(reply.message)
        assert reply.error["message"]
        if setup.upstream.endless_401:
            assert setup.issuer.issuer in reply.error["message"]
        if setup.upstream.endless_403 == "growing":
            scopes = [set(request.form.get("scope", "").split()) for request in setup.issuer.seen("authorize")]
            assert all(before < after for before, after in pairwise(scopes))


@pytest.mark.parametrize(
    "options", [{"endless_401": True}, {"endless_403": "same"}, {"endless_403": "growing"}], ids=str
)
async def test_an_endless_challenge_ends_without_a_user_too(  # T19
    servers: Servers, tmp_path: Path, options: dict[str, Any]
) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer, **options)
    async with (
        running_proxy(tmp_path, {"notes": unattended(issuer, upstream.url, tmp_path)}) as proxy,
        proxy.client("notes") as client,
    ):
        for _ in range(3):
            before = len(upstream.bearers)
            reply = await client.call("echo")
            assert (reply.status, bool(reply.error["message"])) == (200, True)
            assert len(upstream.bearers) - before <= 8
        assert issuer.token_requests() <= 15
