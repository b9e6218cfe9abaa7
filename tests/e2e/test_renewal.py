"""The life of a grant: renewed ahead of time, once for all who need it, and kept through every failure that passes."""

import asyncio
from pathlib import Path

import pytest

from fakes.exchange import Answer, Received
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.mcp_client import Reply
from fakes.proxy import link_in, running_proxy, settled, until
from fakes.scene import Scene, many, numbered, scene, texts
from mcp_auth_proxy.broker import token_cache

MINUTE = 60.0


# ahead of time


async def test_a_token_is_renewed_in_time_by_itself(servers: Servers, tmp_path: Path) -> None:
    async with scene(servers, tmp_path, issuer={"token_seconds": 2.0}) as it:
        await it.connect()
        first = it.upstream.bearers[-1]
        await until(lambda: it.issuer.refreshes == 1, "a renewal while nobody asks")
        await until_the_token_is_another(it, first)
        # One request without a token began it; since then every token has been good.
        assert it.upstream.bearers.count(None) == 1
        assert it.issuer.authorizations == 1


async def test_a_long_lived_token_is_renewed_when_it_is_due_and_not_when_a_timer_ends(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "LONGEST_TIMER", 0.01)
    async with scene(servers, tmp_path) as it:
        await it.connect()
        assert texts(await many(it, 100)) == numbered(100)
        assert it.issuer.refreshes == 0
        it.clock.ahead += 0.9 * MINUTE
        await until(lambda: it.issuer.refreshes == 1, "a renewal while nobody asks")


async def test_requests_go_on_with_the_old_token_while_it_is_renewed(servers: Servers, tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with scene(servers, tmp_path) as it:
        await it.connect()
        it.issuer.gates["token"] = gate
        it.clock.ahead += 0.9 * MINUTE
        assert texts(await many(it, 20)) == numbered(20)
        await until(lambda: it.issuer.refreshes == 1)
        first = it.upstream.bearers[-1]
        gate.set()
        await until_the_token_is_another(it, first)
        assert it.issuer.refreshes == 1


async def until_the_token_is_another(it: Scene, before: str | None) -> None:
    """Ask, bounded, until the new token is used; no request fails meanwhile."""
    for _ in range(100):
        assert (await it.ask("good")).text == "good"
        if it.upstream.bearers[-1] != before:
            return
    raise AssertionError("the new token was never used")


async def test_a_thousand_requests_meet_a_dead_token(servers: Servers, tmp_path: Path) -> None:  # F3
    async with scene(servers, tmp_path) as it:
        await it.connect()
        it.issuer.end_access_tokens()
        assert texts(await many(it, 1000)) == numbered(1000)
        assert (it.issuer.refreshes, it.issuer.authorizations) == (1, 1)


async def test_requests_wait_for_one_renewal_where_the_token_is_known_to_be_dead(
    servers: Servers, tmp_path: Path
) -> None:
    async with scene(servers, tmp_path) as it:
        await it.connect()
        it.clock.ahead += 2 * MINUTE
        before = len(it.upstream.bearers)
        assert texts(await many(it, 200)) == numbered(200)
        assert it.issuer.refreshes == 1
        assert len(set(it.upstream.bearers[before:])) == 1


async def test_a_401_for_a_token_of_before_is_answered_with_the_new_one(servers: Servers, tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with scene(servers, tmp_path) as it:
        await it.connect()
        old = it.upstream.bearers[-1]

        def late(received: Received) -> Answer | None:
            if received.tool != "slow" or received.bearer != old:
                return None
            return Answer(status=401, headers=(("www-authenticate", 'Bearer error="invalid_token"'),), gate=gate)

        it.upstream.intercept = late
        slow = asyncio.create_task(it.client.call("slow"))
        await it.upstream.log.wait_for(lambda received: received.tool == "slow")
        it.issuer.end_access_tokens()
        assert (await it.ask("renewed")).text == "renewed"
        gate.set()
        assert (await slow).text == "slow"
        assert it.issuer.refreshes == 1


# what a grant can't do


async def test_without_a_refresh_token_the_user_is_asked_again(servers: Servers, tmp_path: Path) -> None:
    async with scene(servers, tmp_path, issuer={"refresh": False}) as it:
        await it.connect()
        it.issuer.end_access_tokens()
        assert (await consent(await it.link())).status_code == 200
        assert (await it.ask("in")).text == "in"
        assert (it.issuer.refreshes, it.issuer.authorizations) == (0, 2)


async def test_without_rotation_the_old_refresh_token_is_kept(servers: Servers, tmp_path: Path) -> None:
    async with scene(servers, tmp_path, issuer={"rotate": False}) as it:
        await it.connect()
        for number in range(3):
            it.issuer.end_access_tokens()
            assert (await it.ask(str(number))).text == str(number)
        sent = {request.form["refresh_token"] for request in it.issuer.seen("token", grant_type="refresh_token")}
        assert (len(sent), it.issuer.refreshes, it.issuer.authorizations) == (1, 3, 1)


# trouble at the authorization server


OUTAGES: dict[str, Answer | None] = {
    "down": None,
    "500": Answer.html(status=500),
    "503": Answer.json({"error": "temporarily_unavailable"}, 503, retry_after="9"),
    "429": Answer.too_many("7"),
    "a page": Answer.html(),
    "400 without OAuth": Answer.html(status=400),
    "broken off": Answer.drop(),
}


async def begin(outage: Answer | None, it: Scene) -> None:
    if outage is None:
        await it.issuer.local.down()
    it.issuer.outage = outage


async def end(it: Scene) -> None:
    it.issuer.outage = None
    await it.issuer.local.up()


def assert_unavailable(reply: Reply) -> None:
    assert reply.status == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.error["message"]
    assert "/connect/" not in str(reply.message)


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES)
async def test_an_outage_is_felt_only_when_the_token_dies_and_the_grant_outlives_it(  # F1
    servers: Servers, tmp_path: Path, outage: Answer | None
) -> None:
    async with scene(servers, tmp_path, issuer={"rotate": False}) as it:
        await it.connect()
        await begin(outage, it)
        it.clock.ahead += 0.9 * MINUTE
        for _ in range(3):
            assert texts(await many(it, 5)) == numbered(5)
        it.clock.ahead += MINUTE
        loop = asyncio.get_running_loop()
        begun = loop.time()
        reply = await it.client.post("tools/list", id="mine")
        assert loop.time() - begun < 5
        assert_unavailable(reply)
        assert reply.message["id"] == "mine"
        for other in await many(it, 50):
            assert_unavailable(other)
        assert it.issuer.refreshes <= 5
        await end(it)
        it.clock.ahead += 10
        assert (await it.ask("back")).text == "back"
        assert (it.issuer.authorizations, len(it.proxy.links)) == (1, 1)


async def test_in_the_background_a_server_is_left_alone_for_as_long_as_it_asks(  # F1
    servers: Servers, tmp_path: Path
) -> None:
    # Of ten minutes, more than one is left when the token is due: no request comes near the end of its life.
    async with scene(servers, tmp_path, issuer={"token_seconds": 10 * MINUTE}) as it:
        await it.connect()
        it.issuer.outage = Answer.too_many("60")
        it.clock.ahead += 8.5 * MINUTE
        assert (await it.ask("due")).text == "due"
        await until(lambda: it.issuer.refreshes == 1)
        it.clock.ahead += 5
        for number in numbered(20):
            assert (await it.ask(number)).text == number
        assert await settled(lambda: it.issuer.refreshes) == 1


async def test_a_server_that_hangs_costs_a_bounded_wait(servers: Servers, tmp_path: Path) -> None:  # F1
    async with scene(servers, tmp_path, issuer={"rotate": False}) as it:
        await it.connect()
        it.issuer.outage = Answer.hang()
        it.clock.ahead += 0.9 * MINUTE
        assert (await it.ask("alive")).text == "alive"
        it.clock.ahead += MINUTE
        async with asyncio.timeout(15):
            for reply in await many(it, 20):
                assert_unavailable(reply)
        it.issuer.outage = None
        it.clock.ahead += 10
        assert (await it.ask("back")).text == "back"
        assert it.issuer.authorizations == 1


async def test_a_401_while_the_server_is_down_is_503_and_passes(servers: Servers, tmp_path: Path) -> None:  # F1
    async with scene(servers, tmp_path) as it:
        await it.connect()
        await it.issuer.local.down()
        it.issuer.end_access_tokens()
        assert_unavailable(await it.ask())
        await it.issuer.local.up()
        it.clock.ahead += 10
        assert (await it.ask("back")).text == "back"
        assert it.issuer.authorizations == 1


@pytest.mark.parametrize("rotates", [True, False])
async def test_a_renewal_whose_answer_is_lost_costs_a_login_only_where_the_old_token_is_spent(
    servers: Servers, tmp_path: Path, rotates: bool
) -> None:
    async with scene(servers, tmp_path, issuer={"rotate": rotates}) as it:
        await it.connect()
        it.issuer.lost_responses.add("token")
        it.issuer.end_access_tokens()
        assert_unavailable(await it.ask())
        it.issuer.lost_responses.clear()
        it.clock.ahead += 10
        reply = await it.ask("back")
        if rotates:
            assert (await consent(link_in(reply.message))).status_code == 200
            reply = await it.ask("back")
        assert reply.text == "back"
        assert (it.issuer.refreshes, it.issuer.authorizations) == (2, 2 if rotates else 1)


# the end of a grant


async def test_an_ended_grant_is_tried_once_and_asked_for_once(servers: Servers, tmp_path: Path) -> None:  # F2
    async with scene(servers, tmp_path) as it:
        await it.connect()
        it.issuer.end_grants()
        links = {link_in(reply.message) for reply in await many(it, 50)}
        assert len(links) == 1
        assert (it.issuer.refreshes, len(it.proxy.links)) == (1, 2)
        assert (await consent(links.pop())).status_code == 200
        assert texts(await many(it, 10)) == numbered(10)
        assert (it.issuer.refreshes, it.issuer.authorizations) == (1, 2)


async def test_an_ended_grant_leaves_others_alone(servers: Servers, tmp_path: Path) -> None:  # F2
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
    async with scene(servers, tmp_path) as it:
        await it.connect()
        it.issuer.forget_clients()
        it.issuer.end_access_tokens()
        links = {link_in(reply.message) for reply in await many(it, 20)}
        assert (len(links), it.issuer.registrations, it.issuer.refreshes) == (1, 2, 1)
        assert (await consent(links.pop())).status_code == 200
        assert (await it.ask("in")).text == "in"


async def test_a_server_that_never_knows_its_clients_is_not_asked_for_ever(servers: Servers, tmp_path: Path) -> None:
    async with scene(servers, tmp_path) as it:
        await it.connect()
        it.issuer.answers["token"] = Answer.json({"error": "invalid_client"}, 401)
        it.issuer.end_access_tokens()
        for _ in range(3):
            page = await consent(await it.link())
            assert "invalid_client" in page.text
        assert it.issuer.registrations <= 1 + 3
        assert it.issuer.token_requests() <= 1 + 1 + 3
