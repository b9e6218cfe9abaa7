"""``/oauth/start``: an authorization by URL alone, in a popup.

A GET can be sent by any page, with the session of whoever is signed in. So it only checks and shows what is asked for;
a form of our own page makes the server and begins the flow (T70). Only our own pages, and programs with a key, need no
form: no other page can send their requests.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from mcp_auth_proxy.broker.requested_flows import FlowState, allowed_return_origin
from mcp_auth_proxy.config import values
from mcp_auth_proxy.config.settings import AdminSettings, ServerSettings
from mcp_auth_proxy.errors import CallerRefused, ConfigurationError, McpAuthProxyError, SignInNeeded, StoreError
from mcp_auth_proxy.models import DEFAULT_ACCOUNT, Caller
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.web.api import audit, flows
from mcp_auth_proxy.web.api.application import PREFIX, Api, perform
from mcp_auth_proxy.web.api.credentials import addresses, caller_of
from mcp_auth_proxy.web.api.models import Fault
from mcp_auth_proxy.web.api.operations import Call, is_admin
from mcp_auth_proxy.web.api.problems import Problem, invalid, problem_of
from mcp_auth_proxy.web.api.reach import may_use_api
from mcp_auth_proxy.web.connect import REDIRECTED, is_other_loopback_name
from mcp_auth_proxy.web.cookies import read_cookies
from mcp_auth_proxy.web.forms import read_form
from mcp_auth_proxy.web.pages import ScopeList, form_headers, message, page, redirect
from mcp_auth_proxy.web.paths import path_of, sign_in_path
from mcp_auth_proxy.web.popup import CONFIRM, keep_opener, told
from mcp_auth_proxy.web.session import Visitors

COOKIE_PREFIX = "mcp_auth_start_"
MAX_AGE = 600
"""Seconds that the page can be used."""

NO_SESSION = (
    "The callers of this proxy are not identified, so this needs a session of its own: run `mcp-auth-proxy dashboard` "
    "on its machine, open the link that it prints in this browser, and try again."
)
FORGED = "This was not sent by our page in this browser, or the browser keeps no cookies. Open the page again."

_COOKIE_VALUE = re.compile(r"[A-Za-z0-9_-]{43}")
_ACCOUNT = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_CREDENTIALS = ("authorization", "x-api-key")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a URL asks for, checked."""

    url: str
    scopes: tuple[str, ...]
    account: str
    return_origin: str

    @property
    def body(self) -> flows.NewFlow:
        """What to ask the API for."""
        return flows.NewFlow(account=self.account, scopes=list(self.scopes) or None, return_origin=self.return_origin)


class StartPage:
    """The page, and what its form begins."""

    def __init__(self, api: Api, visitors: Visitors, public_url: str) -> None:
        self._api = api
        self._visitors = visitors
        self._public_url = public_url

    async def __call__(self, request: Request) -> Response:
        """Answer a GET with the page or, for those who need none, and for the form's POST, with the flow's link."""
        if is_other_loopback_name(request, self._public_url):
            query = urlencode([*request.query_params.multi_items(), (REDIRECTED, "1")])
            return keep_opener(redirect(f"{self._public_url}{request.url.path}?{query}", "Continue"))
        try:
            return keep_opener(await self._answer(request))
        except SignInNeeded as needed:
            if _is_program(request):
                return problem_of(needed).response(audit.request_id_of(request.headers.raw))
            return keep_opener(redirect(sign_in_path(path_of(request)), "Sign in first"))
        except (Problem, CallerRefused) as error:
            problem = error if isinstance(error, Problem) else problem_of(error)
            if _has_credential(request) or _is_program(request):
                return problem.response(audit.request_id_of(request.headers.raw))
            response = keep_opener(message("This can't be authorized", problem.detail, status=problem.status))
            response.headers.update(problem.headers)
            return response

    async def _answer(self, request: Request) -> Response:
        explicit = _has_credential(request)
        # First: a form may take a while, in which its sender can be disabled (T74).
        forged = request.method == "POST" and not explicit and not await self._is_ours(request)
        caller = await self._caller(request, explicit=explicit)
        admin = self._api.context.settings().admin
        _check_access(caller, admin)
        wanted = self._read(request, admin)
        if request.method == "POST":
            if forged:
                raise Problem(403, "forbidden", FORGED)
            return await self._begin(request, caller, wanted)
        ours = request.headers.get("sec-fetch-site") == "same-origin" and CONFIRM not in request.query_params
        # Browsers add a password that they know (Basic) by themselves, whichever page sends them here.
        by_program = explicit and request.headers.get("sec-fetch-site") not in ("cross-site", "same-site")
        if by_program or ours:
            return await self._begin(request, caller, wanted)
        return self._page(request, wanted)

    async def _caller(self, request: Request, *, explicit: bool) -> Caller:
        """Return who asks. Raises Problem, CallerRefused (also SignInNeeded) and StoreError."""
        if explicit:
            return await caller_of(request, self._api.context)
        if not self._visitors.anonymous:
            return await self._visitors.require(request)
        caller = await self._visitors.session_caller(request)
        if caller is None:
            raise Problem(401, "unauthenticated", NO_SESSION)
        return caller

    def _read(self, request: Request, admin: AdminSettings) -> Wanted:
        """Return what the URL asks for; nothing is looked up. Raises Problem (422)."""
        given = request.query_params
        url = given.get("mcp_server_url", "")
        scopes = tuple(dict.fromkeys(scope.strip() for scope in given.get("scopes", "").split(",") if scope.strip()))
        account = given.get("account") or DEFAULT_ACCOUNT
        faults: list[Fault] = []
        with _noted(faults, "mcp_server_url"):
            self._api.context.made.check_url(url)
        with _noted(faults, "scopes"):
            if len(scopes) > flows.MAX_SCOPES:
                raise ValueError(f"must be at most {flows.MAX_SCOPES}")
            for scope in scopes:
                values.scope(scope)
        with _noted(faults, "account"):
            if _ACCOUNT.fullmatch(account) is None:
                raise ValueError("must be 1 to 32 of a-z, 0-9 and -, not beginning with -")
        origin = given.get("return_origin") or None
        with _noted(faults, "return_origin"):
            origin = allowed_return_origin(
                None if origin is None else values.allowed_origin(origin),
                popup_origins=admin.popup_origins,
                public_url=self._public_url,
            )
        if faults or origin is None:
            raise invalid(faults)
        return Wanted(url, scopes, account, origin)

    async def _begin(self, request: Request, caller: Caller, wanted: Wanted) -> Response:
        """Make the server and its flow, and lead to its link. Raises Problem.

        If there is nothing to lead to, the opener of a browser's popup hears that.
        """
        if seconds := self._api.limits.flows.take(caller.principal.id):
            raise Problem(429, "too-many-requests", "Too many authorizations were started.", headers=_wait(seconds))
        server: ServerSettings | None = None
        try:
            server = await self._adhoc(caller, wanted)
            return redirect(await self._link(request, caller, wanted, server), "Continue")
        except Problem as problem:
            if _has_credential(request) or _is_program(request):
                raise
            return _nothing_begun(problem, wanted, server)

    async def _adhoc(self, caller: Caller, wanted: Wanted) -> ServerSettings:
        """Return the server, which is made if it is new. Raises Problem, CallerRefused and StoreError."""
        try:
            return await self._api.context.made.adhoc(caller.principal, wanted.url)
        except (StoreError, CallerRefused):
            raise
        except McpAuthProxyError as error:
            raise problem_of(error) from None

    async def _link(self, request: Request, caller: Caller, wanted: Wanted, server: ServerSettings) -> str:
        """Begin a flow, and return its link. Raises Problem, CallerRefused and StoreError."""
        context = self._api.context
        try:
            call: Call[flows.NewFlow, None] = Call(
                api=context,
                caller=caller,
                body=wanted.body,
                query=None,
                path={"id": server.server_id},
                raw_query=b"",
                if_match=None,
                address=addresses(request)[0],
                request_id=audit.request_id_of(request.headers.raw),
                operation=flows.CREATE,
            )
            flow = (await perform(call)).content
        except (StoreError, CallerRefused):
            raise
        except McpAuthProxyError as error:
            raise problem_of(error) from None
        assert isinstance(flow, flows.FlowView)
        assert flow.connect_url is not None
        return flow.connect_url

    def _page(self, request: Request, wanted: Wanted) -> Response:
        name, query = _cookie_name(request), _asked(request)
        cookie = read_cookies(request).get(name, "")
        if not _COOKIE_VALUE.fullmatch(cookie):
            cookie = secrets.token_urlsafe(32)
        origin = urls.parse(wanted.url).origin
        secure = self._public_url.startswith("https://")
        response = page(
            "start.html",
            host=origin.serialized,
            url=wanted.url,
            scopes=ScopeList.of(wanted.scopes),
            account=wanted.account,
            origin=wanted.return_origin,
            token=_token(query, cookie),
            headers=form_headers(http=not secure or origin.scheme == "http"),
        )
        response.set_cookie(
            name, cookie, max_age=MAX_AGE, path=request.url.path, secure=secure, httponly=True, samesite="strict"
        )
        return response

    async def _is_ours(self, request: Request) -> bool:
        """Return whether the form is that of our page for this query, in the same browser."""
        cookie = read_cookies(request).get(_cookie_name(request), "")
        token = (await read_form(request)).get("token", "")
        if not _COOKIE_VALUE.fullmatch(cookie):
            return False
        return hmac.compare_digest(token.encode("utf-8", "replace"), _token(_asked(request), cookie).encode())


def _nothing_begun(problem: Problem, wanted: Wanted, server: ServerSettings | None) -> Response:
    """Return the last page of an authorization that did not begin, also because the server asks for none."""
    needless = problem.kind == flows.NO_AUTHORIZATION
    title = "No authorization is needed" if needless else "This can't be authorized"
    popup = told(
        wanted.return_origin,
        FlowState.CONNECTED if needless else FlowState.FAILED,
        flow=None,
        server=server.server_id if server is not None else None,
    )
    response = message(title, problem.detail, status=200 if needless else problem.status, popup=popup)
    response.headers.update(problem.headers)
    return response


@contextmanager
def _noted(faults: list[Fault], name: str) -> Iterator[None]:
    """Add what is wrong with a parameter of the query to a list, in place of an error."""
    try:
        yield
    except (ConfigurationError, ValueError) as error:
        text = error.errors[0].problem if isinstance(error, ConfigurationError) else str(error)
        faults.append(Fault(loc=["query", name], msg=text, type="value_error"))


def _has_credential(request: Request) -> bool:
    """Return whether a request brings a key or a token, other than a browser with its session."""
    return any(name in request.headers for name in _CREDENTIALS)


def _is_program(request: Request) -> bool:
    """Return whether a request is for the API, and not of a browser that shows a page."""
    return request.url.path.startswith(PREFIX) and "text/html" not in request.headers.get("accept", "")


def _check_access(caller: Caller, admin: AdminSettings) -> None:
    """Raise Problem (403) if a caller may not make ad-hoc servers."""
    if admin.adhoc == "off" or (admin.adhoc == "admin" and not is_admin(caller)):
        who = "Nobody may" if admin.adhoc == "off" else "Only admins may"
        raise Problem(403, "forbidden", f"{who} connect servers by their URL here (the key admin.adhoc).")
    if not may_use_api(caller):
        raise Problem(403, "forbidden", "This credential is not for the API: it needs the scope self or admin.")


def _asked(request: Request) -> str:
    return str(request.scope["query_string"].decode("latin-1"))


def _cookie_name(request: Request) -> str:
    return COOKIE_PREFIX + hashlib.sha256(_asked(request).encode()).hexdigest()[:12]


def _token(query: str, cookie: str) -> str:
    return hmac.digest(cookie.encode(), query.encode(), "sha256").hex()


def _wait(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, int(seconds) + 1))}
