"""The callback, up to the code."""

import asyncio
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import cast
from urllib.parse import parse_qs

from starlette.requests import Request

from fuzz.checks import check_error, check_fields
from fuzz.oauth_targets import FLOW, ISSUER, NOW
from mcp_auth_proxy.broker import Broker, cookie_name
from mcp_auth_proxy.broker.attempts import AuthorizationAttempts, digest
from mcp_auth_proxy.broker.forgotten_clients import ForgottenClients
from mcp_auth_proxy.broker.ownership import MayOpen
from mcp_auth_proxy.broker.sign_ins import SignIns
from mcp_auth_proxy.broker.visits import LinkVisits
from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.identity import NoAuthenticator
from mcp_auth_proxy.identity.sessions import BrowserSessions
from mcp_auth_proxy.models import Attempt, Flow
from mcp_auth_proxy.oauth import authorization_code
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.web import pages
from mcp_auth_proxy.web.callback import callback as handle_callback
from mcp_auth_proxy.web.popup import Popups
from mcp_auth_proxy.web.session import Visitors

STATE = "the-state"
COOKIE = "the-cookie"

ATTEMPT = Attempt(
    flow_id="flow",
    state_hash=digest(STATE),
    browser_hash=digest(COOKIE),
    code_verifier="v" * 43,
    created_at=NOW - 1,
    expires_at=NOW + 600,
)


class OneAttempt:
    """A store with the one attempt of the one flow."""

    async def find_attempt(self, state_hash: str) -> tuple[Flow, Attempt] | None:
        return (FLOW, ATTEMPT) if state_hash == ATTEMPT.state_hash else None

    async def take_attempt(self, state_hash: str, now: float) -> tuple[Flow, Attempt] | None:
        return await self.find_attempt(state_hash)


class CodeReader:
    """A broker that takes a callback up to the code, which it does not redeem."""

    def __init__(self) -> None:
        self.code = ""
        self.error: McpAuthProxyError | None = None
        self._attempts = AuthorizationAttempts(
            flows=cast(Flows, OneAttempt()),
            sign_ins=cast(SignIns, None),  # these three are for links; a callback uses none
            visits=LinkVisits(clock=lambda: NOW, first_only=False),
            clients=cast(ForgottenClients, None),
            clock=lambda: NOW,
        )

    async def flow_of_state(self, state: str) -> Flow | None:
        return FLOW if digest(state) == ATTEMPT.state_hash else None

    async def complete(
        self, params: Mapping[str, Sequence[str]], cookies: Mapping[str, str], may_open: MayOpen
    ) -> Flow:
        try:
            flow = (await self._attempts.accept(params, cookies, may_open)).flow
            self.code = authorization_code.check_response(params, flow=flow)
        except McpAuthProxyError as error:
            self.error = error
            raise
        return flow


class Tags(HTMLParser):
    """Collect the elements of a page and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(" ".join([tag, *(name for name, _ in attrs)]))


_TAGS = Tags(bytes(pages.message("title", "text", status=400, hint="hint").body).decode()).found
"""The elements of a page without anything from outside."""

_RUNNER = asyncio.Runner()
_MAX_PAGE = 16 * 1024


def callback(data: bytes) -> None:
    """Check what the callback makes of a query, the first line of the input, and of a Cookie field, the second."""
    query, _, cookie = data.partition(b"\n")
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/oauth/callback",
        "query_string": query,
        "headers": [(b"cookie", cookie)],
    }
    broker = CodeReader()
    visitors = Visitors(
        authenticator=NoAuthenticator(), sessions=cast(BrowserSessions, None), public_url="https://proxy.example"
    )
    popups = Popups(cast(Broker, broker), {})
    response = _RUNNER.run(handle_callback(Request(scope), cast(Broker, broker), visitors, popups))
    check_fields(response.raw_headers)
    page = bytes(response.body).decode()
    assert len(page) <= _MAX_PAGE, f"a page of {len(page)} characters"
    assert Tags(page).found <= _TAGS, "an element that is not in the template"
    assert STATE not in page, "a page with the state"
    if broker.error is not None:
        check_error(broker.error, [STATE])
        assert response.status_code in (400, 403), f"the status {response.status_code}"
        return
    given = parse_qs(query.decode("latin-1"), keep_blank_values=True)
    assert response.status_code == 303
    assert response.headers["location"] == f"/oauth/connected/{FLOW.key.account.server}", "an address from the query"
    assert given["state"] == [STATE] and given["iss"] == [ISSUER] and given["code"] == [broker.code]
    assert "error" not in given
    assert cookie_name(STATE).encode() in cookie
    assert broker.code.isascii() and broker.code.isprintable() and len(broker.code) <= authorization_code.MAX_CODE
