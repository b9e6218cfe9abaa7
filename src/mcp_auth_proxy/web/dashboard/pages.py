"""The handlers of the dashboard: the page, the stream of its changes, and what its buttons do."""

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from mcp_auth_proxy import __version__
from mcp_auth_proxy.broker import Broker, ownership
from mcp_auth_proxy.broker.connection_records import CREDENTIAL
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import CallerRefused, SignInNeeded, StoreError
from mcp_auth_proxy.models import DEFAULT_PROJECT, LOCAL, Account, Caller, Scope, shared_principal
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.events import Event, Events
from mcp_auth_proxy.web.audit import PageAudit
from mcp_auth_proxy.web.cookies import read_cookies
from mcp_auth_proxy.web.dashboard.stream import COMMENT_TICKS, EventStream, Streams, tick
from mcp_auth_proxy.web.dashboard.view import SHOWN_EVENTS, FindPrincipal, Rights, Snapshot, card, event_lines
from mcp_auth_proxy.web.dashboard_mount import STREAM
from mcp_auth_proxy.web.forms import read_form
from mcp_auth_proxy.web.pages import form_headers, message, page, redirect, render, with_files
from mcp_auth_proxy.web.session import Visitors

logger = logging.getLogger(__name__)

COOKIE = "mcp_auth_dashboard"

FORGED = "This was not sent by our page in this browser, or the browser keeps no cookies. Open the page again."
NO_RIGHT = (
    "This session may only look at connections. Run `mcp-auth-proxy dashboard` on the machine of the proxy, open the "
    "link that it prints in this browser, and try again."
)

_SECRET = re.compile(r"[A-Za-z0-9_-]{43}")
_FRESH = 0.4
"""Seconds that one look serves all streams of a principal."""


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who looks at the page. ``may_change``: whether they may do more than look and connect."""

    caller: Caller
    may_change: bool


class Dashboard:
    """The page at ``/``. Belongs to one event loop."""

    def __init__(
        self,
        *,
        broker: Broker,
        servers: Mapping[str, ServerSettings],
        database: Engine,
        visitors: Visitors,
        find_principal: FindPrincipal,
        public_url: str,
        on_loopback: bool,
        draining: Callable[[], bool],
        audit: PageAudit,
    ) -> None:
        """``on_loopback``: whether only this machine reaches the proxy; then nobody who looks has to sign in in mode
        ``none``."""
        self._broker = broker
        self._servers = servers
        self._events = Events(database)
        self._visitors = visitors
        self._find_principal = find_principal
        self._public_url = public_url
        self._on_loopback = on_loopback
        self._draining = draining
        self._audit = audit
        self._streams = Streams()
        self._looks: dict[Viewer, tuple[float, Snapshot]] = {}
        self._audited: dict[str, tuple[int, list[Event]]] = {}
        """The last events by what they were asked for, and the id of the newest event then."""

    # The page

    async def show(self, request: Request) -> Response:
        """Return the page. Raises SignInNeeded, CallerRefused and StoreError."""
        viewer = await self._viewer(request)
        secret, new = self._form_secret(request), ""
        if viewer.may_change and not secret:
            # A web server in front names the caller, who has no session.
            secret = new = secrets.token_urlsafe(32)
        name = self._visitors.name(viewer.caller)
        policy = form_headers(http=self._leads_to_http())["content-security-policy"]
        headers = {
            "content-security-policy": with_files(policy),
            # A popup may keep its tie to this page: how it ends is told to this origin alone.
            "cross-origin-opener-policy": "same-origin-allow-popups",
        }
        response = page(
            "dashboard.html",
            snapshot=await self._snapshot(viewer),
            token=_token(secret),
            viewer=viewer,
            anonymous=self._visitors.anonymous,
            name=name,
            has_session=bool(self._visitors.cookie(request)) and bool(name or viewer.may_change),
            stream=STREAM,
            version=__version__,
            headers=headers,
        )
        if new:
            secure = self._public_url.startswith("https://")
            response.set_cookie(COOKIE, new, path="/", secure=secure, httponly=True, samesite="strict")
        return response

    def _form_secret(self, request: Request) -> str:
        """Return what only this browser has: its session, or else the cookie of the page; empty if it has neither."""
        secret = self._visitors.cookie(request) or read_cookies(request).get(COOKIE, "")
        return secret if _SECRET.fullmatch(secret) else ""

    def _leads_to_http(self) -> bool:
        urls = (self._public_url, *(server.url for server in self._servers.values()))
        return not all(url.startswith("https://") for url in urls)

    async def _viewer(self, request: Request) -> Viewer:
        """Return who looks. Raises SignInNeeded, CallerRefused and StoreError."""
        if not self._visitors.anonymous:
            caller = await self._visitors.require(request)
            return Viewer(caller, caller.is_admin or Scope.SELF in caller.scopes)
        session = await self._visitors.session_caller(request)
        if session is not None:
            return Viewer(session, may_change=True)
        if not self._on_loopback:
            raise SignInNeeded
        caller = await self._visitors.require(request)
        return Viewer(caller, may_change=False)

    async def _look(self, viewer: Viewer) -> Snapshot:
        """Return what the page shows now, or did a moment ago. Raises StoreError."""
        now = time.monotonic()
        found = self._looks.get(viewer)
        if found is not None and now - found[0] < _FRESH:
            return found[1]
        snapshot = await self._snapshot(viewer)
        self._looks = {key: look for key, look in self._looks.items() if now - look[0] < _FRESH}
        self._looks[viewer] = now, snapshot
        return snapshot

    async def _snapshot(self, viewer: Viewer) -> Snapshot:
        caller, cards = viewer.caller, []
        may_open, own = self._visitors.may_open(caller), set()
        for name, connections in (await self._broker.stored_grants.connections(caller.principal)).items():
            server = self._servers.get(name)
            for connection in connections if server is not None else ():
                assert server is not None
                own.add(connection.account)
                may = may_open(connection.account)
                rights = Rights(connect=may, disconnect=may and _may_disconnect(viewer, connection.account))
                keys = not self._visitors.anonymous
                cards.append(card(server, connection, rights, public_url=self._public_url, keys=keys))
        happened = [
            event
            for event in self._broker.journal.events()
            if event.account in own or self._oversees(caller, event.account)
        ]
        # What this process has seen of grants has reasons in the journal; the trail has it without.
        began_at = self._broker.journal.began_at
        audited = [
            event for event in await self._audit_trail(caller) if event.credential != CREDENTIAL or event.at < began_at
        ]
        return Snapshot(tuple(cards), event_lines(audited, happened[:SHOWN_EVENTS], self._find_principal))

    def _oversees(self, caller: Caller, account: Account) -> bool:
        """Return whether an admin may know of the account of somebody else."""
        if not caller.is_admin:
            return False
        project = caller.principal.project_id
        if account.principal == LOCAL:
            return project == DEFAULT_PROJECT
        if account.principal == shared_principal(project):
            return True
        found = self._find_principal(account.principal)
        return found is not None and found.project_id == project

    async def _audit_trail(self, caller: Caller) -> list[Event]:
        """Return the last events that a caller may see: those of its project for admins, else its own."""
        principal = None if caller.is_admin else caller.principal.id
        project, newest = caller.principal.project_id, await self._events.newest()
        key = f"{project} {principal}"
        found = self._audited.get(key)
        if found is None or found[0] != newest:
            events, _ = await self._events.page(project, before=None, count=SHOWN_EVENTS, principal=principal)
            if len(self._audited) >= 100:
                self._audited.clear()
            self._audited[key] = found = newest, events
        return found[1]

    # The stream

    async def stream(self, request: Request) -> Response:
        """Return the changes of the page from now on, under the same conditions as the page."""
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return message("Not possible", "Only our own page can show this.", status=403)
        try:
            viewer = await self._viewer(request)
        except SignInNeeded:
            return message("Sign in first", "This is for those who have signed in.", status=401)
        principal = viewer.caller.principal.id
        if not self._streams.has_room(principal):
            response = message("Too many pages are open", "Close some of them.", status=503)
            response.headers["retry-after"] = "10"
            return response
        return EventStream(lambda gone: self._changes(request, viewer, gone), self._streams, principal)

    async def _changes(
        self, request: Request, viewer: Viewer, gone: "asyncio.Future[None]"
    ) -> AsyncGenerator[str, None]:
        token = _token(self._form_secret(request))
        sent: Snapshot | None = None
        silent = 0
        yield "retry: 2000\n\n"
        while True:
            try:
                now = await self._viewer(request)
                snapshot = await self._look(viewer)
            except (SignInNeeded, CallerRefused):
                now = None
            except StoreError:
                return
            if now != viewer:
                # The session has ended, or its user may do something else now.
                yield "event: over\ndata: {}\n\n"
                return
            silent += 1
            if snapshot != sent:
                yield f"event: change\ndata: {json.dumps(_change(sent, snapshot, token))}\n\n"
                sent, silent = snapshot, 0
            elif silent >= COMMENT_TICKS:
                yield ":\n\n"
                silent = 0
            if not await tick(gone) or self._draining():
                return

    # The buttons

    async def disconnect(self, request: Request, account: Account, *, forget_client: bool) -> Response:
        """Delete the grants of an account, revoke them, and go back to the page. Raises as ``show`` does.

        ``account`` is one that its user may authorize.
        """
        # First: a form may take a while, in which the session can end.
        form = await read_form(request)
        viewer = await self._viewer(request)
        action = "connections.forget" if forget_client else "connections.delete"
        server = self._servers.get(account.server)
        if not _may_disconnect(viewer, account):
            await self._audit.record(request, viewer.caller, action, "forbidden", server=server)
            return message("You can't disconnect this server", NO_RIGHT, status=403)
        secret, given = self._form_secret(request), form.get("token", "").encode("utf-8", "replace")
        if not secret or not hmac.compare_digest(given, _token(secret).encode()):
            return message("You can't disconnect this server", FORGED, status=403)
        await self._broker.disconnect(account, forget_client=forget_client)
        await self._audit.record(request, viewer.caller, action, server=server)
        return redirect("/", f"{account.server} is disconnected")


def _may_disconnect(viewer: Viewer, account: Account) -> bool:
    """Return whether somebody may disconnect an account that they may authorize."""
    return viewer.caller.is_admin if ownership.is_shared(account) else viewer.may_change


def _token(secret: str) -> str:
    """Return the token of the forms: only a page of the browser that has the secret knows it."""
    return hmac.digest(secret.encode("ascii"), b"dashboard", "sha256").hex() if secret else ""


def _change(before: Snapshot | None, now: Snapshot, token: str) -> dict[str, object]:
    """Return all cards, those that have changed with their HTML, and the events if they have changed."""
    known = {} if before is None else {each.name: each for each in before.cards}
    cards = [
        {
            "id": each.id,
            "name": each.name,
            "word": each.word,
            "digest": each.digest,
            "html": None if known.get(each.name) == each else render("dashboard_card.html", card=each, token=token),
        }
        for each in now.cards
    ]
    same = before is not None and before.events == now.events
    events = None if same else render("dashboard_events.html", events=now.events)
    return {"cards": cards, "events": events}
