"""The examples of docs/sharing.md, run as they stand: a team behind one proxy, with each way to identify callers."""

import asyncio
import sys
from pathlib import Path

import pytest

from deploy import test_sharing_nginx, test_sharing_provider
from fakes.fixtures import Servers
from fakes.mcp_client import PlainClient
from fakes.sharing import PAGE, Shared, block, blocks_of
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.grants import Grants
from store.builders import grant

KEYS_CONFIG = block("yaml", "mode: api_key")
MAKE_KEYS = block("sh", "create grace")
LIST = block("sh", "api-keys list")
CLAUDE_KEY = block("sh", "Bearer $MCP_KEY")
JSON_KEY, CURSOR_KEY, CODE_KEY = (block("json", name) for name in ("${MCP_KEY}", "${env:MCP_KEY}", "${input:mcp-key}"))
DISABLE = block("sh", "principals disable")
REVOKE = block("sh", "api-keys revoke")
WHO = block("yaml", "grant_owner: shared")
ASSIGN = block("sh", "grants assign")


@pytest.mark.nginx
async def test_a_team_with_api_keys(servers: Servers, tmp_path: Path) -> None:
    authority = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(authority)
    shared = Shared.on(tmp_path, mcp_linear_app=upstream.url)
    shared.configure(KEYS_CONFIG)
    grace, ada, ci = (await shared.run(MAKE_KEYS)).split()
    async with shared.serving():
        listed = await shared.run(LIST)
        assert "grace  admin  active" in listed
        assert all(key not in listed and key.split("_")[1] in listed for key in (grace, ada, ci))
        # Ada's editors are one caller: she authorizes once.
        async with await shared.added_to_claude(CLAUDE_KEY, MCP_KEY=ada) as client, shared.person(key=ada) as person:
            link = shared.link_in((await client.call("echo", text="x")).body.decode())
            assert (await person.follow(link)).status_code == 200
            assert len(person.asked_at) == 1
            assert (await client.call("echo", text="in")).text == "in"
        for file in (JSON_KEY, CURSOR_KEY, CODE_KEY):
            async with shared.configured(file, ada) as client:
                assert (await client.call("echo", text="again")).text == "again"
        async with shared.configured(JSON_KEY, grace) as client, shared.person(key=ada) as person:
            link = shared.link_in((await client.call("echo", text="x")).body.decode())
            assert (await person.follow(link)).status_code == 403
        async with shared.configured(JSON_KEY, ada) as client:
            await shared.run(DISABLE)
            await refused(client)
        async with shared.configured(JSON_KEY, ci) as client:
            assert "/connect/" in (await client.call("echo", text="x")).body.decode()
            shared.moves["1f2e3d4c5b6a"] = ci.split("_")[1]
            await shared.run(REVOKE)
            await refused(client)


async def refused(client: PlainClient) -> None:
    """Wait, bounded, until a client is refused."""
    for _ in range(100):
        if (await client.call("echo", text="x")).status == 401:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it is not refused")


async def link_for(shared: Shared, client: PlainClient) -> str:
    """Return the link that a call is answered with."""
    return shared.link_in((await client.call("echo", text="x")).body.decode())


async def connect(shared: Shared, client: PlainClient, key: str) -> None:
    """Authorize in a new browser, and call."""
    async with shared.person(key=key) as person:
        assert (await person.follow(await link_for(shared, client))).status_code == 200
    assert (await client.call("echo", text="in")).text == "in"


@pytest.mark.nginx
async def test_who_may_use_what(servers: Servers, tmp_path: Path) -> None:
    authority = await servers.authorization_server(auto_consent=True)
    linear, wiki, payroll = [await servers.mcp_server(authority) for _ in range(3)]
    urls = {"mcp_linear_app": linear.url, "wiki_example_com": wiki.url, "payroll_example_com": payroll.url}
    shared = Shared.on(tmp_path, **urls)
    shared.configure(KEYS_CONFIG, WHO)
    grace, ada, ci = (await shared.run(MAKE_KEYS)).split()

    def at(server: str, key: str) -> PlainClient:
        return shared.client(f"{shared.origin}/{server}/mcp", {"X-API-Key": key})

    async with shared.serving():
        async with at("linear", ada) as own, at("linear@work", ada) as work, shared.person(key=grace) as admin:
            await connect(shared, own, ada)
            link = await link_for(shared, work)
            assert (await admin.follow(link)).status_code == 403
            await connect(shared, work, ada)
            assert authority.seen("authorize", login_hint="team@example.com")
        async with at("wiki", ada) as member, at("wiki", grace) as admin_client:
            told = (await member.call("echo", text="x")).body.decode()
            assert "only an admin can give" in told
            assert "/connect/" not in told
            await connect(shared, admin_client, grace)
            assert (await member.call("echo", text="with hers")).text == "with hers"
        for key, status in {grace: 200, ada: 200, ci: 404}.items():
            async with at("payroll", key) as client:
                assert (await client.call("echo", text="x")).status == status


def test_every_example_of_the_page_is_run() -> None:
    """In this module, or in those beside it."""
    modules = (sys.modules[__name__], test_sharing_nginx, test_sharing_provider)
    run = [value for module in modules for value in vars(module).values()]
    assert [each.text for each in blocks_of(PAGE) if each not in run] == []


async def test_the_grants_of_one_user_are_given_to_several(tmp_path: Path) -> None:
    shared = Shared.on(tmp_path)
    shared.configure(KEYS_CONFIG, WHO)
    await shared.run(MAKE_KEYS)
    engine = await open_store(load(tmp_path / "mcp-auth-proxy.yaml", environ={}).store)
    for server in ("linear", "wiki"):
        await Grants(engine).add(grant(server))
    await engine.close()
    assert await shared.run(ASSIGN) == "linear: now of grace\nwiki: now shared\n"
