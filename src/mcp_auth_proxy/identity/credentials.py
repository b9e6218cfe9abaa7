"""The credentials of a request: where each kind stands, and that there is only one."""

import base64
import binascii
from collections.abc import Iterator
from typing import Literal, NamedTuple

from mcp_auth_proxy.errors import CallerRefused
from mcp_auth_proxy.identity.authenticator import Fields
from mcp_auth_proxy.identity.keys import PREFIX
from mcp_auth_proxy.identity.trusted_header import TrustedHeader

AUTHORIZATION = b"authorization"
API_KEY = b"x-api-key"

UNKNOWN = "The credential of this request is not valid."
"""Whatever is wrong with it: whoever guesses learns nothing."""

MISSING = "This request has no credential."
SEVERAL = "This request has several credentials: send one."

_PREFIX = PREFIX.encode()


class Credential(NamedTuple):
    """What a caller presents. ``unusable`` is an Authorization field that nothing here can read."""

    kind: Literal["key", "jwt", "header", "unusable"]
    value: bytes


def read_credential(
    fields: Fields, peer: str, *, keys: bool, jwts: bool, header: TrustedHeader | None
) -> Credential | None:
    """Return the credential of a request, of the kinds that are accepted; None if there is none.

    Raises CallerRefused if there are several, or if a name is not accepted from this peer.
    """
    found = list(_in_fields(fields, keys=keys, jwts=jwts))
    if header is not None:
        named = header.value(fields, peer)
        if named is not None:
            found.append(Credential("header", named))
    if len(found) > 1:
        raise CallerRefused(SEVERAL, 400)
    return found[0] if found else None


def _in_fields(fields: Fields, *, keys: bool, jwts: bool) -> Iterator[Credential]:
    for name, value in fields:
        if name == AUTHORIZATION and (keys or jwts):
            yield _authorization(value, keys=keys, jwts=jwts)
        elif name == API_KEY and keys:
            yield Credential("key", value.strip())


def _authorization(value: bytes, *, keys: bool, jwts: bool) -> Credential:
    scheme, _, rest = value.strip().partition(b" ")
    rest = rest.strip()
    match scheme.lower():
        case b"bearer" if keys and (rest.startswith(_PREFIX) or not jwts):
            return Credential("key", rest)
        case b"bearer" if jwts:
            return Credential("jwt", rest)
        case b"basic" if keys:
            return Credential("key", _password(rest))
    return Credential("unusable", b"")


def _password(encoded: bytes) -> bytes:
    """Return the password of Basic credentials (RFC 7617); empty if they are malformed."""
    try:
        return base64.b64decode(encoded, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""
