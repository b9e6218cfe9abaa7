"""The examples of docs/sharing.md, run as they stand: a team behind one proxy, with each way to identify callers."""

import asyncio
from pathlib import Path

import pytest

from fakes.fixtures import Servers
from fakes.mcp_client import PlainClient
from fakes.sharing import Shared, block

KEYS_CONFIG = block("yaml", "mode: api_key")
MAKE_KEYS = block("sh", "create grace")
LIST = block("sh", "api-keys list")
CLAUDE_KEY = block("sh", "Bearer $MCP_KEY")
FILES = [block("json", variable) for variable in ("${MCP_KEY}", "${env:MCP_KEY}", "${input:mcp-key}")]
DISABLE = block("sh", "principals disable")
REVOKE = block("sh", "api-keys revoke")


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
        for file in FILES:
            async with shared.configured(file, ada) as client:
                assert (await client.call("echo", text="again")).text == "again"
        async with shared.configured(FILES[0], grace) as client, shared.person(key=ada) as person:
            link = shared.link_in((await client.call("echo", text="x")).body.decode())
            assert (await person.follow(link)).status_code == 403
        async with shared.configured(FILES[0], ada) as client:
            await shared.run(DISABLE)
            await refused(client)
        async with shared.configured(FILES[0], ci) as client:
            assert "/connect/" in (await client.call("echo", text="x")).body.decode()
            shared.moves["1f2e3d4c5b6a"] = ci.split("_")[1]
            await shared.run(REVOKE)
            await refused(client)


async def refused(client: PlainClient) -> None:
    """Wait, bounded, until a client is refused."""
    async with asyncio.timeout(5):
        while (await client.call("echo", text="x")).status != 401:
            await asyncio.sleep(0.05)
