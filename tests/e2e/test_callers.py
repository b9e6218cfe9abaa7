"""Several callers behind one proxy: each has grants, flows and sessions of its own, and JWTs are exchanged for each."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.callers import HeaderCallers, admin, principal
from fakes.extension_server import TOKEN_EXCHANGE, ExtensionServer
from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.mcp_client import PlainClient
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import RunningProxy, link_in, running_proxy, until
from mcp_auth_proxy.broker import authorization
from mcp_auth_proxy.config.settings import OAuthSettings, Secret
from mcp_auth_proxy.models import GrantType

CALLS = 200


def client_of(proxy: RunningProxy, name: str, address: str = "notes", **options: Any) -> PlainClient:
    return proxy.client(address, headers={"x-test-caller": name}, **options)


@asynccontextmanager
async def proxied(
    folder: Path, upstream: FakeMcpServer, *, wait: str = "0s", **server: Any
) -> AsyncIterator[tuple[RunningProxy, HeaderCallers]]:
    callers = HeaderCallers(principal("ada"), principal("bob"), admin("root"))
    async with running_proxy(
        folder,
        {"notes": {"url": upstream.url, **server}},
        authenticator=callers,
        authorization={"wait": wait},
    ) as proxy:
        yield proxy, callers


async def authorize(link: str, name: str) -> None:
    """Consent in a browser of a caller, whom a web server in front names."""
    async with Browser() as browser:
        browser.client.headers["x-test-caller"] = name
        assert (await browser.follow(link)).status_code == 200


async def connect(client: PlainClient) -> None:
    """Authorize as the user of a client would."""
    await authorize(link_in((await client.call("echo", text="connect")).message), client.http.headers["x-test-caller"])
    assert "/connect/" not in (await client.call("echo", text="connected")).body.decode()


def bearers(upstream: FakeMcpServer) -> dict[str, set[str]]:
    """Return the tokens that came with calls, by the first word of their text."""
    found: dict[str, set[str]] = {}
    for call in upstream.calls("tools/call:echo"):
        if call.bearer:
            text = str(json.loads(call.body)["params"]["arguments"]["text"])
            found.setdefault(text.partition(" ")[0], set()).add(call.bearer)
    return found


# Grants


async def test_no_token_is_swapped_in_200_interleaved_calls_of_each_of_two_callers(  # T65 T75
    servers: Servers, authorization_server: FakeAuthorizationServer, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    consents = dict.fromkeys(("ada", "bob"), 0)

    async def calls(name: str, client: PlainClient) -> None:
        for number in range(CALLS):
            text = f"{name} {number}"
            reply = await client.call("echo", text=text)
            if "authorization_url" in json.dumps(reply.message):
                await authorize(link_in(reply.message), name)
                consents[name] += 1
                reply = await client.call("echo", text=text)
            assert reply.text == text
            if number % 60 == (20 if name == "ada" else 40):
                # This caller alone has to consent again.
                for bearer in bearers(mcp_server)[name]:
                    authorization_server.ledger.tokens[bearer].grant.ended = True

    async with (
        proxied(tmp_path, mcp_server) as (proxy, _),
        client_of(proxy, "ada") as ada,
        client_of(proxy, "bob") as bob,
    ):
        async with asyncio.timeout(60):
            await asyncio.gather(calls("ada", ada), calls("bob", bob))
    used = bearers(mcp_server)
    assert set(used) == {"ada", "bob"}
    assert not used["ada"] & used["bob"]
    assert min(consents.values()) >= 4
    grants = [{authorization_server.ledger.tokens[bearer].grant.id for bearer in used[name]} for name in used]
    assert not grants[0] & grants[1]


async def test_the_accounts_of_a_caller_have_grants_of_their_own(mcp_server: FakeMcpServer, tmp_path: Path) -> None:
    async with (
        proxied(tmp_path, mcp_server) as (proxy, _),
        client_of(proxy, "ada") as default,
        client_of(proxy, "ada", "notes@work") as work,
        client_of(proxy, "ada", "notes%40work") as encoded,
        client_of(proxy, "bob", "notes@work") as bob,
    ):
        await connect(default)
        await connect(work)
        assert (await default.call("echo", text="default x")).text == "default x"
        assert (await work.call("echo", text="work x")).text == "work x"
        assert (await encoded.call("echo", text="encoded x")).text == "encoded x"
        assert "authorization_url" in json.dumps((await bob.call("echo", text="bob x")).message)
    used = bearers(mcp_server)
    assert used["work"] == used["encoded"]
    assert not used["work"] & used["default"]


async def test_a_caller_has_a_bounded_number_of_accounts_at_a_server(  # T89
    authorization_server: FakeAuthorizationServer,
    mcp_server: FakeMcpServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(authorization, "MAX_ACCOUNTS", 3)
    async with proxied(tmp_path, mcp_server, accounts={"preset": {}}) as (proxy, _):

        async def answer(name: str, account: str) -> str:
            async with client_of(proxy, name, f"notes@{account}") as client:
                return json.dumps((await client.call("echo", text="x")).message)

        for account in ("a", "b", "c", "preset", "default", "a"):
            assert "authorization_url" in await answer("ada", account), account
        registrations = authorization_server.ledger.clients
        before = len(registrations)
        for account in ("d", "e"):
            assert "There are 3 accounts of notes already" in await answer("ada", account)
        assert len(registrations) == before
        # Nor do many at once come through.
        answers = await asyncio.gather(*(answer("root", f"n{number}") for number in range(8)))
        assert sum("authorization_url" in each for each in answers) <= 3
        # The limit of one caller is none of another.
        assert "authorization_url" in await answer("bob", "d")
        # It holds for accounts that are connected too.
        async with client_of(proxy, "bob", "notes@d") as client:
            await connect(client)
        for account in ("x", "y"):
            assert "authorization_url" in await answer("bob", account)
        assert "There are 3 accounts" in await answer("bob", "z")


async def test_nobody_waits_in_or_is_woken_by_the_flow_of_another(  # T75
    mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    async with (
        proxied(tmp_path, mcp_server, wait="3600s") as (proxy, _),
        client_of(proxy, "ada") as ada,
        client_of(proxy, "bob") as bob,
        client_of(proxy, "root") as root,
    ):
        waiting = [asyncio.create_task(ada.call("echo", text="ada x"))]
        links = [await proxy.next_link(1)]
        waiting.append(asyncio.create_task(bob.call("echo", text="bob x")))
        links.append(await proxy.next_link(2))
        assert links[0] != links[1]
        await authorize(links[0], "ada")
        async with asyncio.timeout(10):
            assert (await waiting[0]).text == "ada x"
            # Who is connected does not wait for anybody.
            assert (await ada.call("echo", text="ada y")).text == "ada y"
        assert not waiting[1].done()
        assert set(bearers(mcp_server)) == {"ada"}
        waiting.append(asyncio.create_task(root.call("echo", text="root x")))
        await authorize(await proxy.next_link(3), "root")
        assert (await waiting[2]).text == "root x"
        assert not waiting[1].done()
        await authorize(links[1], "bob")
        async with asyncio.timeout(10):
            assert (await waiting[1]).text == "bob x"
        used = bearers(mcp_server)
        assert len(used["ada"] | used["bob"] | used["root"]) == 3


async def test_only_admins_get_the_link_of_a_shared_grant_and_all_use_it(  # T66
    mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    async with (
        proxied(tmp_path, mcp_server, grant_owner="shared") as (proxy, _),
        client_of(proxy, "ada") as ada,
        client_of(proxy, "bob", version="2026-07-28", capabilities={"elicitation": {"url": {}}}) as bob,
        client_of(proxy, "root") as root,
    ):
        for member in (ada, bob):
            for reply in (await member.call("echo", text="x"), await member.post("tools/list")):
                assert "Ask one" in reply.body.decode()
                assert "/connect/" not in reply.body.decode()
        await connect(root)
        for name, client in (("ada", ada), ("bob", bob), ("root", root)):
            assert (await client.call("echo", text=f"{name} x")).text == f"{name} x"
        assert len(set.union(*bearers(mcp_server).values())) == 1


async def test_a_session_at_a_shared_server_belongs_to_one_caller(  # T44 T64
    mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    mcp_server.sessions_on = True
    async with (
        proxied(tmp_path, mcp_server, grant_owner="shared") as (proxy, _),
        client_of(proxy, "root") as root,
        client_of(proxy, "bob") as bob,
    ):
        await connect(root)
        await root.initialize()
        await bob.initialize()
        assert set(mcp_server.sessions) == {str(session).rpartition(".")[0] for session in (root.session, bob.session)}
        assert (await root.call("echo", text="root y")).text == "root y"
        before = len(mcp_server.requests)
        stolen = await bob.post("tools/call", {"name": "echo", "arguments": {"text": "bob y"}}, session=root.session)
        assert stolen.status == 404
        async with bob.http.stream(
            "GET", bob.url, headers={"accept": "text/event-stream", "mcp-session-id": str(root.session)}
        ) as stream:
            assert stream.status_code == 404
        assert len(mcp_server.requests) == before
        assert (await bob.call("echo", text="bob z")).text == "bob z"


async def test_a_session_goes_on_after_a_restart(mcp_server: FakeMcpServer, tmp_path: Path) -> None:
    mcp_server.sessions_on = True
    async with proxied(tmp_path, mcp_server) as (proxy, _), client_of(proxy, "ada") as ada:
        await connect(ada)
        await ada.initialize()
        session = ada.session
    async with proxied(tmp_path, mcp_server) as (proxy, _), client_of(proxy, "ada") as ada:
        ada.session = session
        assert (await ada.call("echo", text="x")).text == "x"


async def test_a_disabled_caller_with_a_warm_cache_is_refused_and_its_stream_ends(  # T74
    mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    mcp_server.sessions_on = True
    async with proxied(tmp_path, mcp_server) as (proxy, callers), client_of(proxy, "ada") as ada:
        await connect(ada)
        await ada.initialize()
        async with ada.stream() as (response, events):
            assert response.status_code == 200
            await until(lambda: any(session.streams for session in mcp_server.sessions.values()), "a stream")
            callers.disable("ada")
            async with asyncio.timeout(1):
                assert [event async for event in events] == []
        before = len(mcp_server.requests)
        assert (await ada.call("echo", text="x")).status == 401
        assert len(mcp_server.requests) == before


# Token exchange


@pytest.fixture
async def issuer() -> AsyncIterator[ExtensionServer]:
    async with ExtensionServer.running() as server:
        server.add_client(client_id="proxy", secret="proxy-secret")
        yield server


@asynccontextmanager
async def exchanging(
    folder: Path, upstream: FakeMcpServer, issuer: ExtensionServer
) -> AsyncIterator[tuple[RunningProxy, HeaderCallers]]:
    """A proxy whose callers have JWTs: ``jwt-1-of-ada`` and so on."""
    async with proxied(folder, upstream) as (proxy, callers):
        for name in ("ada", "bob"):
            issuer.subject_tokens[f"jwt-1-of-{name}"] = name
            callers.change(name, jwt=f"jwt-1-of-{name}")
        servers = proxy.application.servers
        oauth = OAuthSettings(
            grant=GrantType.TOKEN_EXCHANGE,
            client_id="proxy",
            client_secret=Secret("proxy-secret"),
            issuer=issuer.issuer,
            scopes=("notes:read",),
        )
        servers.replace({"notes": replace(servers["notes"], oauth=oauth)})
        yield proxy, callers


async def test_the_jwt_of_each_caller_is_exchanged_for_a_token_of_its_own(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    async with exchanging(tmp_path, upstream, issuer) as (proxy, _):
        async with client_of(proxy, "ada") as ada, client_of(proxy, "bob") as bob:
            for number in range(5):
                for name, client in (("ada", ada), ("bob", bob)):
                    assert (await client.call("echo", text=f"{name} {number}")).text == f"{name} {number}"
        used = bearers(upstream)
        for name in ("ada", "bob"):
            (token,) = used[name]
            assert issuer.ledger.tokens[token].client_id == f"proxy for {name}"
        assert issuer.token_requests() == 2


async def test_the_jwt_of_a_caller_goes_to_the_token_endpoint_alone_and_is_not_stored(  # T60 T76
    servers: Servers, issuer: ExtensionServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    upstream = await servers.mcp_server(issuer)
    async with exchanging(tmp_path, upstream, issuer) as (proxy, callers), client_of(proxy, "ada") as ada:
        assert (await ada.call("echo", text="x")).text == "x"
        callers.change("ada", jwt="jwt-that-is-refused")
        issuer.end_access_tokens()
        answer = await ada.call("echo", text="x")
        assert "invalid_grant" in answer.error["message"]
        assert "jwt-that-is-refused" not in answer.body.decode()
    for jwt in ("jwt-1-of-ada", "jwt-that-is-refused"):
        assert [received.endpoint for received in issuer.requests if jwt.encode() in received.body] == ["token"]
        assert not [received for received in upstream.requests if jwt in repr((received.headers, received.body))]
        assert jwt.encode() not in b"".join(path.read_bytes() for path in tmp_path.glob("proxy.db*"))
        assert jwt not in caplog.text


async def test_the_next_exchange_uses_the_newest_jwt_without_waiting_for_the_pause_after_an_older_one(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    async with exchanging(tmp_path, upstream, issuer) as (proxy, callers), client_of(proxy, "ada") as ada:
        assert (await ada.call("echo", text="x")).text == "x"
        issuer.subject_tokens["jwt-2-of-ada"] = "ada"
        del issuer.subject_tokens["jwt-1-of-ada"]
        issuer.end_access_tokens()
        for _ in range(3):
            assert "invalid_grant" in (await ada.call("echo", text="x")).error["message"]
        assert len(issuer.seen("token", subject_token="jwt-1-of-ada")) == 2
        callers.change("ada", jwt="jwt-2-of-ada")
        assert (await ada.call("echo", text="x")).text == "x"
        assert len(issuer.seen("token", grant_type=TOKEN_EXCHANGE, subject_token="jwt-2-of-ada")) == 1


async def test_a_caller_without_a_jwt_is_told_so(servers: Servers, issuer: ExtensionServer, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(issuer)
    async with exchanging(tmp_path, upstream, issuer) as (proxy, callers), client_of(proxy, "ada") as ada:
        callers.change("ada", jwt=None)
        answer = await ada.call("echo", text="x")
        assert "needs the JWT that a caller was identified by" in answer.error["message"]
        assert issuer.token_requests() == 0
