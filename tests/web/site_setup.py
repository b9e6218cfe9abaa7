"""The site alone, behind a real listener: its broker and its store follow a script."""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NoReturn, Self, cast

import httpx2
from starlette.requests import Request

from fakes.forwarding import pending_authorization
from fakes.listener import listener
from mcp_auth_proxy.broker import (
    AccountConnection,
    AuthorizationRedirect,
    Broker,
    ConfirmationPrompt,
    ConnectedServer,
    DevicePrompt,
    PendingAuthorization,
    SignIn,
)
from mcp_auth_proxy.broker.connection_notes import ConnectionJournal
from mcp_auth_proxy.broker.ownership import MayOpen
from mcp_auth_proxy.broker.states import Word
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import McpAuthProxyError, StoreUnavailable
from mcp_auth_proxy.identity import NoAuthenticator
from mcp_auth_proxy.identity.sessions import BrowserSessions
from mcp_auth_proxy.models import AccessToken, Account, Flow, Principal
from mcp_auth_proxy.net.asgi import run_asgi
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.engine import Row
from mcp_auth_proxy.web.audit import PageAudit
from mcp_auth_proxy.web.failed_credentials import FailedCredentials
from mcp_auth_proxy.web.session import Visitors
from mcp_auth_proxy.web.sign_in import SignInPages
from mcp_auth_proxy.web.site import Site

REDIRECT = AuthorizationRedirect(
    authorization_url='https://as.example/authorize?state=S&x="><script>',
    cookie_name="mcp_auth_flow_x",
    cookie_value="tied",
    max_age=600,
)


SIGN_IN = SignIn(
    server="notes", upstream="https://notes.example", address="https://as.example", scopes=("read", "write")
)


Shown = AuthorizationRedirect | ConfirmationPrompt | DevicePrompt | ConnectedServer


class ScriptedVisits:
    """A broker that shows ``visit`` for each link, and answers each callback with ``outcome``.

    ``begins`` is what the button of an address leads to, and ``is_connected`` who has authorized every server.
    """

    def __init__(self) -> None:
        self.visit: Shown | McpAuthProxyError = REDIRECT
        self.outcome: Flow | McpAuthProxyError = pending_authorization().flow
        self.begins: AccessToken | PendingAuthorization | McpAuthProxyError | None = None
        self.is_connected: ConnectedServer | None = None
        self.opened: list[tuple[str, str]] = []
        self.confirmed: list[tuple[str, str]] = []
        self.callbacks: list[tuple[dict[str, list[str]], dict[str, str]]] = []
        self.servers: dict[str, ServerSettings] = {}
        self.journal = ConnectionJournal(clock=time.time)

    @property
    def stored_grants(self) -> Self:
        return self

    async def connections(self, principal: Principal) -> dict[str, list[AccountConnection]]:
        return {
            name: [AccountConnection(account=server.account(principal), word=Word.NEEDS_CONSENT)]
            for name, server in self.servers.items()
        }

    async def flow(self, flow_id: str) -> Flow | None:
        return None

    async def flow_of_state(self, state: str) -> Flow | None:
        return None

    async def confirm_link(self, server: str, flow_id: str, may_open: MayOpen) -> AuthorizationRedirect:
        self.confirmed.append((server, flow_id))
        return REDIRECT

    async def connected(self, account: Account) -> ConnectedServer | None:
        return self.is_connected

    async def begin(
        self, server: ServerSettings, account: Account, *, popup: bool = False
    ) -> AccessToken | PendingAuthorization | None:
        if isinstance(self.begins, McpAuthProxyError):
            raise self.begins
        return self.begins

    async def open_link(self, server: str, flow_id: str, may_open: MayOpen) -> Shown:
        self.opened.append((server, flow_id))
        if isinstance(self.visit, McpAuthProxyError):
            raise self.visit
        return self.visit

    async def complete(self, params: dict[str, list[str]], cookies: dict[str, str], may_open: MayOpen) -> Flow:
        self.callbacks.append((params, cookies))
        if isinstance(self.outcome, McpAuthProxyError):
            raise self.outcome
        return self.outcome


@dataclass
class ScriptedStore:
    """A store that can be written unless it has a ``problem``, and has nothing in it."""

    problem: McpAuthProxyError | None = None

    async def fetch_all(self, sql: str, params: object = None) -> list[Row]:
        return []

    async def fetch_one(self, sql: str, params: object = None) -> Row | None:
        return None

    @property
    def cipher(self) -> NoReturn:
        raise StoreUnavailable("Nothing is kept here.")

    async def check_writable(self) -> None:
        if self.problem is not None:
            raise self.problem


class NoAudit(PageAudit):
    """The audit trail of pages whose store is scripted."""

    def __init__(self) -> None:
        """Keep nothing."""

    async def record(self, request: Request, *event: object, **details: object) -> None:
        """Leave no event."""


@dataclass
class SiteSetup:
    """``client`` is at the site; it follows no redirects."""

    client: httpx2.AsyncClient
    broker: ScriptedVisits = field(default_factory=ScriptedVisits)
    store: ScriptedStore = field(default_factory=ScriptedStore)
    servers: dict[str, ServerSettings] = field(default_factory=dict)
    draining: bool = False
    audit: PageAudit = field(default_factory=NoAudit)


class Pages:
    """A RequestServer that leaves everything to the site."""

    def __init__(self, site: Site) -> None:
        self._app = site.build()

    def try_fast_path(self, request: ClientRequest) -> bool:
        return False

    async def serve(self, request: ClientRequest) -> None:
        await run_asgi(self._app, request)


def nobody_signs_in(public_url: str) -> Visitors:
    """Return the visitors of mode ``none``, without any session."""
    return Visitors(authenticator=NoAuthenticator(), sessions=cast(BrowserSessions, None), public_url=public_url)


@asynccontextmanager
async def site_setup(
    public_url: str = "http://127.0.0.1:8787", servers: Mapping[str, ServerSettings] | None = None
) -> AsyncIterator[SiteSetup]:
    async with httpx2.AsyncClient(trust_env=False, follow_redirects=False) as client:
        setup = SiteSetup(client, servers=dict(servers or {}))
        setup.broker.servers = setup.servers
        site = Site(
            broker=cast(Broker, setup.broker),
            servers=setup.servers,
            database=cast(Engine, setup.store),
            public_url=public_url,
            draining=lambda: setup.draining,
            start=setup.broker.begin,
            visitors=(visitors := nobody_signs_in(public_url)),
            audit=setup.audit,
            sign_in=lambda: SignInPages(
                visitors=visitors,
                check_key=None,
                provider=None,
                public_url=public_url,
                failed_credentials=FailedCredentials(time.time),
                audit=setup.audit,
            ),
        )
        async with listener(Pages(site)) as port:
            client.base_url = httpx2.URL(f"http://127.0.0.1:{port}")
            yield setup
