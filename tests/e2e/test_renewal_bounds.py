"""Lifetimes, clocks and servers that make no sense: bounded, without a storm, and never a 401 to the client."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fakes.exchange import Answer
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.proxy import running_proxy, until
from fakes.scene import Scene, many, numbered, scene, texts
from fakes.unattended import unattended

HOUR = 3600.0


# odd lifetimes and clocks


@pytest.mark.parametrize(
    "value", ["-5", "0", "true", '"abc"', "1e400", "9" * 400, f'"{"9" * 400}"', "null", "[]", "0.5e-300", "-1e999"]
)
async def test_an_odd_lifetime_neither_breaks_nor_storms(servers: Servers, tmp_path: Path, value: str) -> None:  # T21
    async with scene(servers, tmp_path) as it:
        token = it.issuer.issue(resource=it.upstream.url)
        body = f'{{"access_token": "{token}", "token_type": "Bearer", "refresh_token": "rt", "expires_in": {value}}}'
        it.issuer.answers["token"] = Answer(headers=(("content-type", "application/json"),), body=body.encode())
        await it.connect()
        assert texts(await many(it, 20)) == numbered(20)
        for number in numbered(5):
            assert (await it.ask(number)).text == number
        assert it.issuer.refreshes <= 1


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
async def test_a_clock_that_jumps_starts_no_storm(servers: Servers, tmp_path: Path, jump: float) -> None:  # F9
    async with scene(servers, tmp_path) as it:
        await it.connect()
        for ahead in (jump, 0.0, jump):
            it.clock.ahead = ahead
            assert texts(await many(it, 30)) == numbered(30)
            assert texts(await many(it, 30)) == numbered(30)
        assert it.issuer.refreshes <= 2
        before = it.issuer.refreshes
        it.issuer.end_access_tokens()
        assert texts(await many(it, 30)) == numbered(30)
        assert (it.issuer.refreshes, it.issuer.authorizations) == (before + 1, 1)


async def test_a_token_that_only_looks_dead_is_used_where_it_can_not_be_renewed(  # F9
    servers: Servers, tmp_path: Path
) -> None:
    async with scene(servers, tmp_path, issuer={"refresh": False}) as it:
        await it.connect()
        it.clock.ahead = HOUR
        assert (await it.ask("still")).text == "still"
        assert it.issuer.authorizations == 1


# servers that are never content


def never_content(it: Scene, knob: str, value: object) -> None:
    setattr(it.upstream, knob, value)


ENDLESS: dict[str, Callable[[Scene], None]] = {
    "401": lambda it: never_content(it, "endless_401", True),
    "403 for the same scope": lambda it: never_content(it, "endless_403", "same"),
    "403 for more each time": lambda it: never_content(it, "endless_403", "growing"),
}


@pytest.mark.parametrize("connected", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize("make_endless", ENDLESS.values(), ids=ENDLESS)
async def test_an_endless_challenge_ends_in_an_error(  # T19
    servers: Servers, tmp_path: Path, make_endless: Callable[[Scene], None], connected: bool
) -> None:
    async with scene(servers, tmp_path, wait="20s") as it:
        if connected:
            call = asyncio.create_task(it.ask())
            await consent(await it.proxy.next_link())
            await call
        make_endless(it)
        seen = len(it.proxy.links)
        sent, asked = len(it.upstream.bearers), it.issuer.token_requests()
        call = asyncio.create_task(it.ask())
        while not call.done():
            await until(lambda: call.done() or len(it.proxy.links) > seen)  # noqa: B023
            if len(it.proxy.links) > seen:
                seen += 1
                await consent(it.proxy.links[seen - 1])
        reply = call.result()
        assert reply.status == 200
        assert it.issuer.authorizations <= 4
        assert len(it.upstream.bearers) - sent <= 8
        assert it.issuer.token_requests() - asked <= 6
        assert "www-authenticate" not in reply.headers
        assert "/connect/" not in str(reply.message)
        assert reply.error["message"]
        if it.upstream.endless_401:
            assert it.issuer.issuer in reply.error["message"]
        if it.upstream.endless_403 == "growing":
            scopes = [set(request.form.get("scope", "").split()) for request in it.issuer.seen("authorize")]
            assert all(before < after for before, after in pairwise(scopes))


@pytest.mark.parametrize("knobs", [{"endless_401": True}, {"endless_403": "same"}, {"endless_403": "growing"}], ids=str)
async def test_an_endless_challenge_ends_without_a_human_too(  # T19
    servers: Servers, tmp_path: Path, knobs: dict[str, Any]
) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer, **knobs)
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
