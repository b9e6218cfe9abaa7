"""The page that a user confirms before the redirect to a sign-in page, and the check of the form on it."""

import hashlib
import hmac
import re
import secrets
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from mcp_auth_proxy.broker import ConfirmationPrompt
from mcp_auth_proxy.web.cookies import read_cookies
from mcp_auth_proxy.web.forms import read_form
from mcp_auth_proxy.web.pages import ScopeList, form_headers, page

COOKIE_PREFIX = "mcp_auth_page_"
MAX_FORM = 1024
"""Bytes of the form."""

_COOKIE_VALUE = re.compile(r"[A-Za-z0-9_-]{43}")


def confirmation_page(request: Request, prompt: ConfirmationPrompt, *, secure: bool, command_name: str) -> Response:
    """Return the page, which works without JavaScript, and the cookie that ties its form to this browser.

    A browser keeps its cookie if it has one, so that the page can be open twice. ``secure``: whether browsers reach the
    proxy over https. ``command_name`` is what commands call the server.
    """
    name = _cookie_name(prompt.flow_id)
    cookie = read_cookies(request).get(name, "")
    if not _COOKIE_VALUE.fullmatch(cookie):
        cookie = secrets.token_urlsafe(32)
    response = page(
        "confirm.html",
        sign_in=prompt.sign_in,
        scopes=ScopeList.of(prompt.sign_in.scopes),
        visited=prompt.visited,
        command_name=command_name,
        token=_token(prompt.flow_id, cookie),
        headers=form_headers(http=not prompt.sign_in.address.startswith("https://")),
    )
    response.set_cookie(
        name,
        cookie,
        max_age=prompt.max_age,
        path=f"/connect/{quote(prompt.sign_in.server)}",
        secure=secure,
        httponly=True,
        samesite="strict",
    )
    return response


async def is_confirmed(request: Request, flow_id: str) -> bool:
    """Return whether a form comes from our page for this flow, in the same browser. The guard has checked Origin.

    It may be sent twice, as with a double click: each starts an attempt of its own.
    """
    cookie = read_cookies(request).get(_cookie_name(flow_id), "")
    token = (await read_form(request, limit=MAX_FORM)).get("token", "")
    if not token or not _COOKIE_VALUE.fullmatch(cookie):
        return False
    return hmac.compare_digest(token.encode("utf-8", "replace"), _token(flow_id, cookie).encode())


def _cookie_name(flow_id: str) -> str:
    return COOKIE_PREFIX + hashlib.sha256(flow_id.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _token(flow_id: str, cookie: str) -> str:
    """Return the token of a flow's form: only who has the browser's cookie can know it."""
    return hmac.digest(cookie.encode(), flow_id.encode("utf-8", "surrogatepass"), "sha256").hex()
