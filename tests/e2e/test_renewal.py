"""The life of a grant: renewed ahead of time, once for all requests, and kept through temporary failures."""

import asyncio
from pathlib import Path

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import FakeResponse, RecordedRequest
from fakes.mcp_client import McpResponse
from fakes.proxy import link_in, running_proxy, until, wait_until_stable
from fakes.proxy_setup import ProxySetup, ask_many, numbered, proxy_setup, texts
from mcp_auth_proxy.broker import token_cache

MINUTE = 60.0


# ahead of time


async def test_a_token_is_renewed_in_time_in_the_background(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, issuer={"token_seconds": 2.0}) as setup:
        await setup.connect()
        first = setup.upstream.bearers[-1]
        await until(lambda: setup.issuer.refreshes == 1, "a renewal while nobody asks")
        await until_the_token_is_another(setup, first)
        # One request without a token began it; since then every token has been good.
        assert setup.upstream.bearers.count(None) == 1
        assert setup.issuer.authorizations == 1


async def test_a_long_lived_token_is_renewed_when_it_is_due_and_not_when_a_timer_ends(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "LONGEST_TIMER", 0.01)
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        assert texts(await ask_many(setup, 100)) == numbered(100)
        assert setup.issuer.refreshes == 0
        setup.clock.ahead += 0.9 * MINUTE
        await until(lambda: setup.issuer.refreshes == 1, "a renewal while nobody asks")


async def test_requests_use_the_old_token_while_it_is_renewed(servers: Servers, tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        setup.issuer.gates["token"] = gate
        setup.clock.ahead += 0.9 * MINUTE
        assert texts(await ask_many(setup, 20)) == numbered(20)
        await until(lambda: setup.issuer.refreshes == 1)
        first = setup.upstream.bearers[-1]
        gate.set()
        await until_the_token_is_another(setup, first)
        assert setup.issuer.refreshes == 1


async def until_the_token_is_another(setup: ProxySetup, before: str | None) -> None:
    """Ask, bounded, until the new token is used; no request fails meanwhile."""
    for _ in range(100):
        assert (await setup.ask("good")).text == "good"
        if setup.upstream.bearers[-1] != before:
            return
    raise AssertionError("the new token was never used")


@pytest.mark.timeout(180)  # a thousand requests, their client and both servers share one thread
async def test_a_thousand_requests_with_an_expired_token_share_one_renewal(
    servers: Servers, tmp_path: Path
) -> None:  # F3
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        setup.issuer.end_access_tokens()
        assert texts(await ask_many(setup, 1000)) == numbered(1000)
        assert (setup.issuer.refreshes, setup.issuer.authorizations) == (1, 1)


async def test_requests_wait_for_one_renewal_if_the_token_has_expired(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        setup.clock.ahead += 2 * MINUTE
        before = len(setup.upstream.bearers)
        assert texts(await ask_many(setup, 200)) == numbered(200)
        assert setup.issuer.refreshes == 1
        assert len(set(setup.upstream.bearers[before:])) == 1


async def test_a_401_for_an_older_token_is_answered_with_the_new_one(servers: Servers, tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        old = setup.upstream.bearers[-1]

        def late(received: RecordedRequest) -> FakeResponse | None:
            if received.tool != "slow" or received.bearer != old:
                return None
            return FakeResponse(status=401, headers=(("www-authenticate", 'Bearer error="invalid_token"'),), gate=gate)

        setup.upstream.intercept = late
        slow = asyncio.create_task(setup.client.call("slow"))
        await setup.upstream.log.wait_for(lambda received: received.tool == "slow")
        setup.issuer.end_access_tokens()
        assert (await setup.ask("renewed")).text == "renewed"
        gate.set()
        assert (await slow).text == "slow"
        assert setup.issuer.refreshes == 1


# what a grant can't do


async def test_without_a_refresh_token_the_user_is_asked_again(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, issuer={"refresh": False}) as setup:
        await setup.connect()
        setup.issuer.end_access_tokens()
        assert (await consent(await setup.link())).status_code == 200
        assert (await setup.ask("in")).text == "in"
        assert (setup.issuer.refreshes, setup.issuer.authorizations) == (0, 2)


async def test_without_rotation_the_old_refresh_token_is_kept(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, issuer={"rotate": False}) as setup:
        await setup.connect()
        for number in range(3):
            setup.issuer.end_access_tokens()
            assert (await setup.ask(str(number))).text == str(number)
        sent = {request.form["refresh_token"] for request in setup.issuer.seen("token", grant_type="refresh_token")}
        assert (len(sent), setup.issuer.refreshes, setup.issuer.authorizations) == (1, 3, 1)


# trouble at the authorization server


OUTAGES: dict[str, FakeResponse | None] = {
    "down": None,
    "500": FakeResponse.html(status=500),
    "503": FakeResponse.json({"error": "temporarily_unavailable"}, 503, retry_after="9"),
    "429": FakeResponse.too_many("7"),
    "a page": FakeResponse.html(),
    "400 without OAuth": FakeResponse.html(status=400),
    "broken off": FakeResponse.drop(),
}


async def begin(outage: FakeResponse | None, setup: ProxySetup) -> None:
    if outage is None:
        await setup.issuer.local.down()
    setup.issuer.outage = outage


async def end(setup: ProxySetup) -> None:
    setup.issuer.outage = None
    await setup.issuer.local.up()


def assert_unavailable(reply: McpResponse) -> None:
    assert reply.status == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.error["message"]
    assert "/connect/" not in str(reply.message)


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES)
async def test_an_outage_is_noticed_only_after_expiry_and_the_grant_survives_it(  # F1
    servers: Servers, tmp_path: Path, outage: FakeResponse | None
) -> None:
    async with proxy_setup(servers, tmp_path, issuer={"rotate": False}) as setup:
        await setup.connect()
        await begin(outage, setup)
        setup.clock.ahead += 0.9 * MINUTE
        for _ in range(3):
            assert texts(await ask_many(setup, 5)) == numbered(5)
        setup.clock.ahead += MINUTE
        loop = asyncio.get_running_loop()
        begun = loop.time()
        reply = await setup.client.post("tools/list", id="mine")
        assert loop.time() - begun < 5
        assert_unavailable(reply)
        assert reply.message["id"] == "mine"
        for other in await ask_many(setup, 50):
            assert_unavailable(other)
        assert setup.issuer.refreshes <= 5
        await end(setup)
        setup.clock.ahead += 10
        assert (await setup.ask("back")).text == "back"
        assert (setup.issuer.authorizations, len(setup.proxy.links)) == (1, 1)


async def test_background_renewal_respects_retry_after(  # F1
    servers: Servers, tmp_path: Path
) -> None:
    # Of ten minutes, more than one is left when the token is due: no request comes near the end of its life.
    async with proxy_setup(servers, tmp_path, issuer={"token_seconds": 10 * MINUTE}) as setup:
        await setup.connect()
        setup.issuer.outage = FakeResponse.too_many("60")
        setup.clock.ahead += 8.5 * MINUTE
        assert (await setup.ask("due")).text == "due"
        await until(lambda: setup.issuer.refreshes == 1)
        setup.clock.ahead += 5
        for number in numbered(20):
            assert (await setup.ask(number)).text == number
        assert await wait_until_stable(lambda: setup.issuer.refreshes) == 1


async def test_a_server_that_hangs_costs_a_bounded_wait(servers: Servers, tmp_path: Path) -> None:  # F1
    async with proxy_setup(servers, tmp_path, issuer={"rotate": False}) as setup:
        await setup.connect()
        setup.issuer.outage = FakeResponse.hang()
        setup.clock.ahead += 0.9 * MINUTE
        assert (await setup.ask("alive")).text == "alive"
        setup.clock.ahead += MINUTE
        async with asyncio.timeout(15):
            for reply in await ask_many(setup, 20):
                assert_unavailable(reply)
        setup.issuer.outage = None
        setup.clock.ahead += 10
        assert (await setup.ask("back")).text == "back"
        assert setup.issuer.authorizations == 1


async def test_a_401_while_the_authorization_server_is_down_is_a_temporary_503(
    servers: Servers, tmp_path: Path
) -> None:  # F1
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        await setup.issuer.local.down()
        setup.issuer.end_access_tokens()
        assert_unavailable(await setup.ask())
        await setup.issuer.local.up()
        setup.clock.ahead += 10
        assert (await setup.ask("back")).text == "back"
        assert setup.issuer.authorizations == 1


@pytest.mark.parametrize("rotates", [True, False])
async def test_a_lost_renewal_response_costs_a_login_only_if_the_old_token_is_used_up(
    servers: Servers, tmp_path: Path, rotates: bool
) -> None:
    async with proxy_setup(servers, tmp_path, issuer={"rotate": rotates}) as setup:
        await setup.connect()
        setup.issuer.lost_responses.add("token")
        setup.issuer.end_access_tokens()
        assert_unavailable(await setup.ask())
        setup.issuer.lost_responses.clear()
        setup.clock.ahead += 10
        reply = await setup.ask("back")
        if rotates:
            assert (await consent(link_in(reply.message))).status_code == 200
            reply = await setup.ask("back")
        assert reply.text == "back"
        assert (setup.issuer.refreshes, setup.issuer.authorizations) == (2, 2 if rotates else 1)


# the end of a grant


async def test_an_ended_grant_is_tried_once_and_authorized_once(servers: Servers, tmp_path: Path) -> None:  # F2
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        setup.issuer.end_grants()
        links = {link_in(reply.message) for reply in await ask_many(setup, 50)}
        assert len(links) == 1
        assert (setup.issuer.refreshes, len(setup.proxy.links)) == (1, 2)
        assert (await consent(links.pop())).status_code == 200
        assert texts(await ask_many(setup, 10)) == numbered(10)
        assert (setup.issuer.refreshes, setup.issuer.authorizations) == (1, 2)


async def test_an_ended_grant_does_not_affect_others(servers: Servers, tmp_path: Path) -> None:  # F2
    issuer = await servers.authorization_server(auto_consent=True)
    config = {name: (await servers.mcp_server(issuer)).url for name in ("one", "two")}
    async with (
        running_proxy(tmp_path, dict(config), authorization={"wait": "0s"}) as proxy,
        proxy.client("one") as one,
        proxy.client("two") as two,
    ):
        for client in (one, two):
            await consent(link_in((await client.call("echo")).message))
            assert (await client.call("echo", text="in")).text == "in"
        issuer.ledger.grants[0].ended = True
        assert (await one.call("echo")).result["isError"] is True
        assert (await two.call("echo", text="in")).text == "in"
        issuer.end_access_tokens()
        assert (await two.call("echo", text="renewed")).text == "renewed"


async def test_a_forgotten_client_registers_once_more(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        setup.issuer.forget_clients()
        setup.issuer.end_access_tokens()
        links = {link_in(reply.message) for reply in await ask_many(setup, 20)}
        assert (len(links), setup.issuer.registrations, setup.issuer.refreshes) == (1, 2, 1)
        assert (await consent(links.pop())).status_code == 200
        assert (await setup.ask("in")).text == "in"


async def test_registration_is_bounded_if_a_server_never_knows_its_clients(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        setup.issuer.answers["token"] = FakeResponse.json({"error": "invalid_client"}, 401)
        setup.issuer.end_access_tokens()
        for _ in range(3):
            page = await consent(await setup.link())
            assert "invalid_client" in page.text
        assert setup.issuer.registrations <= 1 + 3
        assert setup.issuer.token_requests() <= 1 + 1 + 3
