"""What another program has written about a login, read once and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcp_auth_proxy.models import ClientAuth, Registration, RegistrationKind, TokenSet
from mcp_auth_proxy.oauth import scopes
from mcp_auth_proxy.oauth.token_endpoint import is_token

_LARGEST = 1e15
"""More than the milliseconds of any time that is meant."""

_METHODS = {str(method): method for method in ClientAuth}


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLogin:
    """A login in the files of another program; ``path`` is that with the tokens. Times are Unix seconds.

    ``client`` is None if it kept none, ``issuer`` is empty if it did not note it. The time of consent is not noted
    either, so ``granted_at`` is when the file was written.
    """

    path: Path
    tokens: TokenSet = field(repr=False)
    client: Registration | None
    granted_at: float
    issuer: str


def tokens_of(values: Mapping[str, Any], *, written_at: float, expires_at: float | None) -> TokenSet | None:
    """Return the tokens in a token response that was written to a file; None if there are none.

    If ``expires_at`` is not noted, ``expires_in`` counts from when the file was written.
    """
    access_token = _text(values, "access_token")
    if not access_token or not is_token(access_token):
        return None
    if expires_at is None and (lifetime := number(values, "expires_in")) is not None:
        expires_at = written_at + lifetime
    return TokenSet(
        access_token=access_token,
        refresh_token=_text(values, "refresh_token"),
        obtained_at=written_at,
        expires_at=expires_at,
        scopes=scopes.parse(_text(values, "scope") or ""),
    )


def client_of(values: Mapping[str, Any], *, created_at: float) -> Registration | None:
    """Return the client in a registration response that was written to a file; None if there is none.

    Without a method, one with a secret sends it as RFC 7591 §2 has it by default. Server and issuer are left open.
    """
    client_id = _text(values, "client_id")
    if not client_id:
        return None
    secret, uris = _text(values, "client_secret"), values.get("redirect_uris")
    ends = number(values, "client_secret_expires_at")
    default = ClientAuth.NONE if secret is None else ClientAuth.BASIC
    method = _METHODS.get(_text(values, "token_endpoint_auth_method") or "", default)
    return Registration(
        server="",
        issuer="",
        client_id=client_id,
        client_auth=ClientAuth.NONE if secret is None else method,
        kind=RegistrationKind.DYNAMIC,
        client_secret=secret,
        redirect_uri=uris[0] if isinstance(uris, list) and uris and isinstance(uris[0], str) else "",
        secret_expires_at=ends if ends is not None and ends > 0 else None,
        created_at=created_at,
    )


def modified(path: Path) -> float:
    """Return when a file was written: always the same, so that a login which is taken in again is known."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def number(values: Mapping[str, Any], name: str) -> float | None:
    """Return a number of a file; None if there is none, or if it is not one that a time can be."""
    found = values.get(name)
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) <= _LARGEST:
        return None
    return float(found)


def _text(values: Mapping[str, Any], name: str) -> str | None:
    """Return a text of a file; None if there is none, or if it has characters that no such value has."""
    found = values.get(name)
    return found if isinstance(found, str) and found.isprintable() and found else None
