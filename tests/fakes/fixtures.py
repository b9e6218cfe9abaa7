"""Fixtures that start the fakes and stop them after the test; ``servers`` starts any number of them."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.types import ASGIApp

from fakes import postgresql
from fakes.authorization_server import FakeAuthorizationServer, Tenants
from fakes.mcp_server import FakeMcpServer
from mcp_auth_proxy.cli.demo_servers.authorization_server import AuthorizationServer
from mcp_auth_proxy.cli.demo_servers.local_server import LocalServer, serve
from mcp_auth_proxy.cli.demo_servers.mcp_server import ProtectedMcpServer, Protection


@dataclass(kw_only=True)
class RealMcpServer:
    """The SDK's MCP server behind the demo's bearer check; ``steps`` are the names of the steps that it announced."""

    url: str
    protection: Protection
    local: LocalServer
    steps: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def postgresql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[postgresql.Server]:
    """One server for all workers of a run."""
    folder = tmp_path_factory.getbasetemp()
    with postgresql.shared_server(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) as server:
        yield server


@pytest.fixture
def each_engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The engine of the stores of a test that ``on_both_engines`` runs twice."""
    engine: str = getattr(request, "param", "sqlite")
    if engine == "sqlite":
        yield engine
        return
    with postgresql.databases(request.getfixturevalue("postgresql_server")):
        yield engine


def on_both_engines(metafunc: pytest.Metafunc) -> None:
    """Run a test on SQLite and PostgreSQL, unless it is marked ``sqlite``; for ``pytest_generate_tests``."""
    if metafunc.definition.get_closest_marker("sqlite") is None:
        engines = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)]
        metafunc.fixturenames.insert(0, "each_engine")
        metafunc.parametrize("each_engine", engines, indirect=True)


class Servers:
    """Starts fakes; all stop when the test ends, the last one first."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack

    async def authorization_server(self, path: str = "", **options: Any) -> FakeAuthorizationServer:
        return await self._stack.enter_async_context(FakeAuthorizationServer.running(path, **options))

    async def tenants(self, *paths: str, **options: Any) -> list[FakeAuthorizationServer]:
        return await self._stack.enter_async_context(Tenants.running(*paths, **options))

    async def mcp_server(self, *authorization_servers: AuthorizationServer, **options: Any) -> FakeMcpServer:
        return await self._stack.enter_async_context(FakeMcpServer.running(*authorization_servers, **options))

    async def real_mcp_server(
        self, authorization_server: AuthorizationServer, *, scopes: tuple[str, ...] = ()
    ) -> RealMcpServer:
        steps: list[str] = []
        protections: list[Protection] = []

        def make(origin: str) -> ASGIApp:
            protection = Protection(
                resource=f"{origin}/mcp",
                issuer=authorization_server.issuer,
                find_token=authorization_server.ledger.token,
                scopes=scopes,
                announce=lambda step, _: steps.append(step),
            )
            protections.append(protection)
            return ProtectedMcpServer(protection)

        local = await self._stack.enter_async_context(serve(make, lifespan="on"))
        protection = protections[0]
        return RealMcpServer(url=protection.resource, protection=protection, local=local, steps=steps)


@pytest.fixture
async def servers() -> AsyncIterator[Servers]:
    async with AsyncExitStack() as stack:
        yield Servers(stack)


@pytest.fixture
async def authorization_server(servers: Servers) -> FakeAuthorizationServer:
    """Run an authorization server that shows its consent page."""
    return await servers.authorization_server()


@pytest.fixture
async def mcp_server(servers: Servers, authorization_server: FakeAuthorizationServer) -> FakeMcpServer:
    """Run a protected MCP server that accepts the tokens of ``authorization_server``."""
    return await servers.mcp_server(authorization_server)


@pytest.fixture
async def real_mcp_server(servers: Servers, authorization_server: FakeAuthorizationServer) -> RealMcpServer:
    """Run the SDK's MCP server, which accepts the tokens of ``authorization_server``."""
    return await servers.real_mcp_server(authorization_server)
