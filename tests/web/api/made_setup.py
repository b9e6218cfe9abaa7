"""Servers and authorizations for tests of the API: what ``api_setup`` lacks."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.mcp_client import PlainClient
from fakes.mcp_server import FakeMcpServer
from fakes.team import post
from mcp_auth_proxy.config.settings import AdminSettings
from mcp_auth_proxy.models import Principal
from web.api.api_setup import ApiSetup, api_setup

LOOPBACK = ("127.0.0.1",)
NO_ISS = {"iss": None, "metadata_changes": {"authorization_response_iss_parameter_supported": False}}
"""An authorization server that promises no ``iss``."""


@dataclass(kw_only=True)
class MadeSetup:
    """``upstream`` is an MCP server that no configuration names, and ``issuer`` its authorization server."""

    api: ApiSetup
    issuer: FakeAuthorizationServer
    upstream: FakeMcpServer

    def key(self, name: str) -> dict[str, str]:
        """Return the fields with the key of a principal."""
        return {"authorization": f"Bearer {self.api.keys[name]}"}

    def mcp(self, server: str, name: str) -> PlainClient:
        """Return an MCP client of a principal."""
        return self.api.proxy.client(server, headers=self.key(name))

    @asynccontextmanager
    async def signed_in(self, name: str) -> AsyncIterator[Browser]:
        """Yield a browser in which a principal has signed in."""
        async with Browser() as browser:
            done = await post(browser, f"{self.api.proxy.origin}/sign-in", key=self.api.keys[name], next="/")
            assert done.status_code == 303, done.text
            yield browser

    async def make(self, name: str = "tickets", **more: object) -> dict[str, Any]:
        """Make a server for ``upstream``, as the admin."""
        response = await self.api.ada.post("/servers", json={"name": name, "url": self.upstream.url, **more})
        assert response.status_code == 201, response.text
        made: dict[str, Any] = response.json()
        return made

    async def headless(self, server: str, client: httpx2.AsyncClient, **more: object) -> dict[str, Any]:
        """Begin a headless authorization."""
        response = await client.post(f"/servers/{server}/flows", json={"mode": "headless", **more})
        assert response.status_code in (200, 201), response.text
        flow: dict[str, Any] = response.json()
        return flow

    async def connect(self, server: str, client: httpx2.AsyncClient) -> dict[str, Any]:
        """Connect the account of a client; return the flow."""
        flow = await self.headless(server, client)
        done = await client.post(f"/servers/{server}/complete", json=await consented(flow["authorization_url"]))
        assert done.status_code == 200, done.text
        ended: dict[str, Any] = (await client.get(f"/flows/{flow['id']}")).json()
        return ended


def administer(api: ApiSetup, **admin: Any) -> None:
    """Change the ``admin`` section, as a reload does."""
    settings = replace(api.proxy.application.settings, admin=AdminSettings(**admin))
    api.proxy.application.settings = settings
    api.proxy.application.made.set_allow_private(settings.admin.allow_private)


def principal_of(api: ApiSetup, name: str) -> Principal:
    found = api.directory.principal(f"prn_{name}")
    assert found is not None
    return found


async def consented(authorization_url: str) -> dict[str, str]:
    """Consent at the authorization server as a user does; return what it sends to the redirect URI."""
    async with Browser() as browser:
        url = await browser.stop_before(authorization_url)
    return {name: value[0] for name, value in parse_qs(urlsplit(url).query).items()}


@asynccontextmanager
async def made_setup(
    servers: Servers, folder: Path, *, issuer: dict[str, Any] | None = None, **upstream: Any
) -> AsyncIterator[MadeSetup]:
    """Run everything until the block ends; servers made at run time may be on loopback."""
    authority = await servers.authorization_server(**{"auto_consent": True, **(issuer or {})})
    server = await servers.mcp_server(authority, **upstream)
    admin = {"allow_private": list(LOOPBACK)}
    async with api_setup(folder, authorization={"wait": "0s"}, admin=admin) as api:
        yield MadeSetup(api=api, issuer=authority, upstream=server)
