"""A server that names a new authorization server each time it is asked fills the store with nothing (T89)."""

import sqlite3
from contextlib import closing
from pathlib import Path

from fakes.fixtures import Servers
from fakes.headless import consent, decline
from fakes.proxy import link_in, running_proxy
from mcp_auth_proxy.store.flows import KEPT_FLOWS
from mcp_auth_proxy.store.registrations import KEPT_REGISTRATIONS

ISSUERS = 30


def rows(folder: Path, table: str, server: str) -> int:
    with closing(sqlite3.connect(folder / "proxy.db")) as store:
        (found,) = store.execute(f"SELECT count(*) FROM {table} WHERE server = ?", [server]).fetchone()
    return int(found)


async def test_a_server_with_ever_new_issuers_leaves_a_bounded_number_of_rows(
    servers: Servers, tmp_path: Path
) -> None:  # T89
    tenants = await servers.tenants(*(f"/{number}" for number in range(ISSUERS)), auto_consent=True)
    hostile, good = await servers.mcp_server(tenants[0]), await servers.mcp_server(tenants[0])
    upstreams = {"hostile": hostile.url, "good": good.url}
    async with running_proxy(tmp_path, upstreams, authorization={"wait": "0s"}) as proxy:
        async with proxy.client("good") as client:
            await consent(link_in((await client.call("echo")).message))
        async with proxy.client("hostile") as client:
            for tenant in tenants:
                hostile.authorization_servers = [tenant]
                tenant.auto_consent = False
                page = await decline(link_in((await client.call("echo")).message))
                assert "access_denied" in page.text
        assert rows(tmp_path, "registrations", "hostile") == KEPT_REGISTRATIONS
        assert rows(tmp_path, "flows", "hostile") == KEPT_FLOWS
        assert rows(tmp_path, "registrations", "good") == 1
        async with proxy.client("good") as client:
            assert (await client.call("echo", text="good")).text == "good"
