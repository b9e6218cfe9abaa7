"""The broker for one operation on one server: opened, used, and closed again, so that a program keeps nothing open."""

import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from mcp_auth_proxy.broker import Broker
from mcp_auth_proxy.client.tokens import PlainClient, TokenData
from mcp_auth_proxy.config.load import single_store
from mcp_auth_proxy.config.servers import server_url, single_name
from mcp_auth_proxy.config.settings import KeySource, OAuthSettings, ServerSettings, StoreSettings
from mcp_auth_proxy.models import LOCAL, Account, ClientAuth, Flow, Registration, RegistrationKind, TokenSet
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth import scopes
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.grants import Grants

NO_ADDRESS = "http://127.0.0.1"
"""The public URL of a session in which no user is asked."""


class Session:
    """A broker and what it keeps for one server."""

    def __init__(self, broker: Broker, database: Engine, server: ServerSettings) -> None:
        self.broker = broker
        self.database = database
        self.server = server
        self.account = Account(LOCAL, server.name)
        self._grants = Grants(database)

    async def tokens(self) -> TokenData | None:
        """Return the stored tokens, None if there are none. Raises StoreError."""
        grant = await self._grants.current(self.account)
        if grant is None:
            return None
        return TokenData(
            access_token=grant.tokens.access_token,
            token_type=grant.tokens.token_type,
            expires_at=grant.tokens.expires_at,
            refresh_token=grant.tokens.refresh_token,
            scope=" ".join(grant.tokens.scopes) or None,
        )

    async def adopt(self, tokens: TokenData, client: PlainClient | None = None) -> None:
        """Store tokens that another program has obtained. Raises AuthorizationError and StoreError."""
        await self.broker.adopt(
            self.account,
            TokenSet(
                access_token=tokens.access_token,
                token_type=tokens.token_type,
                refresh_token=tokens.refresh_token,
                obtained_at=time.time(),
                expires_at=tokens.expires_at,
                scopes=scopes.parse(tokens.scope or ""),
            ),
            None if client is None else _registration(self.server, client),
        )

    async def forget(self) -> None:
        """Delete the stored tokens without revoking them. Raises StoreError."""
        await self._grants.delete(self.account)


@asynccontextmanager
async def opened(
    url: str,
    store: Path | None,
    *,
    oauth: OAuthSettings | None = None,
    public_url: str = NO_ADDRESS,
    announce: Callable[[Flow, str], None] = lambda flow, link: None,
) -> AsyncIterator[Session]:
    """Open the store and the broker for a server. ``store`` is its file; None for that of ``serve URL``.

    Raises ValueError for a URL that can't be used, and StoreError.
    """
    server = server_of(url, oauth or OAuthSettings())
    database = await open_store(_store_settings(store))
    try:
        fetcher = Fetcher()
        broker = Broker(
            servers={server.name: server},
            database=database,
            fetcher=fetcher,
            public_url=public_url,
            announce=announce,
            clock=time.time,
            opens_links=True,
        )
        try:
            yield Session(broker, database, server)
        finally:
            await broker.aclose()
            await fetcher.aclose()
    finally:
        await database.close()


def server_of(url: str, oauth: OAuthSettings) -> ServerSettings:
    """Return the server of a URL. Raises ValueError if the URL can't be used.

    Its name is made from the whole URL: two servers of one host have tokens of their own.
    """
    checked = server_url(url, allow_http=False)
    name = f"{single_name(checked)[:40]}-{hashlib.sha256(checked.encode()).hexdigest()[:16]}"
    return ServerSettings(name=name, url=checked, oauth=oauth)


def _store_settings(path: Path | None) -> StoreSettings:
    if path is None:
        return single_store()
    path = path.absolute()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return StoreSettings(
        path=path, keys=(KeySource(kind="file", name=str(path.with_suffix(".key"))),), default_key=True
    )


def _registration(server: ServerSettings, client: PlainClient) -> Registration:
    methods = {str(method): method for method in ClientAuth}
    default = ClientAuth.NONE if client.client_secret is None else ClientAuth.POST
    return Registration(
        server=server.name,
        issuer=urls.raw_origin(server.url),
        client_id=client.client_id,
        client_auth=methods.get(client.token_endpoint_auth_method or "", default),
        kind=RegistrationKind.DYNAMIC,
        client_secret=client.client_secret,
        redirect_uri=client.redirect_uri,
        created_at=time.time(),
    )
