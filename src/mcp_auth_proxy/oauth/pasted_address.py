"""The address of a redirect that a user copies from a browser: its authorization response (RFC 6749 §4.1.2).

For machines that no browser reaches: the browser is on another one, and its redirect leads nowhere.
"""

from collections.abc import Mapping, Sequence
from urllib.parse import parse_qs

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.errors import AddressRefused, excerpt

MAX_LENGTH = 16 * 1024
"""Characters of an address. A code has at most 4096."""

MAX_FIELDS = 50
"""Parameters of an address."""

TERMINAL_LINE = 4095
"""Bytes of a line that a terminal passes on; the rest of it is lost (termios(3))."""

_ONCE = ("state", "code", "error", "iss")
AROUND = " \t\r\n\f\v<>\"'`"
"""What may be around an address that was copied out of a text."""


def read(text: str, redirect_uri: str) -> Mapping[str, Sequence[str]]:
    """Return the parameters of the authorization response in an address.

    The address must be that of the redirect URI; its scheme may be missing, as some browsers hide it. Raises
    AddressRefused, which repeats nothing that may be a code.
    """
    if len(text) > MAX_LENGTH:
        raise AddressRefused(f"That is no address: it has more than {MAX_LENGTH} characters.")
    address = text.strip(AROUND).partition("#")[0]
    place, mark, query = address.partition("?")
    if not place.isascii() or not place.isprintable() or " " in place or "/" not in place:
        raise AddressRefused(f"That is no address. It has to begin with {excerpt(redirect_uri)}?")
    if place not in (redirect_uri, redirect_uri.partition("://")[2]):
        raise AddressRefused(
            f"That address is not ours: it has to begin with {excerpt(redirect_uri)}? Sign in first, and copy the "
            f"address of the page that comes last."
        )
    params = _params(query)
    secret_values.remember(*params.get("code", ()), *params.get("state", ()))
    if not mark or not any(params.get("state", ())) or not ("code" in params or "error" in params):
        cut = len(text.encode("utf-8", "replace")) >= TERMINAL_LINE
        remedy = "give it in a file, with < FILE: terminals cut long lines" if cut else "copy all of it"
        raise AddressRefused(f"That address is no complete answer: it needs state, and code or error; {remedy}.")
    for name in _ONCE:
        if len(params.get(name, ())) > 1:
            raise AddressRefused(f"That address is not ours: it has {name} more than once (RFC 6749 §3.1).")
    return params


def _params(query: str) -> Mapping[str, Sequence[str]]:
    try:
        return parse_qs(query, keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict")
    except ValueError:
        raise AddressRefused(
            "That address is not ours: it has parameters that no authorization server sends."
        ) from None
