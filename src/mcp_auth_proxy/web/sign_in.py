"""``/sign-in``: a browser's user signs in with an API key or at an identity provider, or opens a single-use link.

No sign-in can be forced on a browser by another site (T54): forms come from our own pages (``web.guard``), the way back
from an identity provider is bound to the browser by a cookie, and a single-use link that another site leads to, or that
the browser only prefetches, is not used before a button is pressed.
"""

import logging
from collections.abc import Awaitable, Callable
from math import ceil
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.errors import AuthorizationError, CallbackRefused, CallerRefused, excerpt
from mcp_auth_proxy.identity.sessions import SessionCookie
from mcp_auth_proxy.models import Caller
from mcp_auth_proxy.observability.peer_log import RefusalLog
from mcp_auth_proxy.store.events import OK
from mcp_auth_proxy.web.attempt import SignInAttempt
from mcp_auth_proxy.web.audit import SIGN_IN, SIGN_OUT, PageAudit
from mcp_auth_proxy.web.connect import is_other_loopback_name, to_public_url
from mcp_auth_proxy.web.cookies import read_cookies
from mcp_auth_proxy.web.failed_credentials import TOO_MANY, FailedCredentials
from mcp_auth_proxy.web.forms import read_form
from mcp_auth_proxy.web.pages import form_headers, message, page, redirect
from mcp_auth_proxy.web.paths import local_path, sign_in_path
from mcp_auth_proxy.web.session import Visitors, client, peer

if TYPE_CHECKING:
    from mcp_auth_proxy.identity.openid import OpenIdProvider

logger = logging.getLogger(__name__)

NO_SIGN_IN = (
    "The callers of this proxy are not identified, so there is nobody to sign in as. Run `mcp-auth-proxy dashboard` on "
    "its machine: it prints a link that opens a session."
)
LINK_REFUSED = (
    "This link is not known, is older than five minutes, or was opened before. If somebody else was first, their "
    "session has just ended. Run `mcp-auth-proxy dashboard` again for a new link."
)
REFUSED = "refused"
"""The outcome of a sign-in that fails, in the audit trail."""

KEY_REFUSED = "This key does not hold: it is not known, was revoked, or has expired."


CheckKey = Callable[[str], Awaitable[Caller]]
"""Return whose an API key is. Raises CallerRefused and StoreError."""


class SignInPages:
    """The handlers of ``/sign-in`` and of what is below it."""

    def __init__(
        self,
        *,
        visitors: Visitors,
        check_key: CheckKey | None,
        provider: "OpenIdProvider | None",
        public_url: str,
        failed_credentials: FailedCredentials,
        audit: PageAudit,
    ) -> None:
        """``check_key`` and ``provider`` are None if users don't sign in this way."""
        self._visitors = visitors
        self._check_key = check_key
        self._provider = provider
        self._public_url = public_url
        self._failed_credentials = failed_credentials
        self._audit = audit
        self._refusals = RefusalLog()

    async def show(self, request: Request) -> Response:
        """Answer a GET: with the form, or by opening a single-use link."""
        if is_other_loopback_name(request, self._public_url):
            return to_public_url(request, self._public_url)
        if "link" in request.query_params:
            return await self._link(request)
        if self._visitors.anonymous:
            return message("Sign in", NO_SIGN_IN, status=200)
        return await self._form(request, onward=request.query_params.get("next", ""))

    async def submit(self, request: Request) -> Response:
        """Answer a POST of one of our forms."""
        form = await read_form(request)
        if "link" in form:
            return await self._open_link(request, form["link"])
        if self._visitors.anonymous:
            return message("Sign in", NO_SIGN_IN, status=403)
        onward = form.get("next", "")
        if "provider" in form and self._provider is not None:
            return await self._to_provider(self._provider, onward)
        if self._check_key is None:
            return await self._form(request, onward=onward, problem="Keys are not accepted here.", status=403)
        key = form.get("key", "").strip()
        secret_values.remember(key)
        try:
            caller = await self._check_key(key)
        except CallerRefused as refused:
            return await self._key_refused(request, refused, onward)
        return await self._begin(request, caller, onward)

    async def _key_refused(self, request: Request, refused: CallerRefused, onward: str) -> Response:
        self._refusals.warn(peer(request), refused.status, "the key that its user signs in with does not hold")
        await self._audit.record(request, None, SIGN_IN, REFUSED)
        if refused.status not in (400, 401):
            return await self._form(request, onward=onward, problem=str(refused), status=refused.status)
        if seconds := self._failed_credentials.count(client(request)):
            response = await self._form(request, onward=onward, problem=TOO_MANY, status=429)
            response.headers["retry-after"] = str(ceil(seconds))
            return response
        return await self._form(request, onward=onward, problem=KEY_REFUSED, status=401)

    async def callback(self, request: Request) -> Response:
        """Answer the way back from the identity provider."""
        params: dict[str, list[str]] = {}
        for name, value in request.query_params.multi_items():
            params.setdefault(name, []).append(value)
        states = params.get("state", [])
        attempt = SignInAttempt.of(read_cookies(request), states[0]) if len(states) == 1 else None
        if self._provider is None or attempt is None:
            return self._failed("This sign-in was not started in this browser, or more than 10 minutes ago.", 403)
        try:
            caller = await self._provider.finish(params, nonce=attempt.nonce, code_verifier=attempt.code_verifier)
        except CallbackRefused as refused:
            await self._audit.record(request, None, SIGN_IN, REFUSED)
            return self._failed(str(refused), refused.status)
        except CallerRefused as refused:
            await self._audit.record(request, None, SIGN_IN, REFUSED)
            # 401 would ask for another credential.
            return self._failed(str(refused), max(403, refused.status), refused.retry_after)
        except AuthorizationError as error:
            return self._failed(str(error), 502 if error.retry_after is None else 503, error.retry_after)
        response = await self._begin(request, caller, attempt.onward)
        response.delete_cookie(attempt.cookie_name, path=SignInAttempt.PATH)
        return response

    async def sign_out(self, request: Request) -> Response:
        """End the browser's session."""
        sessions, value = self._visitors.sessions, self._visitors.cookie(request)
        caller = await sessions.caller(value)
        await sessions.end(value)
        if caller is not None:
            await self._audit.record(request, caller, SIGN_OUT)
        response = redirect("/", "You have signed out")
        self._visitors.take_back(response)
        return response

    async def _form(self, request: Request, *, onward: str, problem: str = "", status: int = 200) -> Response:
        try:
            caller = await self._visitors.caller(request)
        except CallerRefused:
            caller = None
        response = page(
            "sign_in_form.html",
            status=status,
            onward=local_path(onward),
            problem=problem,
            keys=self._check_key is not None,
            provider=self._provider.address if self._provider is not None else "",
            name=caller.principal.name if caller is not None else "",
            headers=form_headers(http=not self._public_url.startswith("https://")),
        )
        if status == 401:
            response.headers["www-authenticate"] = "Bearer"
        return response

    async def _to_provider(self, provider: "OpenIdProvider", onward: str) -> Response:
        attempt = SignInAttempt.new(local_path(onward))
        try:
            url = await provider.authentication_url(
                state=attempt.state, nonce=attempt.nonce, code_verifier=attempt.code_verifier
            )
        except AuthorizationError as error:
            return self._failed(str(error), 502 if error.retry_after is None else 503, error.retry_after)
        response = redirect(url, "Continue to the identity provider")
        attempt.bind(response, secure=self._public_url.startswith("https://"))
        return response

    async def _begin(self, request: Request, caller: Caller, onward: str) -> Response:
        """Give the browser a new session, and lead it on."""
        visitors = self._visitors
        logger.info("%s has signed in with %s", excerpt(caller.principal.name), excerpt(caller.credential))
        cookie = await visitors.sessions.begin(caller, replaces=visitors.cookie(request))
        await self._audit.record(request, caller, SIGN_IN)
        return self._with_session(cookie, local_path(onward))

    async def _link(self, request: Request) -> Response:
        """Open a single-use link, or show a button if this is no visit that the browser's user has begun themselves."""
        if request.method == "HEAD" or not _is_own_visit(request):
            return page(
                "open_link.html",
                link=request.query_params["link"],
                headers=form_headers(http=not self._public_url.startswith("https://")),
            )
        return await self._open_link(request, request.query_params["link"])

    async def _open_link(self, request: Request, secret: str) -> Response:
        visitors, before = self._visitors, self._visitors.cookie(request)
        if before and await visitors.sessions.has_opened(secret, before):
            return redirect("/", "Continue")
        cookie = await visitors.sessions.open_link(secret, replaces=before)
        caller = await visitors.sessions.caller(cookie.value) if cookie is not None else None
        await self._audit.record(request, caller, SIGN_IN, OK if caller is not None else REFUSED)
        if cookie is None:
            return message("This link can't be used", LINK_REFUSED, status=403)
        return self._with_session(cookie, "/")

    def _with_session(self, cookie: SessionCookie, onward: str) -> Response:
        response = redirect(onward, "You are signed in")
        self._visitors.give(response, cookie)
        return response

    def _failed(self, text: str, status: int, retry_after: float | None = None) -> Response:
        response = message("You are not signed in", text, status=status, onward=("Sign in again", sign_in_path("")))
        if retry_after is not None:
            response.headers["retry-after"] = str(max(1, round(retry_after)))
        return response


def _is_own_visit(request: Request) -> bool:
    """Return whether a GET is a navigation that no page has caused (Fetch Metadata): a typed or clicked address.

    Browsers mark prefetches (``Sec-Purpose``), and requests that any page has caused, also by redirects. Programs
    without Fetch Metadata have no session that could be fixed.
    """
    purpose = request.headers.get("sec-purpose", "") + request.headers.get("purpose", "")
    return (
        request.headers.get("sec-fetch-site", "none") == "none"
        and request.headers.get("sec-fetch-mode", "navigate") == "navigate"
        and "prefetch" not in purpose
        and "prerender" not in purpose
    )
