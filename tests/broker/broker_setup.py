"""A broker on a real store, before an authorization server and MCP servers on real sockets."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2

from fakes.authorization_server import FakeAuthorizationServer
from fakes.headless import Browser
from fakes.proxy_setup import Clock
from mcp_auth_proxy.broker import (
    AuthorizationRedirect,
    Broker,
    ChallengeHistory,
    ConfirmationPrompt,
    PendingAuthorization,
)
from mcp_auth_proxy.config.settings import OAuthSettings, Secret, ServerSettings
from mcp_auth_proxy.models import LOCAL, AccessToken, Account, Flow, GrantType
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grants import Grants
from store.builders import store_settings

PUBLIC_URL = "http://127.0.0.1:8787"
NOTES = Account(LOCAL, "notes")


@dataclass(kw_only=True)
class BrokerSetup:
    """``servers`` is the mapping that the broker was given; a test may change it."""

    broker: Broker
    database: Engine
    servers: dict[str, ServerSettings]
    clock: Clock
    announced: list[tuple[Flow, str]] = field(default_factory=list)

    @property
    def grants(self) -> Grants:
        return Grants(self.database)

    @property
    def flows(self) -> Flows:
        return Flows(self.database)

    async def ask(self, token: AccessToken | None = None, account: Account = NOTES) -> tuple[int, list[bytes]]:
        """Send a request to an account's server; return the status and the WWW-Authenticate fields."""
        headers = {} if token is None else {"authorization": token.header.decode()}
        body = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        async with httpx2.AsyncClient(trust_env=False) as client:
            response = await client.post(self.servers[account.server].url, json=body, headers=headers)
        return response.status_code, [value.encode() for value in response.headers.get_list("www-authenticate")]

    async def challenged(
        self, used: AccessToken | None = None, *, history: ChallengeHistory | None = None, account: Account = NOTES
    ) -> AccessToken | PendingAuthorization | None:
        """Send a request, and let the broker decide how to continue after the response."""
        sent_to = self.servers[account.server]
        status, challenge = await self.ask(used, account)
        return await self.broker.challenged(
            account,
            sent_to=sent_to,
            status=status,
            challenge=challenge,
            used=used,
            history=history or ChallengeHistory(),
        )

    async def pending(self, account: Account = NOTES) -> PendingAuthorization:
        """Start an authorization that waits for its user."""
        outcome = await self.challenged(account=account)
        assert isinstance(outcome, PendingAuthorization)
        return outcome

    async def callback(self, pending: PendingAuthorization) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Open a link and consent; return the parameters and the cookies that reach the callback."""
        server, flow_id = pending.flow.key.account.server, pending.flow.id
        redirect = await self.broker.open_link(server, flow_id)
        if isinstance(redirect, ConfirmationPrompt):
            redirect = await self.broker.confirm_link(server, flow_id)
        assert isinstance(redirect, AuthorizationRedirect)
        async with Browser() as browser:
            url = await browser.stop_before(redirect.authorization_url)
        return parse_qs(urlsplit(url).query), {redirect.cookie_name: redirect.cookie_value}

    async def connect(self, account: Account = NOTES) -> AccessToken:
        """Authorize as a user would; return the token."""
        pending = await self.pending(account)
        await self.broker.complete(*await self.callback(pending))
        token = await pending.wait(0)
        assert token is not None
        return token


@asynccontextmanager
async def broker_setup(
    folder: Path,
    *servers: ServerSettings,
    clock: Clock | None = None,
    public_url: str = PUBLIC_URL,
    is_served: Callable[[str], bool] = lambda public_url: False,
) -> AsyncIterator[BrokerSetup]:
    """Run a broker for these servers; again on the same folder it has the same store.

    ``is_served``: whether another process runs at a URL.
    """
    database = await open_store(store_settings(folder), announce=lambda line: None)
    fetcher = Fetcher()
    announced: list[tuple[Flow, str]] = []
    mapping = {server.name: server for server in servers}
    clock = clock or Clock()
    broker = Broker(
        servers=mapping,
        database=database,
        fetcher=fetcher,
        public_url=public_url,
        is_served=is_served,
        announce=lambda flow, link: announced.append((flow, link)),
        clock=clock,
    )
    try:
        await broker.start()
        yield BrokerSetup(broker=broker, database=database, servers=mapping, clock=clock, announced=announced)
    finally:
        await broker.aclose()
        await fetcher.aclose()
        await database.close()


def server(url: str, name: str = "notes", **oauth: Any) -> ServerSettings:
    return ServerSettings(name=name, url=url, oauth=OAuthSettings(**oauth))


def unattended(issuer: FakeAuthorizationServer, url: str, name: str = "notes") -> ServerSettings:
    """A server whose tokens are obtained with client credentials."""
    issuer.add_client(client_id="agent", secret="agent-secret")
    return server(
        url,
        name,
        grant=GrantType.CLIENT_CREDENTIALS,
        client_id="agent",
        client_secret=Secret("agent-secret"),
    )
