"""Paths of our own pages that a request names."""

import re
from urllib.parse import quote

from starlette.requests import Request

from mcp_auth_proxy.models import DEFAULT_ACCOUNT

MAX_PATH = 1000
"""Characters of a path with its query. Those of our pages are shorter."""

_LOCAL = re.compile(r"/(?!/)(?:[A-Za-z0-9._~@/-]|%40)*(?:\?[!\"$-\[\]-~]*)?")
_NAME = re.compile(r"([a-z0-9][a-z0-9-]{0,62})(?:@([a-z0-9][a-z0-9-]{0,31}))?")


def local_path(text: str) -> str:
    """Return a path of this proxy to go on to, ``/`` if the text is anything else: it never leads elsewhere (T18).

    A browser and our routes must read it as it is written: without dot segments, encoded letters and a fragment,
    which could hide ``/oauth/start`` from ``popup.signed_in``.
    """
    if len(text) > MAX_PATH or _LOCAL.fullmatch(text) is None:
        return "/"
    segments = text.partition("?")[0].split("/")
    return "/" if {".", ".."} & set(segments) or "" in segments[1:-1] else text


def sign_in_path(onward: str) -> str:
    """Return the path of the sign-in page that leads on to another path."""
    return f"/sign-in?next={quote(onward, safe='')}" if local_path(onward) != "/" else "/sign-in"


def path_of(request: Request) -> str:
    """Return the path and query of a page, as they were sent."""
    raw, query = request.scope["raw_path"].decode("ascii"), request.scope["query_string"].decode("latin-1")
    return f"{raw}?{query}" if query else str(raw)


def split_name(text: str) -> tuple[str, str]:
    """Return the server and the account that ``SERVER`` or ``SERVER@ACCOUNT`` names; if none, both are empty."""
    match = _NAME.fullmatch(text)
    if match is None:
        return "", ""
    return match[1], match[2] or DEFAULT_ACCOUNT
