"""The official clients, in versions 1 and 2, while the user has not authorized yet: none is ever dead or restarted."""

import json
from pathlib import Path
from typing import Any

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.mcp_client import MODERN
from fakes.official_clients import OfficialClient, official_client
from fakes.proxy import RunningProxy, link_in, proxy_process, run_command, running_proxy, write_config
from mcp_auth_proxy.models import Account

pytestmark = pytest.mark.clients

COLD: dict[str, Any] = {"cold_start": True, "wait": "1s"}
AT_ONCE: dict[str, Any] = {"cold_start": True, "wait": "0s"}
OLD = [("python-1", "legacy"), ("python-2", "legacy"), ("typescript-1", "legacy"), ("typescript-2", "legacy")]
ALL = [*OLD, ("python-2", "auto"), ("python-2", MODERN), ("typescript-2", "auto")]


async def remember(proxy: RunningProxy) -> None:
    """Let the proxy ask the server what it offers, and then disconnect."""
    application, account = proxy.application, Account("local", "notes")
    async with proxy.client("notes") as client:
        await consent(link_in((await client.initialize()).message))
    assert await application.catalogs.fetched(application.servers["notes"], account) is not None
    await application.broker.disconnect(account)


async def until_listed(client: OfficialClient, tool: str) -> list[str]:
    """List the tools until this one is there, bounded; return their names."""
    for _ in range(100):
        names = await client.tools()
        if tool in names:
            return names
    raise AssertionError(f"no {tool} in {names}")


@pytest.mark.parametrize(("name", "era"), ALL)
async def test_a_client_that_starts_before_consent_uses_the_tools_after_it(
    servers: Servers, tmp_path: Path, name: str, era: str
) -> None:
    upstream = await servers.real_mcp_server(await servers.authorization_server(auto_consent=True))
    config = write_config(tmp_path, {"notes": upstream.url}, authorization=COLD)
    async with proxy_process(config) as proxy:
        async with official_client(name, f"{proxy.origin}/notes/mcp", era=era) as client:
            connected = await client.next("connected")
            assert await client.tools() == ["authorize_notes", "call_notes"]
            link = await proxy.next_link()
            if era != MODERN:
                assert link in connected["instructions"]
            await consent(link)
            await client.next("changed")
            # As a client does that does not list again.
            by_name = await client.call("call_notes", name="echo", arguments={"text": "by name"})
            assert by_name["text"] == "by name"
            assert "authorize_notes" not in await until_listed(client, "echo")
            assert (await client.call("echo", text="hello"))["text"] == "hello"

            code, _, err = await run_command("logout", "notes", "--config", str(config))
            assert code == 0, err
            assert "echo" in await until_listed(client, "authorize_notes")
            await consent(await proxy.next_link(2))
            assert "connected" in (await client.call("authorize_notes"))["text"]
            assert (await client.call("echo", text="again"))["text"] == "again"
        assert await proxy.stop() == 0
    assert len(proxy.links) == 2
    assert "Traceback" not in proxy.log


@pytest.mark.parametrize(("name", "era"), [*OLD, ("python-2", MODERN)])
async def test_a_client_does_not_notice_that_the_proxy_was_restarted(
    servers: Servers, tmp_path: Path, name: str, era: str
) -> None:
    upstream = await servers.real_mcp_server(await servers.authorization_server(auto_consent=True))
    config = write_config(tmp_path, {"notes": upstream.url}, authorization=COLD)
    async with proxy_process(config) as proxy:
        address = proxy.origin.removeprefix("http://")
        async with official_client(name, f"{proxy.origin}/notes/mcp", era=era) as client:
            await client.next("connected")
            assert "authorize_notes" in await client.tools()
            link = await proxy.next_link()
            assert await proxy.stop() == 0
            async with proxy_process(config, listen=address):
                assert "authorize_notes" in await client.tools()
                await consent(link)
                await until_listed(client, "echo")
                assert (await client.call("echo", text="hello"))["text"] == "hello"


@pytest.mark.parametrize(("name", "era"), OLD)
async def test_a_client_of_2025_is_told_when_its_link_was_used(
    servers: Servers, tmp_path: Path, name: str, era: str
) -> None:
    upstream = await servers.real_mcp_server(await servers.authorization_server(auto_consent=True))
    async with (
        running_proxy(tmp_path, {"notes": upstream.url}, authorization=AT_ONCE) as proxy,
        official_client(name, f"{proxy.origin}/notes/mcp", era=era, action="accept") as client,
    ):
        await client.next("connected")
        error = await client.call("echo", text="x")
        assert error["code"] == -32042
        (elicitation,) = error["data"]["elicitations"]
        await consent(elicitation["url"])
        assert (await client.next("complete"))["id"] == elicitation["elicitationId"]
        assert (await client.call("echo", text="hello"))["text"] == "hello"
    assert len(proxy.links) == 1


@pytest.mark.parametrize("action", ["accept", "decline", "cancel"])
@pytest.mark.parametrize("name", ["python-2", "typescript-2"])
async def test_a_client_of_2026_asks_its_user(servers: Servers, tmp_path: Path, name: str, action: str) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.real_mcp_server(issuer)
    async with running_proxy(tmp_path, {"notes": upstream.url}, authorization=AT_ONCE) as proxy:
        await remember(proxy)
        url = f"{proxy.origin}/notes/mcp"
        async with official_client(name, url, era="auto", action=action) as client:
            connected = await client.next("connected")
            assert connected["revision"] in (MODERN, None)
            assert proxy.links[-1] in connected["instructions"]
            await client.begin_call("echo", text="hello")
            asked = await client.next("asked")
            assert asked["url"] == proxy.links[-1]
            if action == "accept":
                await consent(asked["url"])
                assert (await client.next("result"))["text"] == "hello"
                return
            declined = await client.next("result")
            assert declined["isError"]
            assert "mcp-auth-proxy login notes" in declined["text"]
            assert "/connect/" not in json.dumps(declined)
            # Not asked again, and the link is still good.
            assert (await client.call("echo", text="x"))["isError"]
            await consent(asked["url"])
            assert (await client.call("echo", text="hello"))["text"] == "hello"
            assert not [event for event in client.seen if event["event"] == "asked"]
