"""Who sits at the browser: the cookie of its session, and the callers of pages."""

from starlette.requests import Request
from starlette.responses import Response

from mcp_auth_proxy.broker import ownership
from mcp_auth_proxy.broker.ownership import MayOpen
from mcp_auth_proxy.errors import SignInNeeded
from mcp_auth_proxy.identity import Authenticator
from mcp_auth_proxy.identity.sessions import BrowserSessions, SessionCookie
from mcp_auth_proxy.models import LOCAL_CALLER, Caller
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.web.cookies import read_cookies

COOKIE = "mcp_auth_session"

_EXPLICIT = frozenset({b"authorization", b"proxy-authorization", b"x-api-key", b"cookie"})
"""Credentials that programs send. Pages look at sessions, and at what a web server in front adds to each request."""


class Visitors:
    """Tell who opens a page, and give browsers their sessions."""

    def __init__(self, *, authenticator: Authenticator, sessions: BrowserSessions, public_url: str) -> None:
        self.authenticator = authenticator
        self.sessions = sessions
        self._secure = public_url.startswith("https://")
        # Cookies are sent to every port of a host: two proxies on one machine must not overwrite each other's.
        origin = urls.parse_origin(public_url)
        assert origin is not None
        self._cookie = f"__Host-{COOKIE}" if self._secure else f"{COOKIE}_{origin.port}"

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
        if self._is_named(request):
            fields = [(name, value) for name, value in request.headers.raw if name not in _EXPLICIT]
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
        """Return who has the session of this browser; None if it has none. Raises StoreError.

        What a web server in front says counts more than a session: then there is none. Whoever lets a session change
        something must make sure that no page of another site sends the request (``Origin``).
        """
        value = "" if self._is_named(request) else self.cookie(request)
        return await self.sessions.caller(value) if value else None

    def _is_named(self, request: Request) -> bool:
        """Return whether a request has a field in which a web server in front names the caller."""
        trusted = self.authenticator.credential_fields - _EXPLICIT
        return any(name in trusted for name, _ in request.headers.raw)

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


def client(request: Request) -> str:
    """Return whose request it is (see ``ClientRequest.client``)."""
    return request.client.host if request.client is not None else ""


def peer(request: Request) -> str:
    """Return the address that a request's connection comes from (see ``ClientRequest.client``)."""
    address, _, through = client(request).partition(" through ")
    return through or address
