"""Token requests and responses: code, refresh token or client credentials → tokens (RFC 6749 §4.1.3, §4.4, §5, §6)."""

import math
import re
from collections.abc import Iterable, Mapping

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.errors import AuthorizationServerUnavailable, TokenRefused, excerpt
from mcp_auth_proxy.models import Attempt, Flow, Grant, TokenSet
from mcp_auth_proxy.oauth import account_label, oauth_error, quirks, retry_after, scopes
from mcp_auth_proxy.oauth.documents import Document, parse_object
from mcp_auth_proxy.oauth.oauth_error import TokenRequestContext

MAX_TOKEN = 16 * 1024
"""Maximum length of a token."""

MAX_LIFETIME = 10 * 365 * 86400.0
"""Seconds. A longer expires_in is reduced to this."""

_TOKEN = re.compile(r"[\x21-\x7e]+")
_SECONDS = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?")

BEARER_ONLY: tuple[str, ...] = ("Bearer",)

_TOKENS = ("access_token", "refresh_token", "id_token", "device_code")

_ERROR_CLAUSE = "RFC 6749 §5.2"
# Temporary errors that some servers send with 400 (RFC 6749 §4.1.2.1 defines them for the front channel).
_TEMPORARY = frozenset({"temporarily_unavailable", "server_error", "slow_down"})


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
    """Return the form that renews a grant with its refresh token (RFC 6749 §6).

    Without scope, which means all scopes granted; ``with_scope`` adds the scopes requested. Raises ValueError if the
    grant has no refresh token.
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
    """Return the form of the client credentials grant (RFC 6749 §4.4.2)."""
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
    context: TokenRequestContext | None = None,
    token_types: tuple[str, ...] = BEARER_ONLY,
) -> TokenSet:
    """Return the tokens of a token response (RFC 6749 §5.1). Their type must be in ``token_types`` (RFC 9449 §5).

    ``headers`` have lower-case names; ``now`` is in Unix seconds. If the response has no refresh token, that of
    ``previous`` is kept (§6); if it has no scope, the scopes are those of ``previous``, or the requested ones.
    ``secrets`` are values that were sent and must be masked if an error repeats them; the tokens of ``previous`` are
    masked too. ``context`` is used to name the configuration key in errors.
    Raises TokenRefused for a structured OAuth error, also with HTTP 200; AuthorizationServerUnavailable for 408, 429,
    5xx and everything that is not an OAuth response; DocumentRefused for tokens that must not be used.
    """
    old = (previous.access_token, previous.refresh_token) if previous else ()
    hidden = (*(token for token in old if token), *secrets)
    answer = quirks.standard_answer(read_answer(status, headers, body, url=url, secrets=hidden, context=context))
    document = Document(answer, name="token response", url=url, clause="RFC 6749 §5.1")
    token_type = document.get("token_type")
    known = {name.lower(): name for name in token_types}
    if token_type in (None, ""):
        raise document.refusal("it has no token_type")
    if not isinstance(token_type, str) or token_type.lower() not in known:
        raise document.refusal(f"its token_type is not {' or '.join(token_types)}")
    access_token = _token(document, "access_token")
    if access_token is None:
        raise document.refusal("it has no access_token")
    lifetime = read_lifetime(document.get("expires_in"))
    refresh_token = _token(document, "refresh_token")
    return TokenSet(
        access_token=access_token,
        token_type=known[token_type.lower()],
        refresh_token=refresh_token or (previous.refresh_token if previous else None),
        refresh_expires_at=_refresh_expires_at(answer, now, None if refresh_token else previous),
        obtained_at=now,
        expires_at=None if lifetime is None else now + lifetime,
        scopes=_granted(document.get("scope"), previous.scopes if previous else requested_scopes),
        label="" if previous else account_label.of_response(answer),
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
    context: TokenRequestContext | None = None,
) -> dict[str, object]:
    """Return the JSON object of a successful response, for every endpoint that answers like the token endpoint.

    ``clause`` is the RFC section that defines the response. Raises TokenRefused for a structured OAuth error, also with
    HTTP 200 (RFC 6749 §5.2); AuthorizationServerUnavailable for 408, 429, 5xx and everything that is not an OAuth
    response. Its text says "now" only if waiting may help.
    """
    shown = excerpt(url)
    if retry_after.is_temporary(status):
        raise _unavailable(status, headers, f"The {endpoint} {shown} can't be used now: HTTP {status}.")
    broken = f"The {endpoint} {shown} can't be used: HTTP {status}, and"
    succeeded = 200 <= status < 300
    try:
        answer = parse_object(body)
    except ValueError as problem:
        broke = clause if succeeded else _ERROR_CLAUSE
        raise _unavailable(status, headers, f"{broken} {problem} ({broke}).") from None
    # Before anything is refused: the rest of the response may repeat them.
    secret_values.remember(*(value for name in _TOKENS if isinstance(value := answer.get(name), str)))
    error = answer.get("error")
    if isinstance(error, str) and error:
        own, description = oauth_error.code(error), answer.get("error_description")
        words = oauth_error.format_error(own, description, secrets=secrets)
        code = quirks.standard_error(own)
        if code in _TEMPORARY:
            raise _unavailable(status, headers, f"The {endpoint} {shown} can't be used now: {words}.")
        explanation, hint = oauth_error.hint(code, description, context) if context else ("", None)
        raise TokenRefused(code, f"The {endpoint} {shown} refused: {words}.{explanation}", hint=hint)
    if not succeeded or answer.get("ok") is False:
        raise _unavailable(status, headers, f"{broken} it is not an OAuth error ({_ERROR_CLAUSE}).")
    return answer


def read_lifetime(value: object) -> float | None:
    """Return ``expires_in`` in seconds, at most 10 years; None if it is absent or unusable.

    Some servers send numbers as strings, or 0 or less for tokens that do not expire. A lifetime of less than a second
    would cause a refresh before each request, so it counts as unknown: a 401 shows when such a token has expired.
    """
    if isinstance(value, str) and _SECONDS.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1 or value == math.inf:
        return None
    return float(min(value, MAX_LIFETIME))


def _refresh_expires_at(answer: Mapping[str, object], now: float, kept: TokenSet | None) -> float | None:
    """Return when the refresh token lapses, in Unix seconds; ``kept``: the tokens it is from, if it is not a new one.

    No RFC defines the member; these two names are in use. 0 says that it does not lapse.
    """
    for name in ("refresh_token_expires_in", "refresh_expires_in"):
        if name in answer:
            lifetime = read_lifetime(answer[name])
            return None if lifetime is None else now + lifetime
    return None if kept is None else kept.refresh_expires_at


def _unavailable(status: int, headers: Mapping[str, str], message: str) -> AuthorizationServerUnavailable:
    # After a gateway's 502 or 504, or a page with status 200, the request may still have been processed.
    maybe_processed = status < 300 or (status >= 500 and status != 503)
    return retry_after.unavailable(message, headers, maybe_processed=maybe_processed)


def is_token(text: str) -> bool:
    """Return whether a text can be a token (RFC 6749 A.12, A.17) that a header field may have."""
    return len(text) <= MAX_TOKEN and _TOKEN.fullmatch(text) is not None


def _token(document: Document, member: str) -> str | None:
    """Return a token (RFC 6749 A.12, A.17), None if absent or empty. No spaces: it is sent in a header field."""
    value = document.get(member)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not is_token(value):
        raise document.refusal(f"its {member} has characters that are not allowed in a token, or is longer than 16 KiB")
    return value


def _granted(value: object, otherwise: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(value, list):
        value = " ".join(item for item in value if isinstance(item, str))
    return scopes.parse(value) if isinstance(value, str) else otherwise


def _resource(resource: str) -> list[tuple[str, str]]:
    return [("resource", resource)] if resource else []
