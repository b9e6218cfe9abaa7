"""Failures that would repeat for every request: the proxy pauses, says why and until when, and logs a line a minute."""

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import consent, decline
from fakes.http_exchange import FakeResponse
from fakes.mcp_client import McpResponse, PlainClient
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import RunningProxy, proxy_process, run_command, running_proxy, write_config
from fakes.proxy_setup import Clock, ProxySetup, ask_many, proxy_setup
from fakes.unattended import unattended
from mcp_auth_proxy.broker.backoff import FIRST, LONGEST
from mcp_auth_proxy.errors import AuthorizationServerUnavailable
from mcp_auth_proxy.models import LOCAL, Account

LOAD = 100
"""Requests at once."""

SECONDS = 1.0
"""How long a request to another server may take meanwhile."""

HOUR = 3600.0
NOTES = Account(LOCAL, "notes")


@dataclass
class Attacked:
    """The proxy before ``notes``, whose grant asks no user, and before ``good``; both have the same issuer."""

    issuer: FakeAuthorizationServer
    notes: FakeMcpServer
    proxy: RunningProxy
    client: PlainClient
    good: PlainClient
    clock: Clock

    async def load(self, count: int = LOAD) -> list[McpResponse]:
        """Send that many requests at once to ``notes``, and call ``good`` meanwhile."""
        calls = (self.client.call("echo", text="x") for _ in range(count))
        other, *replies = await asyncio.gather(self.good.call("echo", text="x"), *calls)
        assert other.text == "x"
        return replies

    @property
    def token_requests(self) -> int:
        """The number of token requests for ``notes``."""
        return len(self.issuer.seen("token", resource=self.notes.url))

    async def wait_told(self) -> int:
        """Send one request; return the seconds that its client is told to wait."""
        return told(await self.client.call("echo", text="x"))


@asynccontextmanager
async def attacked(servers: Servers, folder: Path, **notes: Any) -> AsyncIterator[Attacked]:
    issuer = await servers.authorization_server(token_seconds=10 * HOUR)
    upstream, other = await servers.mcp_server(issuer, **notes), await servers.mcp_server(issuer)
    config = {"notes": unattended(issuer, upstream.url, folder), "good": unattended(issuer, other.url, folder)}
    clock = Clock()
    clock.stop()
    async with (
        running_proxy(folder, config, clock=clock) as proxy,
        proxy.client("notes") as client,
        proxy.client("good") as good,
    ):
        assert (await good.call("echo", text="x")).text == "x"
        yield Attacked(issuer, upstream, proxy, client, good, clock)


@asynccontextmanager
async def paused_setup(servers: Servers, folder: Path, **options: Any) -> AsyncIterator[ProxySetup]:
    """Run issuer, server and proxy with a clock that stands still."""
    async with proxy_setup(servers, folder, **options) as setup:
        setup.clock.stop()
        yield setup


def busy(retry_after: str) -> dict[str, Any]:
    """Return the options of an issuer that limits registrations."""
    return {"answers": {"register": FakeResponse.too_many(retry_after)}}


def told(reply: McpResponse) -> int:
    """Return the seconds that the answer to a request tells its client to wait."""
    assert reply.status in (200, 502, 503)
    assert reply.headers["retry-after"].isdigit()
    assert reply.error["data"]["retry_after"] == int(reply.headers["retry-after"])
    assert "/connect/" not in str(reply.message)
    return int(reply.headers["retry-after"])


def lines(caplog: pytest.LogCaptureFixture, server: str = "notes") -> list[str]:
    """Return the warnings about a server."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and f"server {server}" in record.getMessage()
    ]


# a server that refuses fresh tokens


async def test_a_server_that_refuses_fresh_tokens_causes_few_token_requests(  # T86
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with attacked(servers, tmp_path, endless_401=True) as setup:
        before = setup.token_requests
        for reply in [*await setup.load(), *await setup.load()]:
            assert "refuses a token that its authorization server has just issued" in reply.error["message"]
            assert setup.issuer.issuer in reply.error["message"]
            assert told(reply) <= 2 * FIRST
        assert setup.token_requests - before <= 3
        (line,) = lines(caplog)
        assert setup.issuer.issuer in line


@pytest.mark.parametrize("attack", ["tokens", "registration"])
async def test_others_are_served_promptly_during_a_storm(servers: Servers, tmp_path: Path, attack: str) -> None:  # T86
    issuer, upstream = await servers.authorization_server(), await servers.mcp_server()
    upstream.authorization_servers.append(issuer)
    upstream.endless_401 = True
    good = await servers.mcp_server(protected=False)
    if attack == "tokens":
        notes: Any = unattended(issuer, upstream.url, tmp_path)
    else:
        notes = upstream.url
        issuer.answers["register"] = FakeResponse.too_many("3597")
    config = write_config(tmp_path, {"notes": notes, "good": good.url})
    async with proxy_process(config) as proxy, proxy.client("notes") as client, proxy.client("good") as other:
        assert (await other.call("echo", text="x")).text == "x"
        begun, before, slowest = time.monotonic(), proxy.err.count("\n"), 0.0
        for _ in range(10):
            storm = asyncio.gather(*(client.call("echo", text="x") for _ in range(20)))
            called = time.monotonic()
            assert (await other.call("echo", text="x")).text == "x"
            slowest = max(slowest, time.monotonic() - called)
            for reply in await storm:
                told(reply)
        # At most two at first, and one after each pause; the pauses double.
        pauses = math.log2(time.monotonic() - begun + 1) + 1
        assert issuer.registrations + issuer.token_requests() <= 3 + pauses
        assert slowest < SECONDS
        logged = proxy.err.splitlines()[before:]
        assert len([line for line in logged if "server notes: " in line]) == 1
        assert len(logged) <= 3 + pauses


async def test_after_each_pause_one_fresh_token_is_tried_and_the_pause_doubles(  # T86
    servers: Servers, tmp_path: Path
) -> None:
    async with attacked(servers, tmp_path, endless_401=True) as setup:
        waits = [await setup.wait_told()]
        for _ in range(10):
            setup.clock.ahead += waits[-1]
            before = setup.token_requests
            replies = await setup.load(20)
            assert setup.token_requests - before == 1
            waits.append(told(replies[0]))
        assert FIRST <= waits[0] <= 2 * FIRST
        for one, two in pairwise(waits[:8]):
            assert 2 * (one - 1) <= two <= 2 * one
        assert waits[-1] == LONGEST


@pytest.mark.parametrize("at_first", [True, False], ids=["at first", "later"])
async def test_a_success_resets_the_pause(servers: Servers, tmp_path: Path, at_first: bool) -> None:  # T86
    async with attacked(servers, tmp_path, endless_401=at_first) as setup:
        if not at_first:
            assert (await setup.client.call("echo", text="x")).text == "x"
            setup.notes.endless_401 = True
        for _ in range(5):
            wait = await setup.wait_told()
            setup.clock.ahead += wait
        assert wait > 4 * FIRST
        setup.notes.endless_401 = False
        for _ in range(2):
            assert (await setup.client.call("echo", text="x")).text == "x"
        setup.notes.endless_401 = True
        assert await setup.wait_told() <= 2 * FIRST


async def test_a_success_in_the_midst_of_a_long_pause_ends_it(servers: Servers, tmp_path: Path) -> None:  # T86
    async with attacked(servers, tmp_path, endless_401=True) as setup:
        for _ in range(8):
            wait = await setup.wait_told()
            setup.clock.ahead += wait
        assert await setup.wait_told() > 60
        setup.clock.ahead += 3 * FIRST
        setup.notes.endless_401 = False
        assert (await setup.client.call("echo", text="x")).text == "x"
        setup.issuer.end_access_tokens()
        assert (await setup.client.call("echo", text="x")).text == "x"


async def test_a_server_that_refuses_one_tool_is_not_asked_without_a_pause(  # T86
    servers: Servers, tmp_path: Path
) -> None:
    async with attacked(servers, tmp_path) as setup:
        refusal = FakeResponse(status=401, headers=(("www-authenticate", "Bearer"),))
        setup.notes.answers["tools/call:echo"] = refusal
        before = setup.token_requests
        for _ in range(20):
            assert "result" in (await setup.client.post("tools/list")).message
            await setup.load(5)
        assert setup.token_requests - before <= 3


async def test_tokens_that_expire_at_once_cause_no_more_requests(servers: Servers, tmp_path: Path) -> None:  # T86
    async with attacked(servers, tmp_path, endless_401=True) as setup:
        setup.issuer.token_changes = {"expires_in": 1}
        for _ in range(5):
            wait = await setup.wait_told()
            setup.clock.ahead += wait
        await setup.wait_told()
        before = setup.token_requests
        for _ in range(10):
            setup.clock.ahead += 1
            told((await setup.load(5))[0])
        assert setup.token_requests == before


async def test_a_user_s_grant_is_not_renewed_for_each_request(servers: Servers, tmp_path: Path) -> None:  # T86
    async with paused_setup(servers, tmp_path) as setup:
        await setup.connect()
        setup.upstream.endless_401 = True
        replies = [*await ask_many(setup, LOAD), *await ask_many(setup, LOAD)]
        assert setup.issuer.refreshes <= 3
        assert len(setup.proxy.links) == 2
        assert all("/connect/notes" in str(reply.message) for reply in replies)


async def test_scopes_that_grow_without_end_cause_few_token_requests(servers: Servers, tmp_path: Path) -> None:  # T86
    async with attacked(servers, tmp_path, endless_403="growing") as setup:
        before = setup.token_requests
        for _ in range(5):
            for reply in await setup.load(40):
                told(reply)
        assert setup.token_requests - before <= 4


# authorization servers that can't be used


async def test_a_registration_is_left_alone_for_as_long_as_the_server_asks(  # T86
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with paused_setup(
        servers, tmp_path, issuer={"answers": {"register": FakeResponse.too_many("3597")}}
    ) as setup:
        for _ in range(2):
            for reply in await ask_many(setup, LOAD):
                assert "429" in reply.error["message"]
                assert reply.status == 503
                assert 3590 <= told(reply) <= 3597
        assert (setup.issuer.registrations, setup.issuer.discoveries) == (1, 1)
        assert len(lines(caplog)) == 1
        setup.clock.ahead += 3000
        reply = await setup.ask()
        assert 590 <= told(reply) <= 597
        assert "as the server asks (Retry-After)" in reply.error["message"]
        assert setup.issuer.registrations == 1
        setup.issuer.answers.clear()
        setup.clock.ahead += 597
        await setup.connect()


async def test_failed_registrations_pause_for_longer_each_time(servers: Servers, tmp_path: Path) -> None:  # T86
    answers = {"register": FakeResponse.html("down", 500)}
    async with paused_setup(servers, tmp_path, issuer={"answers": answers}) as setup:
        for registrations in range(1, 12):
            replies = await ask_many(setup, 20)
            assert setup.issuer.registrations == registrations
            setup.clock.ahead += told(replies[0])
        assert told(replies[0]) == LONGEST
        setup.issuer.answers.clear()
        await setup.connect()


async def test_an_issuer_that_asked_for_a_pause_is_replaced_soon(servers: Servers, tmp_path: Path) -> None:  # T86
    async with paused_setup(
        servers, tmp_path, issuer={"answers": {"register": FakeResponse.too_many("3597")}}
    ) as setup:
        assert told(await setup.ask()) > 3000
        other = await servers.authorization_server(auto_consent=True)
        setup.upstream.authorization_servers = [other]
        setup.clock.ahead += 2 * FIRST
        await setup.connect()
        assert (setup.issuer.registrations, other.registrations) == (1, 1)


ODD = ["", " ", "-5", "0", "1.5", "+9", "9" * 400, "soon", "\xb2", "\u00e9", "nan", "1e400", "5, 20", "20, soon"]
DATES = ["Wed, 21 Oct 2015 07:28:00 GMT", "Fri, 31 Dec 9999 23:59:59 GMT", "Wed, 99 Jan 2025 99:99:99 GMT"]


@pytest.mark.parametrize("value", [*ODD, *DATES])
async def test_odd_values_of_retry_after_do_no_harm(servers: Servers, tmp_path: Path, value: str) -> None:  # T86
    for endpoint in ("register", "metadata"):
        folder = tmp_path / endpoint
        folder.mkdir()
        answers = {endpoint: FakeResponse.too_many(value)}
        async with paused_setup(servers, folder, issuer={"answers": answers}) as setup:
            replies = await ask_many(setup, 10)
            wait = told(replies[0])
            assert 1 <= wait <= HOUR
            assert len(setup.issuer.seen(endpoint)) <= 2
            setup.issuer.answers.clear()
            setup.clock.ahead += wait
            await setup.connect()


async def test_several_retry_after_fields_count_as_the_longest(servers: Servers, tmp_path: Path) -> None:  # T86
    twice = FakeResponse(status=429, headers=(("retry-after", "5"), ("retry-after", "40"), ("retry-after", "-1")))
    async with paused_setup(servers, tmp_path, issuer={"answers": {"register": twice}}) as setup:
        assert 39 <= told(await setup.ask()) <= 40


DISCOVERIES: dict[str, Callable[[ProxySetup], None]] = {
    "resource metadata, 503": lambda setup: setattr(setup.upstream, "metadata_answer", FakeResponse.html("", 503)),
    "resource metadata, 429": lambda setup: setattr(setup.upstream, "metadata_answer", FakeResponse.too_many("30")),
    "resource metadata, refused": lambda setup: setattr(setup.upstream, "metadata_changes", {"resource": "https://a"}),
    "server metadata, 503": lambda setup: setup.issuer.answers.update(metadata=FakeResponse.html("", 503)),
    "server metadata, 429": lambda setup: setup.issuer.answers.update(metadata=FakeResponse.too_many("30")),
    "server metadata, refused": lambda setup: setattr(setup.issuer, "metadata_changes", {"issuer": "https://a"}),
    "no registration": lambda setup: setattr(setup.issuer, "registration", False),
}


@pytest.mark.parametrize("name", DISCOVERIES)
async def test_a_failed_discovery_is_not_repeated_for_each_request(  # T86
    servers: Servers, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with paused_setup(servers, tmp_path) as setup:
        DISCOVERIES[name](setup)
        replies = [*await ask_many(setup, LOAD), *await ask_many(setup, LOAD)]
        waits = {told(reply) for reply in replies}
        assert waits <= ({29, 30} if "429" in name else {1, 2})
        assert len({reply.status for reply in replies}) == 1
        assert len(setup.upstream.metadata_requests) + setup.issuer.discoveries <= 3
        assert setup.issuer.registrations == 0
        assert len(lines(caplog)) == 1


TOKEN_ERRORS = {
    "429": (FakeResponse.too_many("40"), 40),
    "503": (FakeResponse.html("down", 503), 2),
    "page": (FakeResponse.html("welcome", 200), 2),
    "refused": (FakeResponse.json({"error": "unauthorized_client"}, 400), 2),
}


@pytest.mark.parametrize("name", TOKEN_ERRORS)
async def test_a_token_request_that_fails_is_not_repeated_for_each_request(  # T86
    servers: Servers, tmp_path: Path, name: str
) -> None:
    async with attacked(servers, tmp_path) as setup:
        answer, wait = TOKEN_ERRORS[name]
        setup.issuer.answers["token"] = answer
        before = setup.token_requests
        for reply in [*await setup.load(), *await setup.load()]:
            assert told(reply) <= wait
        assert setup.token_requests - before == 1
        setup.issuer.answers.clear()
        setup.clock.ahead += wait
        assert (await setup.client.call("echo", text="x")).text == "x"


async def test_a_renewal_waits_as_long_as_the_token_endpoint_asks_and_keeps_the_login(  # T86
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with paused_setup(servers, tmp_path) as setup:
        await setup.connect()
        setup.clock.ahead += 2 * HOUR
        setup.issuer.answers["token"] = FakeResponse.too_many("1800")
        for ahead in (0, 5, 300, 600, 800):
            setup.clock.ahead += ahead
            for reply in await ask_many(setup, 20):
                assert reply.status == 503
                assert 90 <= told(reply) <= 1800
        assert setup.issuer.refreshes == 1
        setup.issuer.answers.clear()
        setup.clock.ahead += 100
        assert (await setup.ask("renewed")).text == "renewed"
        assert len(setup.proxy.links) == 1
        assert len(lines(caplog)) == 1


# what the client sees


async def test_every_answer_has_a_numeric_retry_after(servers: Servers, tmp_path: Path) -> None:  # T86
    async with paused_setup(servers, tmp_path, issuer=busy("50")) as setup:
        for _ in range(2):
            calls = [setup.client.message("tools/call", {"name": "echo"}, id=number) for number in range(3)]
            headers = setup.client.headers(calls[0])
            batch = await setup.client.http.post(setup.client.url, content=json.dumps(calls), headers=headers)
            assert [answer["error"]["data"]["retry_after"] for answer in batch.json()] == [50, 50, 50]
            answers = [batch]
            for method, body in (("GET", b""), ("DELETE", b""), ("POST", b"{"), ("POST", b'{"method": "notified"}')):
                answers.append(await setup.client.http.request(method, setup.client.url, content=body, headers=headers))
            for answer in answers:
                assert answer.status_code == 503
                assert answer.headers["retry-after"] == "50"
                assert "429" in answer.text
            setup.clock.ahead += 0.5


async def test_a_refused_document_is_explained_again_during_the_pause(servers: Servers, tmp_path: Path) -> None:  # T86
    async with paused_setup(servers, tmp_path) as setup:
        setup.upstream.metadata_changes = {"resource": "https://elsewhere.example"}
        first, second = await setup.ask(), await setup.ask()
        assert (first.status, second.status) == (200, 200)
        assert first.error["message"].removeprefix("Server notes can't be authorized: ") in second.error["message"]
        assert re.search(r"can be tried again in [12] s, at \d\d:\d\d:\d\d UTC", second.error["message"])


# what a person begins


async def test_a_person_starts_at_once(servers: Servers, tmp_path: Path) -> None:  # T86
    async with paused_setup(servers, tmp_path, issuer={"answers": {"register": FakeResponse.html("", 500)}}) as setup:
        for _ in range(8):
            setup.clock.ahead += told(await setup.ask())
        assert told(await setup.ask()) > 60
        broker = setup.proxy.application.broker
        for registrations in (10, 11):
            with pytest.raises(AuthorizationServerUnavailable):
                await broker.authorize(NOTES, status=401, challenge=[])
            assert setup.issuer.registrations == registrations
        setup.issuer.answers.clear()
        assert await broker.authorize(NOTES, status=401, challenge=[]) is not None
        assert len(setup.proxy.links) == 1


async def test_for_a_person_the_server_s_own_pause_holds(servers: Servers, tmp_path: Path) -> None:  # T86
    async with paused_setup(servers, tmp_path, issuer=busy("600")) as setup:
        assert told(await setup.ask()) == 600
        for _ in range(2):
            with pytest.raises(AuthorizationServerUnavailable, match=r"again in 600 s, at .* as the server asks"):
                await setup.proxy.application.broker.authorize(NOTES, status=401, challenge=[])
        assert setup.issuer.registrations == 1


async def test_login_says_until_when_the_server_asks_to_wait(servers: Servers, tmp_path: Path) -> None:  # T86
    issuer = await servers.authorization_server(answers={"register": FakeResponse.too_many("3597")})
    upstream = await servers.mcp_server(issuer)
    config = write_config(tmp_path, {"notes": upstream.url})
    code, _, err = await run_command("login", "notes", "--config", str(config))
    assert code == 1
    assert re.search(r"again in 359\d s, at \d\d:\d\d:\d\d UTC, as the server asks", err)
    assert issuer.registrations == 1


async def test_a_link_says_until_when_the_server_asks_to_wait(servers: Servers, tmp_path: Path) -> None:  # T86
    async with paused_setup(servers, tmp_path) as setup:
        first = await setup.link()
        setup.clock.ahead += 545
        second = await setup.link()
        assert first != second
        setup.issuer.answers["token"] = FakeResponse.too_many("30")
        assert (await consent(second)).status_code == 502
        async with httpx2.AsyncClient(trust_env=False) as browser:
            page = await browser.get(first)
            assert page.status_code == 503
            assert 28 <= int(page.headers["retry-after"]) <= 30
            assert "as the server asks (Retry-After)" in page.text
            setup.clock.ahead += 30
            assert (await browser.get(first)).status_code == 303


@pytest.mark.parametrize("how", ["declined", "denied", "expired"])
async def test_a_refusal_by_the_user_begins_no_pause(servers: Servers, tmp_path: Path, how: str) -> None:  # T86
    async with paused_setup(servers, tmp_path) as setup:
        for count in range(1, 4):
            link = await setup.link()
            assert len(setup.proxy.links) == count
            if how == "expired":
                setup.clock.ahead += 601
            elif how == "denied":
                setup.issuer.authorize_error = ("access_denied", "no")
                await consent(link)
            else:
                setup.issuer.auto_consent = False
                await decline(link)
        setup.issuer.authorize_error, setup.issuer.auto_consent = None, True
        await setup.connect()


# other servers, other processes


async def test_a_changed_configuration_ends_the_pause(servers: Servers, tmp_path: Path) -> None:  # T86
    async with paused_setup(
        servers, tmp_path, issuer={"answers": {"register": FakeResponse.too_many("3597")}}
    ) as setup:
        assert told(await setup.ask()) > 3000
        setup.issuer.answers.clear()
        setup.proxy.application.broker.servers_changed(removed=[], changed=["other"])
        assert told(await setup.ask()) > 3000
        setup.proxy.application.broker.servers_changed(removed=[], changed=["notes"])
        await setup.connect()
