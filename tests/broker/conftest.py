"""One authorization server, one MCP server ``notes``, and a broker for it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.broker_setup import BrokerSetup, broker_setup, server
from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers, on_both_engines
from fakes.mcp_server import FakeMcpServer


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tmp_path" in metafunc.fixturenames:
        on_both_engines(metafunc)


@pytest.fixture
async def issuer(servers: Servers) -> FakeAuthorizationServer:
    return await servers.authorization_server(auto_consent=True)


@pytest.fixture
async def upstream(servers: Servers, issuer: FakeAuthorizationServer) -> FakeMcpServer:
    return await servers.mcp_server(issuer)


@pytest.fixture
async def setup(each_engine: str, tmp_path: Path, upstream: FakeMcpServer) -> AsyncIterator[BrokerSetup]:
    async with broker_setup(tmp_path, server(upstream.url)) as setup:
        yield setup
