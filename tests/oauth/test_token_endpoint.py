"""Token requests and responses."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.shared.auth import OAuthToken

from mcp_auth_proxy.errors import AuthorizationServerUnavailable, DocumentRefused, McpAuthProxyError, TokenRefused
from mcp_auth_proxy.models import (
    Account,
    Attempt,
    ClientAuth,
    Endpoints,
    Flow,
    Grant,
    GrantKey,
    GrantType,
    Registration,
    RegistrationKind,
    TokenSet,
)
from mcp_auth_proxy.oauth import token_endpoint
from mcp_auth_proxy.oauth.token_endpoint import MAX_LIFETIME, read_lifetime

URL = "https://as.example.com/token"
NOW = 1_000_000.0
PREVIOUS = TokenSet(access_token="old-access", refresh_token="old-refresh", obtained_at=0.0, scopes=("p",))


def read(
    status: int = 200,
    body: bytes | None = None,
    *,
    headers: dict[str, str] | None = None,
    previous: TokenSet | None = None,
    secrets: tuple[str, ...] = (),
    **members: Any,
) -> TokenSet:
    content = json.dumps({"access_token": "at", "token_type": "Bearer", **members}).encode() if body is None else body
    return token_endpoint.read_tokens(
        status,
        headers or {},
        content,
        url=URL,
        now=NOW,
        requested_scopes=("a", "b"),
        previous=previous,
        secrets=secrets,
    )


def grant(resource: str, tokens: TokenSet = PREVIOUS) -> Grant:
    return Grant(
        key=GrantKey(account=Account("local", "s"), resource=resource, issuer="https://as.example.com"),
        grant_type=GrantType.AUTHORIZATION_CODE,
        registration=Registration(
            server="s",
            issuer="https://as.example.com",
            client_id="c",
            client_auth=ClientAuth.NONE,
            kind=RegistrationKind.DYNAMIC,
        ),
        endpoints=Endpoints(token=URL),
        tokens=tokens,
        scopes=("a",),
        granted_at=0.0,
    )


def test_requests_have_the_resource_if_there_is_one() -> None:  # T49
    held = grant("https://h/mcp")
    flow = Flow(
        id="f",
        key=held.key,
        registration=held.registration,
        endpoints=held.endpoints,
        scopes=("a",),
        redirect_uri="http://127.0.0.1/cb",
        iss_supported=False,
        created_at=0.0,
        expires_at=1.0,
    )
    attempt = Attempt(
        flow_id="f", state_hash="s", browser_hash="b", code_verifier="ver", created_at=0.0, expires_at=1.0
    )

    assert token_endpoint.code_request(flow, attempt, "the-code") == [
        ("grant_type", "authorization_code"),
        ("code", "the-code"),
        ("redirect_uri", "http://127.0.0.1/cb"),
        ("code_verifier", "ver"),
        ("resource", "https://h/mcp"),
    ]
    assert token_endpoint.refresh_request(held) == [
        ("grant_type", "refresh_token"),
        ("refresh_token", "old-refresh"),
        ("resource", "https://h/mcp"),
    ]
    assert token_endpoint.client_credentials_request("https://h/mcp", ("a", "b")) == [
        ("grant_type", "client_credentials"),
        ("scope", "a b"),
        ("resource", "https://h/mcp"),
    ]
    assert token_endpoint.client_credentials_request("", ()) == [("grant_type", "client_credentials")]
    assert len(token_endpoint.refresh_request(grant(""))) == 2


def test_a_full_response_is_read() -> None:
    found = read(expires_in=3600, refresh_token="rt", scope="a  c")

    assert found == TokenSet(
        access_token="at", refresh_token="rt", obtained_at=NOW, expires_at=NOW + 3600, scopes=("a", "c")
    )


def test_what_a_response_leaves_out_is_taken_from_the_request() -> None:
    assert read() == TokenSet(access_token="at", obtained_at=NOW, scopes=("a", "b"))


def test_a_refresh_keeps_the_refresh_token_and_scopes_that_are_not_replaced() -> None:
    assert (read(previous=PREVIOUS).refresh_token, read(previous=PREVIOUS).scopes) == ("old-refresh", ("p",))
    assert read(previous=PREVIOUS, refresh_token="").refresh_token == "old-refresh"
    assert read(previous=PREVIOUS, refresh_token="new").refresh_token == "new"


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"token_type": "bearer", "expires_in": 60},
        {"token_type": "BEARER", "scope": "x y", "refresh_token": "r"},
        {"expires_in": "60", "id_token": "ignored"},
    ],
)
def test_the_sdk_reads_the_same(members: dict[str, Any]) -> None:
    theirs = OAuthToken.model_validate({"access_token": "at", "token_type": "Bearer", **members})
    ours = read(**members)

    assert (ours.access_token, ours.refresh_token, ours.token_type) == (
        theirs.access_token,
        theirs.refresh_token,
        theirs.token_type,
    )
    assert ours.expires_at == (NOW + theirs.expires_in if theirs.expires_in else None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3600, 3600.0),
        (0.5, None),
        (1.5, 1.5),
        ("3600", 3600.0),
        ("3600.5", 3600.5),
        (10**12, MAX_LIFETIME),
        (10**399, MAX_LIFETIME),
        ("9" * 20, MAX_LIFETIME),
        (0, None),
        (-5, None),
        ("-5", None),
        (True, None),
        ("abc", None),
        ("9" * 400, None),
        ("", None),
        ("٣", None),
        (None, None),
        ([], None),
        (float("inf"), None),
        (float("nan"), None),
    ],
)
def test_a_lifetime_is_clamped_or_ignored(value: object, expected: float | None) -> None:  # T21
    assert read_lifetime(value) == expected


@pytest.mark.parametrize("literal", [b"-5", b"true", b'"abc"', b"1e400", b"9" * 400, b"9" * 9000, b"{}"])
def test_reading_a_lifetime_never_raises(literal: bytes) -> None:  # T21
    found = read(200, b'{"access_token": "at", "token_type": "Bearer", "expires_in": %b}' % literal)

    assert found.expires_at is None


@pytest.mark.parametrize("token_type", ["mac", "DPoP", "", None, 3, "Bearer "])
def test_a_token_of_another_type_is_refused(token_type: object) -> None:  # T22
    with pytest.raises(DocumentRefused, match="token_type"):
        read(token_type=token_type)


def test_a_token_without_type_is_refused() -> None:  # T22
    with pytest.raises(DocumentRefused, match="token_type"):
        read(200, b'{"access_token": "at"}')


@pytest.mark.parametrize("member", ["access_token", "refresh_token"])
@pytest.mark.parametrize("token", ["can\r\nary", "can\x00ary", "can ary", "canaré", "canary" * 5000, 3, ["canary"]])
def test_a_malformed_token_is_refused_and_not_shown(member: str, token: object) -> None:  # T23
    with pytest.raises(DocumentRefused, match=member) as refused:
        read(**dict[str, Any]({member: token}))

    assert "can" not in str(refused.value).replace("can not", "")


@pytest.mark.parametrize("token", ["", None])
def test_an_empty_access_token_is_refused(token: object) -> None:  # T23
    with pytest.raises(DocumentRefused, match="access_token"):
        read(access_token=token)


@pytest.mark.parametrize("status", [200, 400, 401, 403])
def test_a_structured_error_is_a_refusal_whatever_the_status(status: int) -> None:  # F2
    with pytest.raises(TokenRefused) as refused:
        read(status, b'{"ok": false, "error": "invalid_grant", "error_description": "no\\n more"}')

    assert refused.value.error == "invalid_grant"
    assert "invalid_grant (no more)" in str(refused.value) and URL in str(refused.value)


def test_an_error_does_not_repeat_what_was_sent() -> None:  # T45
    body = b'{"error": "invalid_grant", "error_description": "code c4nary, token old-refresh, old-access"}'

    with pytest.raises(TokenRefused) as refused:
        read(400, body, previous=PREVIOUS, secrets=("c4nary",))
    assert not any(secret in str(refused.value) for secret in ("c4nary", "old-refresh", "old-access"))


@pytest.mark.parametrize(
    ("status", "body", "maybe_processed"),
    [
        (500, b'{"error": "invalid_grant"}', True),
        (502, b"<html>", True),
        (503, b"", False),
        (429, b"{}", False),
        (408, b"", False),
        (400, b"<html>", False),
        (404, b"{}", False),
        (400, b'{"error": {"code": 3}}', False),
        (400, b'{"error": "temporarily_unavailable"}', False),
        (200, b"<html>sign in", True),
        (200, b"[]", True),
        (200, b'{"ok": false}', True),
    ],
)
def test_what_is_not_an_oauth_response_is_unavailable(status: int, body: bytes, maybe_processed: bool) -> None:  # F1
    with pytest.raises(AuthorizationServerUnavailable) as failed:
        read(status, body, headers={"retry-after": "17"})

    assert (failed.value.retry_after, failed.value.maybe_processed) == (17.0, maybe_processed)
    assert failed.value.server_retry_after == 17.0
    assert URL in str(failed.value)


def test_without_retry_after_there_is_no_server_retry_after() -> None:
    with pytest.raises(AuthorizationServerUnavailable) as failed:
        read(503, b"")
    assert (failed.value.retry_after, failed.value.server_retry_after) == (5.0, 0.0)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.lists(st.text(max_size=3))
MEMBERS = st.sampled_from(["access_token", "token_type", "expires_in", "refresh_token", "scope", "error", "ok"])


@given(st.integers(200, 599), st.dictionaries(MEMBERS, VALUES))
def test_arbitrary_responses_end_in_tokens_or_a_typed_error(status: int, members: dict[str, Any]) -> None:
    try:
        found = read(status, json.dumps({"access_token": "at", "token_type": "bearer", **members}).encode())
    except McpAuthProxyError:
        return
    assert found.access_token.isascii() and found.access_token.isprintable() and " " not in found.access_token


@given(st.binary(max_size=100))
def test_arbitrary_bodies_end_in_a_typed_error(body: bytes) -> None:
    with pytest.raises(McpAuthProxyError):
        read(200, body)


def test_tokens_are_not_in_a_repr() -> None:
    assert "canary" not in repr(read(access_token="canary-a", refresh_token="canary-r"))


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, b"<html>", "can't be used: HTTP 200, and it is not JSON (RFC 6749 §5.1)."),
        (200, b"", "can't be used: HTTP 200, and it is not JSON (RFC 6749 §5.1)."),
        (200, b"[]", "can't be used: HTTP 200, and it is not a JSON object (RFC 6749 §5.1)."),
        (400, b"no", "can't be used: HTTP 400, and it is not JSON (RFC 6749 §5.2)."),
        (403, b"{}", "can't be used: HTTP 403, and it is not an OAuth error (RFC 6749 §5.2)."),
        (503, b"", "can't be used now: HTTP 503."),
        (429, b"", "can't be used now: HTTP 429."),
        (400, b'{"error": "temporarily_unavailable"}', "can't be used now: temporarily_unavailable."),
    ],
)
def test_what_is_not_an_oauth_response_names_its_clause_and_says_now_only_if_waiting_may_help(
    status: int, body: bytes, words: str
) -> None:
    with pytest.raises(AuthorizationServerUnavailable) as caught:
        read(status, body)
    assert str(caught.value) == f"The token endpoint {URL} {words}"


@pytest.mark.parametrize(
    ("token_type", "words"),
    [(None, "it has no token_type"), ("", "it has no token_type"), ("mac", "its token_type is not Bearer")],
)
def test_a_missing_token_type_is_distinguished_from_a_wrong_one(token_type: str | None, words: str) -> None:
    with pytest.raises(DocumentRefused, match=rf"{words} \(RFC 6749 §5\.1\)"):
        read(token_type=token_type)


@pytest.mark.parametrize("name", ["refresh_token_expires_in", "refresh_expires_in"])
@pytest.mark.parametrize(("value", "lapses"), [(60, NOW + 60), ("60", NOW + 60), (0, None), (-5, None), ("x", None)])
def test_the_end_of_the_refresh_token_is_read(name: str, value: object, lapses: float | None) -> None:
    fields: dict[str, Any] = {name: value}
    assert read(refresh_token="rt", **fields).refresh_expires_at == lapses


def test_a_refresh_token_that_is_kept_keeps_its_end_and_a_new_one_has_its_own() -> None:
    before = read(refresh_token="rt", refresh_token_expires_in=60)
    assert read(previous=before).refresh_expires_at == before.refresh_expires_at == NOW + 60
    assert read(previous=before, refresh_token="other").refresh_expires_at is None
    assert read(previous=before, refresh_token_expires_in=90).refresh_expires_at == NOW + 90
