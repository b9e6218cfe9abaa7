"""The main job: a client without OAuth uses a protected server; over restarts, expiry, step-up and several servers."""

import asyncio
from pathlib import Path

import pytest

from fakes.fixtures import Servers
from fakes.headless import Browser, consent, decline
from fakes.mcp_client import MODERN, PlainClient
from fakes.proxy import Sections, link_in, running_proxy
from mcp_auth_proxy.config.settings import Address

NO_WAIT: Sections = {"authorization": {"wait": "0s"}}
VERSIONS = ["2025-03-26", "2025-06-18", "2025-11-25", MODERN]


def address_of(origin: str) -> Address:
    host, _, port = origin.removeprefix("http://").partition(":")
    return Address(host, int(port))


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_held_request_continues_after_consent(servers: Servers, tmp_path: Path, version: str) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    async with (
        running_proxy(tmp_path, {"notes": upstream.url}) as proxy,
        proxy.client("notes", version=version) as client,
    ):
        call = asyncio.create_task(client.call("echo", text="hello"))
        page = await consent(await proxy.next_link())
        assert page.status_code == 200
        assert "close this tab" in page.text
        assert (await call).text == "hello"
        assert (await client.call("echo", text="again")).text == "again"
    assert (issuer.registrations, issuer.authorizations, issuer.token_requests()) == (1, 1, 1)
    assert len(proxy.links) == 1


async def test_many_requests_share_one_flow(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    async with running_proxy(tmp_path, {"notes": upstream.url}, authorization={"wait": "20s"}) as proxy:
        clients = [proxy.client("notes") for _ in range(5)]
        calls = [
            asyncio.create_task(c.call("echo", text=str(n))) for n in range(20) for c in clients[n % 5 : n % 5 + 1]
        ]
        await consent(await proxy.next_link())
        replies = await asyncio.gather(*calls)
        for client in clients:
            await client.http.aclose()
    assert [reply.text for reply in replies] == [str(n) for n in range(20)]
    assert (len(proxy.links), issuer.authorizations, issuer.registrations) == (1, 1, 1)


async def test_without_a_wait_the_link_is_answered_and_the_next_request_succeeds(
    servers: Servers, tmp_path: Path
) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    async with (
        running_proxy(tmp_path, {"notes": upstream.url}, authorization={"wait": "0s"}) as proxy,
        proxy.client("notes") as client,
    ):
        first = await client.call("echo", text="x")
        assert first.status == 200
        assert first.result["isError"] is True
        link = link_in(first.message)
        assert first.result["_meta"]["io.mcp-auth-proxy/authorization_url"] == link
        other = await client.post("tools/list")
        assert other.error["data"]["authorization_url"] == link
        await consent(link)
        assert (await client.call("echo", text="now")).text == "now"


async def test_a_restart_keeps_the_login_and_an_open_flow(
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    options: Sections = {"authorization": {"wait": "0s"}}
    async with running_proxy(tmp_path, {"notes": upstream.url}, **options) as proxy, proxy.client("notes") as client:
        link = link_in((await client.call("echo", text="x")).message)
        address = address_of(proxy.origin)
    async with (
        running_proxy(tmp_path, {"notes": upstream.url}, listen=address, **options) as proxy,
        proxy.client("notes") as client,
    ):
        assert link_in((await client.call("echo", text="x")).message) == link
        assert [record for record in caplog.records if link in record.getMessage()], "the link is in the log again"
        assert (await consent(link)).status_code == 200
        assert (await client.call("echo", text="in")).text == "in"
    async with (
        running_proxy(tmp_path, {"notes": upstream.url}, listen=address, **options) as proxy,
        proxy.client("notes") as client,
    ):
        assert (await client.call("echo", text="still in")).text == "still in"
    assert issuer.authorizations == 1


async def test_five_expiries_with_rotation_are_not_noticed(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    async with running_proxy(tmp_path, {"notes": upstream.url}) as proxy, proxy.client("notes") as client:
        call = asyncio.create_task(client.call("echo", text="0"))
        await consent(await proxy.next_link())
        assert (await call).text == "0"
        for n in range(1, 6):
            issuer.end_access_tokens()
            assert (await client.call("echo", text=str(n))).text == str(n)
    assert (issuer.refreshes, issuer.authorizations) == (5, 1)


async def test_step_up_asks_for_the_union_of_scopes(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer, scopes=("read",), step_up={"tools/call:write": ("read", "write")})
    async with running_proxy(tmp_path, {"notes": upstream.url}) as proxy, proxy.client("notes") as client:
        call = asyncio.create_task(client.call("echo", text="r"))
        await consent(await proxy.next_link(1))
        assert (await call).text == "r"
        call = asyncio.create_task(client.call("write", text="w"))
        await consent(await proxy.next_link(2))
        assert (await call).status == 200
        asked = [request.query["scope"][0].split() for request in issuer.seen("authorize")]
    assert set(asked[0]) >= {"read"}
    assert set(asked[1]) >= {"read", "write"}


async def test_three_servers_with_three_issuers_never_see_each_others_tokens(servers: Servers, tmp_path: Path) -> None:
    issuers = [await servers.authorization_server(auto_consent=True) for _ in range(3)]
    upstreams = [await servers.mcp_server(issuer) for issuer in issuers]
    config = {f"s{n}": upstream.url for n, upstream in enumerate(upstreams)}
    async with running_proxy(tmp_path, dict(config)) as proxy:
        clients: list[PlainClient] = [proxy.client(name) for name in config]
        calls = [asyncio.create_task(client.call("echo", text="x")) for client in clients]
        await proxy.next_link(3)
        for link in proxy.links:
            await consent(link)
        assert [(await call).text for call in calls] == ["x"] * 3
        for issuer in issuers:
            issuer.end_access_tokens()
        assert [(await client.call("echo", text="y")).text for client in clients] == ["y"] * 3
        for client in clients:
            await client.http.aclose()
    for n, upstream in enumerate(upstreams):  # T49
        foreign = {secret for m, issuer in enumerate(issuers) if m != n for secret in issuer.secrets()}
        seen = repr([request.headers for request in [*upstream.requests, *issuers[n].requests]])
        seen += repr([request.body for request in issuers[n].requests])
        assert not [secret for secret in foreign if secret in seen]
        for request in issuers[n].seen("authorize"):
            assert request.query["resource"] == [upstream.url]
        for request in issuers[n].seen("token"):
            assert request.form["resource"] == upstream.url


async def test_client_credentials_need_no_user(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    issuer.add_client(client_id="agent", secret="s3cret/+ with space")
    upstream = await servers.mcp_server(issuer)
    oauth = {"grant": "client_credentials", "client_id": "agent", "client_secret": "env:AGENT_SECRET"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENT_SECRET", "s3cret/+ with space")
        async with (
            running_proxy(
                tmp_path, {"notes": {"url": upstream.url, "oauth": oauth}}, authorization={"wait": "0s"}
            ) as proxy,
            proxy.client("notes") as client,
        ):
            assert (await client.call("echo", text="alone")).text == "alone"
            issuer.end_access_tokens()
            assert (await client.call("echo", text="again")).text == "again"
    assert proxy.links == []
    assert issuer.token_requests("client_credentials") == 2


async def test_a_declined_consent_is_reported_and_a_new_request_may_try_again(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    async with running_proxy(tmp_path, {"notes": upstream.url}) as proxy, proxy.client("notes") as client:
        call = asyncio.create_task(client.call("echo", text="x"))
        await decline(await proxy.next_link(1))
        answer = await call
        assert answer.status == 200
        assert "access_denied" in answer.error["message"]
        assert "/connect/" not in answer.error["message"]
        call = asyncio.create_task(client.call("echo", text="x"))
        await consent(await proxy.next_link(2))
        assert (await call).text == "x"


async def test_a_name_given_to_another_server_brings_no_token_there(servers: Servers, tmp_path: Path) -> None:  # T49
    issuer = await servers.authorization_server()
    first, second = await servers.mcp_server(issuer), await servers.mcp_server(issuer)
    async with running_proxy(tmp_path, {"notes": first.url}, **NO_WAIT) as proxy, proxy.client("notes") as client:
        await consent(link_in((await client.call("echo", text="x")).message))
        assert (await client.call("echo", text="in")).text == "in"
        address = address_of(proxy.origin)
    async with (
        running_proxy(tmp_path, {"notes": second.url}, listen=address, **NO_WAIT) as proxy,
        proxy.client("notes") as client,
    ):
        await consent(link_in((await client.call("echo", text="x")).message))
        assert (await client.call("echo", text="moved")).text == "moved"
    assert not set(filter(None, first.bearers)) & set(filter(None, second.bearers))


@pytest.mark.parametrize("resource", ["omit", "https://exact.example/api"])
async def test_a_name_given_to_another_server_brings_no_token_there_even_without_a_resource(
    servers: Servers, tmp_path: Path, resource: str
) -> None:  # T49
    issuer = await servers.authorization_server(auto_consent=True)
    oauth = {"resource": resource}
    first, second = [await servers.mcp_server(issuer, checks_audience=False) for _ in range(2)]
    for number, upstream in enumerate([first, second, second]):
        async with (
            running_proxy(tmp_path, {"notes": {"url": upstream.url, "oauth": oauth}}, **NO_WAIT) as proxy,
            proxy.client("notes") as client,
        ):
            if number < 2:
                assert (await consent(link_in((await client.call("echo")).message))).status_code == 200
            assert (await client.call("echo", text="in")).text == "in"
    assert issuer.authorizations == 2
    assert not set(filter(None, first.bearers)) & set(filter(None, second.bearers))


@pytest.mark.parametrize("resource", ["omit", "auto"])
async def test_a_consent_for_another_server_brings_no_token_to_the_server_that_has_its_name_now(
    servers: Servers, tmp_path: Path, resource: str
) -> None:  # T49
    issuer = await servers.authorization_server(auto_consent=True)
    oauth = {"resource": resource}
    first, second = [await servers.mcp_server(issuer, checks_audience=False) for _ in range(2)]
    async with Browser() as browser:
        async with (
            running_proxy(tmp_path, {"notes": {"url": first.url, "oauth": oauth}}, **NO_WAIT) as proxy,
            proxy.client("notes") as client,
        ):
            callback = await browser.stop_before(link_in((await client.call("echo")).message))
            address = address_of(proxy.origin)
        async with (
            running_proxy(tmp_path, {"notes": {"url": second.url, "oauth": oauth}}, listen=address, **NO_WAIT) as proxy,
            proxy.client("notes") as client,
        ):
            page = await browser.follow(callback)
            assert page.status_code == 502
            assert "another server" in page.text
            assert issuer.token_requests() == 0
            assert "/connect/" in str((await client.call("echo")).message)
    assert set(second.bearers) == {None}
