"""A running proxy whose API knows ``ada`` (an admin), ``ben`` and ``eve``, and ``zoe``, an admin of another project."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from fakes.callers import FIELD, TableAuthenticator, caller
from fakes.proxy import RunningProxy, running_proxy
from fakes.proxy_setup import Clock
from mcp_auth_proxy.models import Role
from mcp_auth_proxy.web.api.context import ApiContext

PROBLEM = "application/problem+json"
SERVERS = {"notes": "http://127.0.0.1:9/mcp"}


@dataclass(kw_only=True)
class ApiSetup:
    """Each client is one caller's; ``nobody`` has no credential."""

    proxy: RunningProxy
    context: ApiContext
    callers: TableAuthenticator
    clock: Clock
    nobody: httpx2.AsyncClient
    ada: httpx2.AsyncClient
    ben: httpx2.AsyncClient
    eve: httpx2.AsyncClient
    zoe: httpx2.AsyncClient


@asynccontextmanager
async def api_setup(
    folder: Path, servers: Mapping[str, str | dict[str, Any]] | None = None, **sections: Any
) -> AsyncIterator[ApiSetup]:
    """Run the proxy until the block ends; ``sections`` are sections of its configuration."""
    table = TableAuthenticator(
        caller("ada", Role.ADMIN), caller("ben"), caller("eve"), caller("zoe", Role.ADMIN, project="other")
    )
    clock = Clock()
    async with running_proxy(folder, servers or SERVERS, clock=clock, **sections) as proxy, AsyncExitStack() as stack:
        mount = proxy.application.site.api
        assert mount is not None
        mount.context.authenticator = table

        async def client(name: str = "") -> httpx2.AsyncClient:
            headers = {FIELD.decode(): name} if name else {}
            return await stack.enter_async_context(
                httpx2.AsyncClient(base_url=f"{proxy.origin}/api/v1", headers=headers, trust_env=False, timeout=30)
            )

        yield ApiSetup(
            proxy=proxy,
            context=mount.context,
            callers=table,
            clock=clock,
            nobody=await client(),
            ada=await client("ada"),
            ben=await client("ben"),
            eve=await client("eve"),
            zoe=await client("zoe"),
        )


def assert_problem(response: httpx2.Response, status: int, kind: str = "") -> dict[str, Any]:
    """A problem of this status and kind; return it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["type"].startswith("urn:mcp-auth-proxy:")
    if kind:
        assert problem["type"] == f"urn:mcp-auth-proxy:{kind}"
    return problem
