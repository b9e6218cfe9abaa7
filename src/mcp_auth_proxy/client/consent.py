"""Listen on loopback while a user authorizes in a browser."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mcp_auth_proxy.broker import ChallengeHistory, PendingAuthorization
from mcp_auth_proxy.client.session import Session
from mcp_auth_proxy.errors import AddressInUse, AuthorizationError
from mcp_auth_proxy.identity import NoAuthenticator
from mcp_auth_proxy.identity.sessions import BrowserSessions
from mcp_auth_proxy.models import AccessToken, Principal
from mcp_auth_proxy.store.sessions import Sessions
from mcp_auth_proxy.web import browser
from mcp_auth_proxy.web.callback import callback
from mcp_auth_proxy.web.connect import connect, connected_page
from mcp_auth_proxy.web.pages import message
from mcp_auth_proxy.web.popup import Popups
from mcp_auth_proxy.web.session import Visitors

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8080
LAST_PAGE = 2.0
"""Seconds in which the browser fetches the last page."""


@contextmanager
def bound(port: int | None) -> Iterator[tuple[socket.socket, str]]:
    """Bind a socket on loopback until the block ends; the result has the public URL too.

    None stands for DEFAULT_PORT, or any other if that is taken. Raises AddressInUse if the port is taken.
    """
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port or DEFAULT_PORT))
        except OSError:
            if port is not None:
                raise AddressInUse(
                    f"127.0.0.1:{port} is taken by another program. Choose another callback_port."
                ) from None
            sock.bind(("127.0.0.1", 0))
        yield sock, f"http://127.0.0.1:{sock.getsockname()[1]}"


async def ask(
    session: Session, sock: socket.socket, public_url: str, status: int, challenge: Sequence[bytes]
) -> AccessToken:
    """Open the link in a browser, and return the token once the user has authorized.

    ``status`` and ``challenge`` (the WWW-Authenticate fields) are the response of the server. Raises
    AuthorizationError and StoreError.
    """
    broker = session.broker
    await broker.start()
    async with _pages(session, sock, public_url) as shown:
        outcome = await _begin(session, status, challenge)
        if not isinstance(outcome, PendingAuthorization):
            if outcome is None:
                raise AuthorizationError(f"{session.server.url} asks for no authorization.")
            return outcome
        logger.warning("%s needs your authorization, open this link: %s", session.server.url, outcome.link)
        if browser.should_open("auto", loopback=True, environ=os.environ):
            broker.link_opened(outcome.flow)
            browser.open_link(outcome.link)
        token = await outcome.wait(max(0.0, outcome.flow.expires_at - time.time()))
        if token is None:
            raise AuthorizationError(f"Nobody has authorized {session.server.url} in time.")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(shown.wait(), LAST_PAGE)
        return token


async def _begin(
    session: Session, status: int, challenge: Sequence[bytes]
) -> AccessToken | PendingAuthorization | None:
    """Begin an authorization; for 403, one with the scopes that the token has and those that it lacks."""
    broker, account = session.broker, session.account
    if status != 403:
        return await broker.begin(account, status=status, challenge=challenge)
    used = await broker.token(account)
    return await broker.challenged(
        account, sent_to=session.server, status=status, challenge=challenge, used=used, history=ChallengeHistory()
    )


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the program."""
        yield


@asynccontextmanager
async def _pages(session: Session, sock: socket.socket, public_url: str) -> AsyncIterator[asyncio.Event]:
    """Serve the pages of the flow until the block ends. The event is set once the last one is shown."""
    shown = asyncio.Event()
    app = _site(session, public_url, shown)
    server = _Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", server_header=False))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield shown
    finally:
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)


def _site(session: Session, public_url: str, shown: asyncio.Event) -> Starlette:
    visitors = _visitors(session, public_url)
    popups = Popups(session.broker, {session.server.name: session.server})

    async def link(request: Request) -> Response:
        return await connect(
            request,
            session.broker,
            visitors,
            popups,
            public_url=public_url,
            command_name=session.server.command_name,
            warn=logger.warning,
        )

    async def back(request: Request) -> Response:
        return await callback(request, session.broker, visitors, popups)

    async def last(request: Request) -> Response:
        connected = await session.broker.connected(session.account)
        shown.set()
        if connected is None:
            return message("Not connected", "Go back to the program that has opened this page.", status=404)
        return connected_page(connected)

    return Starlette(
        routes=[
            Route("/connect/{server}", link, methods=["GET", "POST"]),
            Route("/oauth/callback", back),
            Route("/oauth/connected/{server}", last),
        ],
        # A page of another site must not reach this one under a name of its own (DNS rebinding).
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1"])],
    )


def _visitors(session: Session, public_url: str) -> Visitors:
    """Return visitors who need no session: whoever has the link may authorize."""

    async def nobody(principal_id: str) -> Principal | None:
        return None

    async def never(key_id: str) -> bool:
        return False

    sessions = BrowserSessions(
        sessions=Sessions(session.database), find_principal=nobody, key_holds=never, clock=time.time
    )
    return Visitors(authenticator=NoAuthenticator(), sessions=sessions, public_url=public_url)
