"""A proxy that several people share, each with an API key and a browser of their own."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.mcp_client import PlainClient
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import RunningProxy, link_in, running_proxy
from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.identity.keys import make_key
from mcp_auth_proxy.models import ALL_SCOPES, Principal, Role, Scope
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.api_keys import ApiKeys
from mcp_auth_proxy.store.principals import Principals, new_principal_id


async def add_member(
    folder: Path, name: str, *, role: Role = Role.MEMBER, scopes: frozenset[Scope] = ALL_SCOPES
) -> str:
    """Add a principal with a key to the store of ``running_proxy`` in a folder; return the key."""
    source = KeySource(kind="file", name=str(folder / "proxy.key"))
    database = await open_store(StoreSettings(path=folder / "proxy.db", keys=(source,), default_key=True))
    try:
        principals, now = Principals(database), time.time()
        found = await principals.by_name(name)
        if found is None:
            found = Principal(id=new_principal_id(), name=name, role=role, created_at=now)
            await principals.add(found)
        key, text = make_key(principal=found.id, name=name, scopes=scopes, now=now)
        await ApiKeys(database).add(key)
    finally:
        await database.close()
    return text


@dataclass(kw_only=True)
class Team:
    """The proxy with the server ``notes``, and the keys of its users."""

    issuer: FakeAuthorizationServer
    upstream: FakeMcpServer
    proxy: RunningProxy
    keys: dict[str, str]

    def client(self, name: str) -> PlainClient:
        """Return an MCP client of a user."""
        return self.proxy.client("notes", headers={"authorization": f"Bearer {self.keys[name]}"})

    async def link(self, name: str) -> str:
        """Return the link that a request of a user is answered with."""
        async with self.client(name) as client:
            return link_in((await client.call("echo", text="x")).message)

    async def sign_in(self, browser: Browser, name: str, onward: str = "/") -> httpx2.Response:
        """Sign a user in with their key; return the redirect."""
        return await post(browser, f"{self.proxy.origin}/sign-in", key=self.keys[name], next=onward)

    async def sign_out(self, browser: Browser) -> httpx2.Response:
        """Press the button that ends the session."""
        return await post(browser, f"{self.proxy.origin}/sign-in/out")


async def post(browser: Browser, url: str, *, origin: str | None = None, **form: str) -> httpx2.Response:
    """Send a form as a page of ``origin`` would; by default, a page of the same origin."""
    own = "/".join(url.split("/")[:3])
    headers = {"origin": own if origin is None else origin}
    return await browser.client.post(url, data=form, headers=headers)


@asynccontextmanager
async def team(
    servers: Servers, folder: Path, *names: str, inbound: dict[str, Any] | None = None, **sections: Any
) -> AsyncIterator[Team]:
    """Run a proxy that identifies callers by their keys, with these users, until the block ends."""
    authority = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(authority)
    keys = {name: await add_member(folder, name) for name in names}
    sections.setdefault("authorization", {"wait": "0s"})
    async with running_proxy(
        folder, {"notes": upstream.url}, inbound=inbound or {"mode": "api_key"}, **sections
    ) as proxy:
        yield Team(issuer=authority, upstream=upstream, proxy=proxy, keys=keys)
