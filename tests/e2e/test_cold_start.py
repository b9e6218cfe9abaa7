"""Clients that can't wait: what they are answered before consent, and how their sessions go on after it."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fakes.callers import HeaderCallers, principal
from fakes.fixtures import Servers
from fakes.headless import consent, decline
from fakes.http_exchange import FakeResponse
from fakes.mcp_client import MODERN, PlainClient
from fakes.proxy import link_in, running_proxy, until
from fakes.proxy_setup import ProxySetup, proxy_setup
from mcp_auth_proxy.models import Account

COLD: dict[str, Any] = {"wait": "5s", "cold_start": True}
CHANGES = [f"notifications/{name}/list_changed" for name in ("tools", "prompts", "resources")]
LINK_KEY = "io.mcp-auth-proxy/authorization_url"
VERSIONS = ["2025-03-26", "2025-06-18", "2025-11-25"]
SESSIONS: dict[str, Any] = {"sessions_on": True}


def cold(servers: Servers, folder: Path, **options: Any) -> Any:
    options.setdefault("authorization", COLD)
    options.setdefault("upstream", SESSIONS)
    return proxy_setup(servers, folder, **options)


async def names(client: PlainClient) -> list[str]:
    return [tool["name"] for tool in (await client.post("tools/list")).result["tools"]]


@pytest.mark.parametrize("version", [*VERSIONS, "2024-11-05", "2026-07-28", "junk"])
async def test_initialize_is_answered_at_once_with_the_link(servers: Servers, tmp_path: Path, version: str) -> None:
    async with cold(servers, tmp_path, authorization={"wait": "45s", "cold_start": True}) as setup:
        loop = asyncio.get_running_loop()
        began = loop.time()
        params = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "c", "version": "1"}}
        reply = await setup.client.post("initialize", params, id="first")
        assert loop.time() - began < 5
        assert (reply.status, reply.message["id"]) == (200, "first")
        assert reply.result["protocolVersion"] == (version if version in VERSIONS else "2025-11-25")
        assert reply.result["serverInfo"]["name"] == "mcp-auth-proxy/notes"
        for capability in ("tools", "prompts", "resources"):
            assert reply.result["capabilities"][capability] == {"listChanged": True}
        assert setup.proxy.links[0] in reply.result["instructions"]
        assert reply.headers["mcp-session-id"]
        assert setup.upstream.sessions == {}


async def test_a_session_before_consent_answers_what_it_can(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path) as setup:
        client = setup.client
        await client.initialize()
        asked = len(setup.upstream.calls())
        assert (await client.notify("notifications/roots/list_changed")).status == 202
        assert (await client.post("ping")).result == {}
        assert (await client.post("logging/setLevel", {"level": "debug"})).result == {}
        assert (await client.post("prompts/list")).result == {"prompts": []}
        assert (await client.post("resources/list")).result == {"resources": []}
        assert (await client.post("resources/templates/list")).result == {"resourceTemplates": []}
        assert len(setup.upstream.calls()) == asked
        tools = (await client.post("tools/list")).result["tools"]
        assert [tool["name"] for tool in tools] == ["authorize_notes", "call_notes"]
        assert all(setup.proxy.links[0] in tool["description"] for tool in tools)
        assert set(tools[1]["inputSchema"]["properties"]) == {"name", "arguments"}
        assert len(setup.proxy.links) == 1


async def test_a_session_goes_on_at_the_server_after_consent(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, client={"version": "2025-06-18", "capabilities": {"roots": {}}}) as setup:
        client = setup.client
        first = await client.initialize()
        async with client.stream() as (response, events):
            assert response.status_code == 200
            await consent(link_in(first.message))
            async with asyncio.timeout(5):
                assert [(await anext(events))["method"] for _ in CHANGES] == CHANGES
            assert await names(client) == ["echo", "count", "whoami"]
            assert (await client.call("echo", text="hello")).text == "hello"
            own, theirs = client.session, next(iter(setup.upstream.sessions))
            assert own != theirs
            begun = [call.message["params"] for call in setup.upstream.calls("initialize") if call.bearer]
            sent = {"protocolVersion": "2025-06-18", "capabilities": {"roots": {}}}
            assert {**sent, "clientInfo": {"name": "plain", "version": "1"}} in begun
            assert setup.upstream.calls("tools/call")[-1].header("mcp-session-id") == theirs
            await until(lambda: setup.upstream.push({"jsonrpc": "2.0", "method": "notifications/message"}))
            assert (await anext(events))["method"] == "notifications/message"
        assert (await client.delete()).status == 200
        assert theirs not in setup.upstream.sessions
        assert (await client.post("tools/list")).status == 404


async def test_the_tool_that_waits_says_how_many_tools_there_are(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path) as setup:
        first = await setup.client.initialize()
        waiting = asyncio.create_task(setup.client.call("authorize_notes"))
        await until(lambda: len(setup.proxy.links) == 1)
        await consent(link_in(first.message))
        reply = await waiting
        assert reply.result["isError"] is False
        assert "connected" in reply.text
        assert "3 tools" in reply.text
        assert "http" not in reply.text
        methods = [message.get("method") for message in reply.messages[:-1]]
        assert methods in ([], CHANGES)
        assert "connected" in (await setup.client.call("authorize_notes")).text


async def test_the_tool_that_waits_returns_the_link_in_the_end(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, authorization={"wait": "1s", "cold_start": True}) as setup:
        await setup.client.initialize()
        for tool in ("authorize_notes", "call_notes", "echo"):
            reply = await setup.client.call(tool, name="echo")
            assert reply.result["isError"] is True
            assert setup.proxy.links[0] in reply.text
            assert reply.result["_meta"][LINK_KEY] == setup.proxy.links[0]


@pytest.mark.parametrize("version", ["2025-11-25", MODERN])
async def test_a_client_that_does_not_list_again_calls_tools_by_name(
    servers: Servers, tmp_path: Path, version: str
) -> None:
    upstream = SESSIONS if version != MODERN else {}
    async with cold(servers, tmp_path, client={"version": version}, upstream=upstream) as setup:
        client = setup.client
        if version != MODERN:
            await client.initialize()
        assert "call_notes" in await names(client)
        waiting = asyncio.create_task(client.call("call_notes", name="echo", arguments={"text": "through"}))
        await consent(await setup.proxy.next_link())
        assert (await waiting).text == "through"
        sent = setup.upstream.calls("tools/call")[-1]
        assert sent.message["params"]["name"] == "echo"
        assert sent.message["params"]["arguments"] == {"text": "through"}
        if version == MODERN:
            assert sent.header("mcp-name") == "echo"
            assert sent.message["params"]["_meta"]
        again = await client.call("call_notes", name="whoami")
        assert again.result["isError"] is False
        refused = await client.call("call_notes", arguments={})
        assert refused.result["isError"] is True
        assert "name" in refused.text


async def test_a_restart_goes_on_with_the_session(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer, sessions_on=True)
    async with running_proxy(tmp_path, {"notes": upstream.url}, authorization=COLD) as proxy:
        async with proxy.client("notes") as client:
            first = await client.initialize()
        address = proxy.application.listening
        link = link_in(first.message)
    async with (
        running_proxy(tmp_path, {"notes": upstream.url}, authorization=COLD, listen=address) as proxy,
        client_again(client, proxy.origin) as again,
    ):
        assert (await again.post("prompts/list")).result == {"prompts": []}
        await consent(link)
        assert await names(again) == ["echo", "count", "whoami"]
        async with again.stream() as (_, events):
            assert [(await anext(events))["method"] for _ in CHANGES] == CHANGES
    async with (
        running_proxy(tmp_path, {"notes": upstream.url}, authorization=COLD, listen=address) as proxy,
        client_again(client, proxy.origin) as again,
    ):
        assert (await again.call("echo", text="x")).text == "x"
    assert len([call for call in upstream.calls("initialize") if call.header("mcp-session-id") is None]) >= 1
    assert len(upstream.sessions) == 1


def client_again(before: PlainClient, origin: str) -> PlainClient:
    client = PlainClient(f"{origin}/notes/mcp", version=before.version)
    client.session = before.session
    return client


async def test_a_session_ends_with_that_of_the_server(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path) as setup:
        first = await setup.client.initialize()
        await consent(link_in(first.message))
        assert (await setup.client.call("echo", text="x")).text == "x"
        setup.upstream.end_sessions()
        assert (await setup.client.call("echo", text="x")).status == 404
        assert (await setup.client.call("echo", text="x")).status == 404


async def test_a_server_without_session_ids_gets_none(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, upstream={}) as setup:
        first = await setup.client.initialize()
        await consent(link_in(first.message))
        assert (await setup.client.call("echo", text="x")).text == "x"
        assert {call.header("mcp-session-id") for call in setup.upstream.calls()} == {None}


async def test_an_older_revision_of_the_server_is_named_in_its_requests(servers: Servers, tmp_path: Path) -> None:
    result = {
        "protocolVersion": "2025-03-26",
        "capabilities": {"tools": {}},
        "serverInfo": {"name": "o", "version": "1"},
    }

    def initialize(received: Any) -> FakeResponse:
        return FakeResponse.json({"jsonrpc": "2.0", "id": received.message["id"], "result": result})

    async with cold(servers, tmp_path, upstream={"answers": {"initialize": initialize}}) as setup:
        first = await setup.client.initialize()
        assert first.result["protocolVersion"] == "2025-11-25"
        await consent(link_in(first.message))
        assert (await setup.client.call("echo", text="x")).text == "x"
        assert setup.upstream.calls("tools/call")[-1].header("mcp-protocol-version") == "2025-03-26"
        assert (await setup.client.post("prompts/list")).result == {"prompts": []}
        assert setup.upstream.calls("prompts/list") == []


async def test_a_server_that_refuses_initialize_ends_the_session(servers: Servers, tmp_path: Path) -> None:
    def initialize(received: Any) -> FakeResponse:
        error = {"code": -32601, "message": "no"}
        return FakeResponse.json({"jsonrpc": "2.0", "id": received.message["id"], "error": error}, 404)

    async with cold(servers, tmp_path, upstream={"answers": {"initialize": initialize}}) as setup:
        first = await setup.client.initialize()
        await consent(link_in(first.message))
        assert (await setup.client.call("echo", text="x")).status == 404


async def test_declining_is_said_at_once_to_what_waits(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, issuer={"auto_consent": False}) as setup:
        first = await setup.client.initialize()
        waiting = asyncio.create_task(setup.client.call("authorize_notes"))
        await asyncio.sleep(0)
        await decline(link_in(first.message))
        reply = await waiting
        assert "/connect/" not in json.dumps(reply.message)
        # The client is not dead: the next request gets a new link.
        assert "authorize_notes" in await names(setup.client)


async def test_nothing_changes_for_a_server_that_has_a_grant(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, authorization={"wait": "0s", "cold_start": True}) as setup:
        await consent(link_in((await setup.client.initialize()).message))
        async with setup.proxy.client("notes") as client:
            reply = await client.initialize()
            assert reply.result["serverInfo"]["name"] == "fake"
            assert client.session in setup.upstream.sessions
            assert await names(client) == ["echo", "count", "whoami"]


async def test_lists_in_a_servers_own_session_are_answered_after_its_grant_has_ended(
    servers: Servers, tmp_path: Path
) -> None:
    async with cold(servers, tmp_path, authorization={"wait": "0s", "cold_start": True}) as setup:
        await consent(link_in((await setup.client.initialize()).message))
        async with setup.proxy.client("notes") as client:
            await client.initialize()
            assert "echo" in await names(client)
            setup.issuer.end_grants()
            assert "authorize_notes" in await names(client)
            assert (await client.post("prompts/list")).result == {"prompts": []}
            await consent(setup.proxy.links[-1])
            assert await names(client) == ["echo", "count", "whoami"]


# 2026-07-28


async def test_discover_without_a_memory_is_an_error_with_the_link(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, client={"version": MODERN}, upstream={}) as setup:
        reply = await setup.client.post("server/discover")
        assert (reply.status, reply.error["data"]["authorization_url"]) == (200, setup.proxy.links[0])
        tools = (await setup.client.post("tools/list")).result
        assert (tools["resultType"], tools["ttlMs"], tools["cacheScope"]) == ("complete", 0, "private")
        prompts = (await setup.client.post("prompts/list")).result
        assert prompts == {"prompts": [], "resultType": "complete", "ttlMs": 0, "cacheScope": "private"}


async def test_a_subscription_is_acknowledged_held_and_then_the_servers(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, client={"version": MODERN}, upstream={}) as setup:
        setup.upstream.answers["subscriptions/listen"] = FakeResponse.events(listening)
        wanted = {"notifications": {"toolsListChanged": True, "promptsListChanged": False}}
        async with setup.client.stream("subscriptions/listen", wanted) as (response, events):
            assert response.status_code == 200
            first = await anext(events)
            assert first["method"] == "notifications/subscriptions/acknowledged"
            assert first["params"]["notifications"] == {"toolsListChanged": True}
            subscription = first["params"]["_meta"]["io.modelcontextprotocol/subscriptionId"]
            await consent(await setup.proxy.next_link())
            async with asyncio.timeout(5):
                changed = await anext(events)
                assert changed["method"] == CHANGES[0]
                assert changed["params"]["_meta"]["io.modelcontextprotocol/subscriptionId"] == subscription
                assert (await anext(events))["method"] == "notifications/resources/updated"
        assert setup.upstream.calls("subscriptions/listen")[-1].message["id"] == subscription


async def listening() -> AsyncIterator[bytes]:
    acknowledged = {"jsonrpc": "2.0", "method": "notifications/subscriptions/acknowledged", "params": {}}
    updated = {"jsonrpc": "2.0", "method": "notifications/resources/updated", "params": {"uri": "a:b"}}
    yield b": hello\n\n"
    data = b"event: message\ndata: " + json.dumps(acknowledged).encode() + b"\n\n"
    yield data[:20]
    yield data[20:]
    yield b"data: " + json.dumps(updated).encode() + b"\n\n"
    await asyncio.Event().wait()


# what is remembered


async def remembered(setup: ProxySetup) -> None:
    """Connect, wait until the server was asked what it offers, and disconnect."""
    first = await setup.client.initialize()
    link = link_in(first.message)
    await consent(link)
    await until(lambda: setup.upstream.calls("tools/list"), "the proxy has listed the tools")
    application = setup.proxy.application
    account = Account("local", "notes")
    catalog = await application.catalogs.fetched(application.servers["notes"], account)
    assert catalog is not None
    await application.broker.disconnect(account)
    setup.client.session = None


async def test_what_a_server_offered_is_shown_after_its_user_has_disconnected(servers: Servers, tmp_path: Path) -> None:
    def initialize(received: Any) -> FakeResponse:
        said = {
            "protocolVersion": "2025-06-18",
            "capabilities": {"tools": {}, "logging": {}, "completions": {}},
            "serverInfo": {"name": "s", "version": "1"},
            "instructions": "Be kind.",
        }
        return FakeResponse.json({"jsonrpc": "2.0", "id": received.message["id"], "result": said})

    async with cold(servers, tmp_path, upstream={"answers": {"initialize": initialize}}) as setup:
        await remembered(setup)
        reply = await setup.client.initialize()
        assert reply.result["protocolVersion"] == "2025-06-18"
        changed = {"listChanged": True}
        assert reply.result["capabilities"] == {
            "tools": changed,
            "prompts": changed,
            "resources": changed,
            "logging": {},
            "completions": {},
        }
        link = setup.proxy.links[-1]
        assert reply.result["instructions"].startswith("Be kind.\n\n")
        assert link in reply.result["instructions"]
        assert await names(setup.client) == ["echo", "count", "whoami", "authorize_notes"]
        assert (await setup.client.post("logging/setLevel", {"level": "error"})).result == {}
        await consent(link)
        assert await names(setup.client) == ["echo", "count", "whoami"]
        levels = [call.message["params"] for call in setup.upstream.calls("logging/setLevel")]
        assert levels == [{"level": "error"}]


async def test_discover_is_answered_from_memory(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, upstream={}) as setup:
        await remembered(setup)
        async with setup.proxy.client("notes", version=MODERN) as modern:
            loop = asyncio.get_running_loop()
            began = loop.time()
            result = (await modern.post("server/discover")).result
            assert loop.time() - began < 5
            assert (result["ttlMs"], result["cacheScope"], result["resultType"]) == (0, "private", "complete")
            assert result["supportedVersions"] == [MODERN]
            assert setup.proxy.links[-1] in result["instructions"]
            assert await names(modern) == ["echo", "count", "whoami", "authorize_notes"]
            await consent(setup.proxy.links[-1])
            assert await names(modern) == ["echo", "count", "whoami"]


# an authorization server that is slow, and callers


async def test_initialize_does_not_wait_for_a_slow_authorization_server(servers: Servers, tmp_path: Path) -> None:
    answer = asyncio.Event()

    async def never() -> AsyncIterator[bytes]:
        await answer.wait()
        yield b""

    upstream = {**SESSIONS, "metadata_answer": FakeResponse(stream=never)}
    async with cold(servers, tmp_path, upstream=upstream) as setup:
        loop = asyncio.get_running_loop()
        began = loop.time()
        reply = await setup.client.post("initialize", {"protocolVersion": "2025-11-25", "capabilities": {}})
        assert 1.5 < loop.time() - began < 8
        assert f"{setup.proxy.origin}/notes/mcp" in reply.result["instructions"]
        assert setup.proxy.links == []
        answer.set()


async def test_another_caller_can_not_use_a_session(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer, sessions_on=True)
    callers = HeaderCallers(principal("ann"), principal("bob"))
    async with (
        running_proxy(tmp_path, {"notes": upstream.url}, authorization=COLD, authenticator=callers) as proxy,
        proxy.client("notes", headers={"x-test-caller": "ann"}) as ann,
    ):
        await ann.initialize()
        assert ann.session is not None
        assert (await ann.post("ping")).result == {}
        async with proxy.client("notes", headers={"x-test-caller": "bob"}) as bob:
            assert (await bob.post("ping", session=ann.session)).status == 404
            assert (await bob.post("ping", session=ann.session.rpartition(".")[0])).status == 404
            bob.session = ann.session
            assert (await bob.delete()).status == 404
        assert (await ann.post("ping")).result == {}
    assert len(upstream.sessions) == 0
