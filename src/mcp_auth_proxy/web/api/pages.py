"""Lists in pages: each answer has a token for the next one, which only the same caller can use for the same query.

A token is the position after the last item, sealed with the key of the store. What it is for is the associated data, so
another caller's, an edited one and one of another list can't be opened, and any replica can open its own.
"""

import base64
import binascii
from typing import Annotated, Any
from urllib.parse import parse_qsl

from msgspec import Meta

from mcp_auth_proxy.errors import DecryptionError
from mcp_auth_proxy.store.cipher import Cipher
from mcp_auth_proxy.web.api.models import Body, View
from mcp_auth_proxy.web.api.operations import Call
from mcp_auth_proxy.web.api.problems import Problem

MAX_TOKEN = 1000
"""Characters of a token."""

_OWN = frozenset({"page_size", "page_token"})


class PageQuery(Body):
    """Which part of a list to return."""

    page_size: Annotated[int, Meta(ge=1, le=200)] = 50
    page_token: str = ""


class PageInfo(View):
    """``next_page_token`` is null on the last page."""

    next_page_token: str | None = None


def position(call: Call[Any, PageQuery]) -> str | None:
    """Return where the page before this one ended, None for the first page. Raises Problem (400)."""
    if not call.query.page_token:
        return None
    return _open(call.api.database.cipher, call.query.page_token, _purpose(call))


def info(call: Call[Any, PageQuery], next_position: str | None) -> PageInfo:
    """Return what a page says about the next one; ``next_position`` is None if there is none."""
    if next_position is None:
        return PageInfo()
    return PageInfo(next_page_token=_seal(call.api.database.cipher, next_position, _purpose(call)))


def _purpose(call: Call[Any, PageQuery]) -> tuple[str, str]:
    """Return whose list it is and which one: the path as it was sent, and the filters."""
    filters = sorted(pair for pair in parse_qsl(call.raw_query.decode("ascii")) if pair[0] not in _OWN)
    values = [*call.path.items(), *filters]
    return call.caller.principal.id, f"{call.operation.path} {values!r}"


def _seal(cipher: Cipher, text: str, purpose: tuple[str, str]) -> str:
    row, column = purpose
    return base64.urlsafe_b64encode(cipher.seal(text, table="page", row=row, column=column)).decode().rstrip("=")


def _open(cipher: Cipher, token: str, purpose: tuple[str, str]) -> str:
    row, column = purpose
    try:
        if len(token) > MAX_TOKEN:
            raise ValueError
        sealed = base64.b64decode(token.encode("ascii") + b"=" * (-len(token) % 4), altchars=b"-_", validate=True)
        if base64.urlsafe_b64encode(sealed).decode().rstrip("=") != token:
            raise ValueError
        return cipher.open(sealed, table="page", row=row, column=column)
    except (ValueError, binascii.Error, DecryptionError):
        raise Problem(
            400, "page-token", "The page token is not one that was given to this caller for this list."
        ) from None
