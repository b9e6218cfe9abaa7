"""A running proxy that knows ``ada`` (an admin), ``ben`` and ``eve``, and ``zoe``, an admin of another project."""

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2

from fakes.proxy import RunningProxy, running_proxy
from fakes.proxy_setup import Clock
from mcp_auth_proxy.identity import Directory
from mcp_auth_proxy.identity.keys import make_key
from mcp_auth_proxy.models import ALL_SCOPES, Account, Grant, Principal, Role, Scope
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.web.api.context import ApiContext
from store.builders import grant

PROBLEM = "application/problem+json"
SERVERS = {"notes": "http://127.0.0.1:9/mcp", "linear": "http://127.0.0.1:9/linear"}


@dataclass(kw_only=True)
class ApiSetup:
    """Each client is one caller's, with a key; ``nobody`` has no credential. Their ids are ``prn_ada`` and so on."""

    proxy: RunningProxy
    context: ApiContext
    clock: Clock
    nobody: httpx2.AsyncClient
    ada: httpx2.AsyncClient
    ben: httpx2.AsyncClient
    eve: httpx2.AsyncClient
    zoe: httpx2.AsyncClient
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        return self.context.database

    @property
    def directory(self) -> Directory:
        return self.context.directory

    async def add_grant(self, owner: str, server: str = "notes", account: str = "default", **changes: Any) -> Grant:
        """Store a grant whose tokens begin now; ``changes`` are those of its ``tokens``."""
        given = grant(server, at=self.clock())
        given = replace(
            given, key=replace(given.key, account=Account(owner, server, account), resource="http://127.0.0.1")
        )
        return await Grants(self.engine).add(replace(given, tokens=replace(given.tokens, **changes)))

    async def key_of(self, principal: str, scopes: Iterable[Scope] = ALL_SCOPES) -> str:
        """Make a key and return it as its owner has it."""
        return await add_key(self.directory, principal, scopes, now=self.clock())


async def add_key(directory: Directory, principal: str, scopes: Iterable[Scope], *, now: float) -> str:
    key, text = make_key(principal=principal, name="test", scopes=scopes, now=now)
    await directory.add_key(key)
    return text


@asynccontextmanager
async def api_setup(
    folder: Path, servers: Mapping[str, str | dict[str, Any]] | None = None, **sections: Any
) -> AsyncIterator[ApiSetup]:
    """Run the proxy until the block ends; ``sections`` are sections of its configuration."""
    clock = Clock()
    sections.setdefault("inbound", {"mode": "api_key"})
    async with running_proxy(folder, servers or SERVERS, clock=clock, **sections) as proxy, AsyncExitStack() as stack:
        mount = proxy.application.site.api
        assert mount is not None
        directory = mount.context.directory

        async def client(key: str = "") -> httpx2.AsyncClient:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            return await stack.enter_async_context(
                httpx2.AsyncClient(base_url=f"{proxy.origin}/api/v1", headers=headers, trust_env=False, timeout=30)
            )

        keys = {}
        for name, role, project in (
            ("ada", Role.ADMIN, "default"),
            ("ben", Role.MEMBER, "default"),
            ("eve", Role.MEMBER, "default"),
            ("zoe", Role.ADMIN, "other"),
        ):
            principal = Principal(id=f"prn_{name}", name=name, role=role, project_id=project, created_at=clock())
            await directory.add(principal)
            keys[name] = await add_key(directory, principal.id, ALL_SCOPES, now=clock())
        yield ApiSetup(
            proxy=proxy,
            context=mount.context,
            clock=clock,
            nobody=await client(),
            keys=keys,
            ada=await client(keys["ada"]),
            ben=await client(keys["ben"]),
            eve=await client(keys["eve"]),
            zoe=await client(keys["zoe"]),
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
