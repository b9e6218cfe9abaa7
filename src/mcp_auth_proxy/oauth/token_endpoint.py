"""Token requests and responses: code, refresh token or client credentials → tokens (RFC 6749 §4.1.3, §4.4, §5, §6)."""

import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from mcp_auth_proxy.errors import AuthorizationServerUnavailable, TokenRefused
from mcp_auth_proxy.models import Attempt, Flow, Grant, TokenSet
from mcp_auth_proxy.oauth import oauth_error, quirks, scopes
from mcp_auth_proxy.oauth.documents import Document, parse_object
from mcp_auth_proxy.oauth.oauth_error import TokenRequestContext

MAX_TOKEN = 16 * 1024
"""Characters of a token."""

MAX_LIFETIME = 10 * 365 * 86400.0
"""Seconds; a longer expires_in is taken as this."""

RETRY_AFTER_DEFAULT = 5.0
RETRY_AFTER_MAX = 300.0
"""Seconds."""

_TOKEN = re.compile(r"[\x21-\x7e]+")
_SECONDS = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?")

BEARER_ONLY: tuple[str, ...] = ("Bearer",)

_ERROR_CLAUSE = "RFC 6749 §5.2"
# Errors that pass, sent by some servers as a 400 (RFC 6749 §4.1.2.1 names them for the front channel).
_PASSING = frozenset({"temporarily_unavailable", "server_error", "slow_down"})


def code_request(flow: Flow, attempt: Attempt, code: str) -> list[tuple[str, str]]:
    """Return the form that redeems a code (RFC 6749 §4.1.3, RFC 7636 §4.5, RFC 8707 §2.2)."""
    return [
        ("grant_type", "authorization_code"),
        ("code", code),
        ("redirect_uri", flow.redirect_uri),
        ("code_verifier", attempt.code_verifier),
        *_resource(flow.key.resource),
    ]


def refresh_request(grant: Grant, *, with_scope: bool = False) -> list[tuple[str, str]]:
    """Return the form that renews a grant by its refresh token (RFC 6749 §6).

    Without the scope, which then means all that was granted; ``with_scope``: with what was asked for. Raises
    ValueError where the grant has no refresh token.
    """
    if grant.tokens.refresh_token is None:
        raise ValueError("the grant has no refresh token")
    return [
        ("grant_type", "refresh_token"),
        ("refresh_token", grant.tokens.refresh_token),
        *([("scope", " ".join(grant.scopes))] if with_scope else []),
        *_resource(grant.key.resource),
    ]


def client_credentials_request(resource: str, scopes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the form that asks for a token of the client's own (RFC 6749 §4.4.2)."""
    scope = [("scope", " ".join(scopes))] if scopes else []
    return [("grant_type", "client_credentials"), *scope, *_resource(resource)]


def read_tokens(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    url: str,
    now: float,
    requested_scopes: tuple[str, ...],
    previous: TokenSet | None = None,
    secrets: Iterable[str] = (),
    asked: TokenRequestContext | None = None,
    token_types: tuple[str, ...] = BEARER_ONLY,
) -> TokenSet:
    """Return the tokens of a token response (RFC 6749 §5.1), which must be of one of ``token_types`` (RFC 9449 §5).

    ``headers`` have lower-case names; ``now`` is in Unix seconds. A refresh response without a refresh token keeps
    that of ``previous`` (§6); one without a scope means the scopes of ``previous``, or those requested. ``secrets``
    are what was sent and must not be shown should an error repeat it, besides the tokens of ``previous``; ``asked``
    lets an error name the key that it is about.
    Raises TokenRefused for a structured OAuth error, also with HTTP 200; AuthorizationServerUnavailable for 408, 429,
    5xx and what is no OAuth answer at all; DocumentRefused for tokens that must not be used.
    """
    held = (previous.access_token, previous.refresh_token) if previous else ()
    hidden = (*(token for token in held if token), *secrets)
    answer = quirks.standard_answer(read_answer(status, headers, body, url=url, secrets=hidden, asked=asked))
    document = Document(answer, name="token response", url=url, clause="RFC 6749 §5.1")
    token_type = document.get("token_type")
    known = {name.lower(): name for name in token_types}
    if token_type in (None, ""):
        raise document.refuse("it has no token_type")
    if not isinstance(token_type, str) or token_type.lower() not in known:
        raise document.refuse(f"its token_type is not {' or '.join(token_types)}")
    access_token = _token(document, "access_token")
    if access_token is None:
        raise document.refuse("it has no access_token")
    lifetime = read_lifetime(document.get("expires_in"))
    return TokenSet(
        access_token=access_token,
        token_type=known[token_type.lower()],
        refresh_token=_token(document, "refresh_token") or (previous.refresh_token if previous else None),
        obtained_at=now,
        expires_at=None if lifetime is None else now + lifetime,
        scopes=_granted(document.get("scope"), previous.scopes if previous else requested_scopes),
    )


def read_answer(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    url: str,
    endpoint: str = "token endpoint",
    clause: str = "RFC 6749 §5.1",
    secrets: Iterable[str] = (),
    asked: TokenRequestContext | None = None,
) -> dict[str, object]:
    """Return the JSON object of a successful answer of any endpoint that answers as the token endpoint does.

    ``clause`` says what such an answer is. An error that waiting may help is told from one that it hardly will.
    Raises TokenRefused for a structured OAuth error, also with HTTP 200 (RFC 6749 §5.2); AuthorizationServerUnavailable
    for 408, 429, 5xx and what is no OAuth answer at all.
    """
    if status in (408, 429) or status >= 500:
        raise _unavailable(status, headers, f"The {endpoint} {url} can't be used now: HTTP {status}.")
    broken = f"The {endpoint} {url} can't be used: HTTP {status}, and"
    succeeded = 200 <= status < 300
    try:
        answer = parse_object(body)
    except ValueError as problem:
        broke = clause if succeeded else _ERROR_CLAUSE
        raise _unavailable(status, headers, f"{broken} {problem} ({broke}).") from None
    error = answer.get("error")
    if isinstance(error, str) and error:
        own, description = oauth_error.code(error), answer.get("error_description")
        words = oauth_error.format_error(own, description, secrets=secrets)
        code = quirks.standard_error(own)
        if code in _PASSING:
            raise _unavailable(status, headers, f"The {endpoint} {url} can't be used now: {words}.")
        hint, remedy = oauth_error.hint(code, description, asked) if asked else ("", None)
        raise TokenRefused(code, f"The {endpoint} {url} refused: {words}.{hint}", remedy=remedy)
    if not succeeded or answer.get("ok") is False:
        raise _unavailable(status, headers, f"{broken} no OAuth error ({_ERROR_CLAUSE}).")
    return answer


def read_lifetime(value: object) -> float | None:
    """Return ``expires_in`` in seconds, at most 10 years; None where it says nothing that can be used.

    Servers write numbers as strings, and 0 or less for tokens that do not expire: taken at its word, that (or part
    of a second) would be a refresh before each request. A 401 tells when such a token has died.
    """
    if isinstance(value, str) and _SECONDS.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1 or value == math.inf:
        return None
    return float(min(value, MAX_LIFETIME))


def read_retry_after(value: str | None, *, now: datetime | None = None) -> float:
    """Return a Retry-After in seconds, from 1 to 300 (RFC 9110 §10.2.3); 5 where there is none that can be read."""
    text = (value or "").strip()
    if _SECONDS.fullmatch(text):
        seconds = float(text)
    else:
        try:
            date = parsedate_to_datetime(text)
        except (ValueError, OverflowError, IndexError, TypeError):
            return RETRY_AFTER_DEFAULT
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - (now or datetime.now(UTC))).total_seconds()
    return min(max(seconds, 1.0), RETRY_AFTER_MAX)


def _unavailable(status: int, headers: Mapping[str, str], message: str) -> AuthorizationServerUnavailable:
    asked = headers.get("retry-after")
    retry_after = read_retry_after(asked)
    # A gateway's 502 or 504, or a page with status 200, may hide a request that was acted upon.
    return AuthorizationServerUnavailable(
        message,
        retry_after=retry_after,
        asked_pause=retry_after if asked else 0.0,
        maybe_processed=status < 300 or (status >= 500 and status != 503),
    )


def _token(document: Document, member: str) -> str | None:
    """RFC 6749 appendix A.12 and A.17, without the space: it goes into a header field. Empty counts as absent."""
    value = document.get(member)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > MAX_TOKEN or not _TOKEN.fullmatch(value):
        raise document.refuse(f"its {member} has characters that a token may not have, or is longer than 16 KiB")
    return value


def _granted(value: object, otherwise: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(value, list):
        value = " ".join(item for item in value if isinstance(item, str))
    return scopes.parse(value) if isinstance(value, str) else otherwise


def _resource(resource: str) -> list[tuple[str, str]]:
    return [("resource", resource)] if resource else []
