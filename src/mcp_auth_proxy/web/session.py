"""Who sits at the browser: the cookie of its session, and the callers of pages."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mcp_auth_proxy.broker import ownership
from mcp_auth_proxy.broker.ownership import MayOpen
from mcp_auth_proxy.errors import SignInNeeded
from mcp_auth_proxy.identity import Authenticator
from mcp_auth_proxy.identity.sessions import BrowserSessions, SessionCookie
from mcp_auth_proxy.models import LOCAL_CALLER, Caller
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.web.cookies import read_cookies

COOKIE = "mcp_auth_session"

_KEY = "mcp_auth_proxy.visitors"
_EXPLICIT = frozenset({b"authorization", b"proxy-authorization", b"x-api-key", b"cookie"})
"""Credentials that programs send. Pages look at sessions, and at what a web server in front adds to each request."""


class Visitors:
    """Tell who opens a page, and give browsers their sessions."""

    def __init__(self, *, authenticator: Authenticator, sessions: BrowserSessions, public_url: str) -> None:
        self.authenticator = authenticator
        self.sessions = sessions
        self._secure = public_url.startswith("https://")
        # Cookies are sent to every port of a host: two proxies on one machine must not overwrite each other's.
        port = urls.parse(public_url).origin.port
        self._cookie = f"__Host-{COOKIE}" if self._secure else f"{COOKIE}_{port}"

    @property
    def anonymous(self) -> bool:
        """Whether callers are not identified: then pages need no session."""
        return self.authenticator.anonymous

    async def caller(self, request: Request) -> Caller | None:
        """Return who opens a page; None if they have not signed in.

        Raises CallerRefused if a web server in front names somebody who may not call, and StoreError.
        """
        if self.anonymous:
            return LOCAL_CALLER
        fields = [(name, value) for name, value in request.headers.raw if name not in _EXPLICIT]
        trusted = self.authenticator.credential_fields - _EXPLICIT
        if any(name in trusted for name, _ in fields):
            return await self.authenticator.identify(fields, peer(request))
        return await self.session_caller(request)

    async def require(self, request: Request) -> Caller:
        """Return who opens a page. Raises SignInNeeded if they have not signed in, else as ``caller`` does."""
        caller = await self.caller(request)
        if caller is None:
            raise SignInNeeded
        return caller

    def may_open(self, caller: Caller | None) -> MayOpen:
        """Return which accounts the user of a browser may authorize. ``caller``: None if they have not signed in."""
        if self.anonymous:
            return ownership.anyone
        return ownership.nobody if caller is None else ownership.owner(caller.principal)

    def name(self, caller: Caller | None) -> str | None:
        """Return the name of a browser's user for a page: empty for nobody, None if callers are not identified."""
        if self.anonymous:
            return None
        return "" if caller is None else caller.principal.name

    async def session_caller(self, request: Request) -> Caller | None:
        """Return who has the session of this browser; None if it has none. Raises StoreError."""
        value = self.cookie(request)
        return await self.sessions.caller(value) if value else None

    def cookie(self, request: Request) -> str:
        """Return the secret of the browser's session, which may not exist; empty if it sends none."""
        return read_cookies(request).get(self._cookie, "")

    def give(self, response: Response, cookie: SessionCookie) -> None:
        """Let a response give the browser its session.

        The cookie is for every path, since pages, callback and API need it; requests to MCP servers lose all cookies
        before they are forwarded. It is ``Lax``: the callback is a navigation from another site.
        """
        response.set_cookie(
            self._cookie,
            cookie.value,
            max_age=cookie.max_age,
            path="/",
            secure=self._secure,
            httponly=True,
            samesite="lax",
        )

    def take_back(self, response: Response) -> None:
        """Let a response remove the cookie."""
        response.delete_cookie(self._cookie, path="/", secure=self._secure, httponly=True, samesite="lax")


class WithVisitors:
    """ASGI middleware: ``session_caller`` works in the application and in those that are mounted in it."""

    def __init__(self, app: ASGIApp, visitors: Visitors) -> None:
        self._app = app
        self._visitors = visitors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        scope[_KEY] = self._visitors
        await self._app(scope, receive, send)


async def session_caller(request: Request) -> Caller | None:
    """Return who has the session of the browser that sends a request; None if it has none. Raises StoreError.

    Whoever asks must have made sure that no other site's page sends it (``Origin``).
    """
    visitors: Visitors = request.scope[_KEY]
    return await visitors.session_caller(request)


def peer(request: Request) -> str:
    """Return the address that a request's connection comes from (see ``ClientRequest.client``)."""
    client, _, through = (request.client.host if request.client is not None else "").partition(" through ")
    return through or client
