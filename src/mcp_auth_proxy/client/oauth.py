"""``OAuth``: add a bearer token to the requests to one MCP server, and obtain one when the server asks for it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from mcp_auth_proxy.client.session import NO_ADDRESS, Session, opened, server_of
from mcp_auth_proxy.client.storage import FileTokenStorage
from mcp_auth_proxy.client.tokens import TokenData, TokenStorage, as_mapping
from mcp_auth_proxy.config.settings import OAuthSettings, Secret
from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import AccessToken
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth import challenge as challenges
from mcp_auth_proxy.oauth import scopes

MARGIN = 30.0
"""A token is renewed when this many seconds of it are left, or a fifth of what was left when it was loaded."""


@dataclass(frozen=True, slots=True)
class OAuthClientProvider:
    """The authorization server of an MCP server that has no metadata, or wrong ones (RFC 8414 §2)."""

    id: str
    display_name: str
    metadata: Mapping[str, Any]


class BearerAuth(httpx2.Auth):
    """Send one bearer token with every request."""

    def __init__(self, token: str) -> None:
        self._token = token

    @property
    def token(self) -> str:
        """The access token."""
        return self._token

    def __repr__(self) -> str:
        return f"{type(self).__name__}(token='****')"

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
        """Add the token to a request."""
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


@dataclass(frozen=True, slots=True)
class _Held:
    """A token in use, which is renewed from ``renew_at`` on (Unix seconds)."""

    token: AccessToken = field(repr=False)
    renew_at: float


@dataclass(slots=True)
class _Tried:
    """What was tried for one request. Each is tried once, so the request is sent three times at most."""

    renewed: bool = False
    asked: bool = False


class OAuth(httpx2.Auth):
    """Authorize the requests of an ``httpx2.AsyncClient`` to one MCP server.

    The token is sent to that server only. If there is none, or the server refuses it, it is renewed, or the user
    authorizes in a browser, while the request waits. Tokens are kept in the sealed store of ``serve URL``, which
    several processes may use at once, or in ``token_storage``.
    """

    requires_response_body = False

    def __init__(
        self,
        server_url: str,
        token_storage: TokenStorage | None = None,
        scope: str | None = None,
        client_id: str | None = None,
        client_secret: str | None = None,
        callback_port: int | None = None,
        oauth_provider: OAuthClientProvider | None = None,
        client_metadata_url: str | None = None,
    ) -> None:
        """Prepare OAuth for a server; nothing is opened or sent yet.

        ``scope``: scopes to request, separated by spaces; None for those that the server asks for. ``client_id`` and
        ``client_secret``: a client that was registered by hand, with the redirect URI
        ``http://127.0.0.1:{callback_port}/oauth/callback``; None to register one. ``callback_port``: None for 8080, or
        any other if that is taken. ``oauth_provider`` replaces discovery. ``client_metadata_url``: the URL of a Client
        ID Metadata Document. Raises ValueError if a URL can't be used.
        """
        metadata = None if oauth_provider is None else dict(oauth_provider.metadata)
        self._settings = OAuthSettings(
            client_id=client_id,
            client_secret=None if client_secret is None else Secret(client_secret),
            scopes=None if scope is None else scopes.parse(scope),
            metadata=metadata,
            client_metadata_url=client_metadata_url,
        )
        self._server = server_of(server_url, self._settings)
        self._place = urls.parse(self._server.url)
        self._own_storage = token_storage if token_storage and not isinstance(token_storage, FileTokenStorage) else None
        self._files = token_storage if isinstance(token_storage, FileTokenStorage) else None
        self._port = callback_port
        self._held: _Held | None = None
        self._absent = False
        """Whether there was no token when the store was read last: it is read again after a challenge only."""
        self._challenge: list[bytes] = [b"Bearer"]
        """What the server asked for last (RFC 9110 §11.6.1)."""
        self._turn = asyncio.Lock()

    @property
    def server_url(self) -> str:
        """The URL of the MCP server."""
        return self._server.url

    # By hand

    async def initialize(self, client: httpx2.AsyncClient) -> BearerAuth | None:
        """Return the stored token, renewed if it has expired; None if the user has to authorize first.

        In that case ``client`` is used to ask the server what it wants. Raises AuthorizationError and StoreError, and
        httpx2.HTTPError if the server can't be asked.
        """
        async with self._turn:
            held = await self._stored()
        if held is not None:
            return _bearer(held.token)
        response = await client.get(self.server_url, headers={"accept": "text/event-stream"}, auth=None)
        self._note_challenge(response)
        return None

    async def authenticate(self) -> BearerAuth:
        """Let the user authorize in a browser, and return the token.

        Raises AuthorizationError, also if the user takes longer than ten minutes, and StoreError.
        """
        async with self._turn:
            return _bearer((await self._consent(401, self._challenge)).token)

    async def refresh_token(self) -> BearerAuth | None:
        """Renew the token now; return None if there is none, or none that can be renewed.

        Raises AuthorizationError and StoreError.
        """
        async with self._turn, self._open() as session:
            token = await session.broker.renew(session.account)
            return None if token is None else _bearer((await self._keep(session, token)).token)

    # As an httpx2.Auth

    async def async_auth_flow(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        """Send a request with a token; after a challenge send it again with a better one."""
        if not self._is_ours(request.url):
            yield request
            return
        used = await self._token()
        tried = _Tried()
        while True:
            if used is not None:
                request.headers["Authorization"] = used.header.decode("ascii")
            response = yield request
            if response.status_code not in (401, 403):
                return
            used = await self._after_challenge(response, used, tried)
            if used is None:
                return

    def sync_auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
        """Raise RuntimeError: a user may have to be waited for, which only an ``httpx2.AsyncClient`` can do."""
        raise RuntimeError("OAuth needs an httpx2.AsyncClient")

    def _is_ours(self, url: httpx2.URL) -> bool:
        """Return whether a URL is the server's, or below it. Tokens are sent nowhere else."""
        try:
            place = urls.parse(str(url))
        except ValueError:
            return False
        below = f"{self._place.path.rstrip('/')}/"
        return place.origin == self._place.origin and (
            (place.path or "/") == (self._place.path or "/") or place.path.startswith(below)
        )

    async def _token(self) -> AccessToken | None:
        """Return a token that is good for a while, None if there is none."""
        held = self._held
        if held is not None and time.time() < held.renew_at:
            return held.token
        if self._absent:
            return None
        async with self._turn:
            held = await self._stored()
        return None if held is None else held.token

    async def _stored(self) -> _Held | None:
        """Return the stored token, renewed if it is time."""
        held = self._held
        if held is not None and time.time() < held.renew_at:
            return held
        async with self._open() as session:
            await self._take_over(session)
            token = await session.broker.token(session.account)
            if token is None:
                self._held, self._absent = None, True
                return None
            if held is not None and held.token.header == token.header:
                token = await session.broker.renew(session.account) or token
            return await self._keep(session, token)

    async def _after_challenge(
        self, response: httpx2.Response, used: AccessToken | None, tried: _Tried
    ) -> AccessToken | None:
        """Return the token for another try; None if the response is not a challenge, and belongs to the caller."""
        challenge, status = self._note_challenge(response), response.status_code
        if not challenges.demands_authorization(status, challenges.bearer(challenge)):
            return None
        async with self._turn:
            held = self._held if used is not None else await self._stored()
            if held is not None and (used is None or held.token.header != used.header):
                return held.token
            if status == 401 and used is not None and not tried.renewed:
                tried.renewed = True
                if (token := await self._replaced(used)) is not None:
                    return token
            if tried.asked:
                raise AuthorizationError(f"{self.server_url} refuses the token that it has just asked for.")
            tried.asked = True
            return (await self._consent(status, challenge)).token

    async def _replaced(self, used: AccessToken) -> AccessToken | None:
        """Return the token that another process has stored since, or a renewed one; None if a user is needed."""
        async with self._open() as session:
            token = await session.broker.token(session.account)
            if token is not None and token.header == used.header:
                token = await session.broker.renew(session.account)
            return None if token is None else (await self._keep(session, token)).token

    def _note_challenge(self, response: httpx2.Response) -> list[bytes]:
        fields = [value.encode() for value in response.headers.get_list("www-authenticate")]
        self._challenge = fields or [b"Bearer"]
        return self._challenge

    async def _consent(self, status: int, challenge: list[bytes]) -> _Held:
        """Let the user authorize in a browser. Raises AuthorizationError and StoreError."""
        from mcp_auth_proxy.client import consent

        with consent.bound(self._port) as (sock, public_url):
            async with self._open(public_url) as session:
                token = await consent.ask(session, sock, public_url, status, challenge)
                return await self._keep(session, token)

    # What is kept

    def _open(self, public_url: str = NO_ADDRESS) -> contextlib.AbstractAsyncContextManager[Session]:
        store = None if self._files is None else self._files.store
        return opened(self.server_url, store, oauth=self._settings, public_url=public_url)

    async def _take_over(self, session: Session) -> None:
        """Seal the tokens of another storage, if there are none here yet."""
        if (self._files is None and self._own_storage is None) or await session.tokens() is not None:
            return
        if self._files is not None:
            given, client = self._files.plain_tokens(self.server_url), self._files.plain_client(self.server_url)
        else:
            assert self._own_storage is not None
            given, client = TokenData.read(await self._own_storage.load_tokens(self.server_url)), None
        if given is not None:
            await session.adopt(given, client)

    async def _keep(self, session: Session, token: AccessToken) -> _Held:
        stored = await session.tokens()
        if stored is not None and self._own_storage is not None:
            await self._own_storage.save_tokens(self.server_url, as_mapping(stored))
        left = float("inf") if stored is None or stored.expires_at is None else stored.expires_at - time.time()
        self._held, self._absent = _Held(token, time.time() + left - min(MARGIN, 0.2 * max(0.0, left))), False
        return self._held


def _bearer(token: AccessToken) -> BearerAuth:
    return BearerAuth(token.header.decode("ascii").removeprefix("Bearer "))
