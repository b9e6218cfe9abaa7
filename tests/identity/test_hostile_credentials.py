"""Whatever stands in the fields of a request, or in a key set: it is refused, and nothing else happens."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.errors import AuthorizationError, CallerRefused
from mcp_auth_proxy.identity.credentials import Credential, read_credential
from mcp_auth_proxy.identity.key_sets import read_key_set
from mcp_auth_proxy.identity.tokens import MAX_TOKEN, Token
from mcp_auth_proxy.oauth.fetch import Response

NAMES = st.sampled_from([b"authorization", b"x-api-key", b"host"])
VALUES = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda scheme, rest: scheme + b" " + rest, st.sampled_from([b"Bearer", b"basic"]), st.binary(max_size=60)
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
CLAIMS = st.dictionaries(st.sampled_from(["iss", "aud", "exp", "nbf", "iat", "sub", "cnf"]), JSON)
HEADERS = st.dictionaries(st.sampled_from(["alg", "kid", "typ", "jku", "crit"]), JSON | st.just("RS256"))


def part(value: object) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")


@given(st.lists(st.tuples(NAMES, VALUES), max_size=3), st.booleans(), st.booleans())
def test_any_fields_are_one_credential_none_or_refused(
    fields: list[tuple[bytes, bytes]], keys: bool, jwts: bool
) -> None:
    try:
        found = read_credential(fields, "192.0.2.1", keys=keys, jwts=jwts, header=None)
    except CallerRefused as error:
        assert error.status == 400
        return
    assert found is None or isinstance(found, Credential)
    if not keys and not jwts:
        assert found is None


@given(HEADERS, CLAIMS, st.binary(max_size=12))
def test_any_token_is_parsed_or_refused(header: object, claims: object, signature: bytes) -> None:
    encoded = b".".join([part(header), part(claims), base64.urlsafe_b64encode(signature).rstrip(b"=") or b"AA"])
    try:
        token = Token(encoded)
        token.check_claims("https://idp.example", "p", now=0.0)
    except CallerRefused as error:
        assert error.status == 401


@given(st.binary(max_size=80))
def test_any_bytes_are_refused_as_a_token(encoded: bytes) -> None:
    with pytest.raises(CallerRefused):
        Token(encoded)


@pytest.mark.parametrize(
    "payload", [b"[" * 6000, b'{"a":' * 1000, b'{"iss":"a","iss":"b"}', b'{"exp":NaN}', b"null", b"\xff", b"9" * 6000]
)
def test_json_that_is_no_object_is_refused(payload: bytes) -> None:
    encoded = base64.urlsafe_b64encode(payload).rstrip(b"=")
    with pytest.raises(CallerRefused):
        Token(part({"alg": "RS256"}) + b"." + encoded + b".AA")


def test_a_token_that_is_too_long_is_refused() -> None:
    head = part({"alg": "RS256"}) + b"." + part({}) + b"."
    longest = (MAX_TOKEN - len(head)) // 4 * 4
    assert Token(head + b"A" * longest).signature
    with pytest.raises(CallerRefused):
        Token(head + b"A" * (longest + 4))


@given(st.lists(JSON | st.dictionaries(st.sampled_from(["kty", "crv", "x", "y", "n", "e", "kid", "use", "alg"]), JSON)))
def test_any_key_set_is_read_or_refused(keys: list[object]) -> None:
    body = json.dumps({"keys": keys}).encode()
    with pytest.raises(AuthorizationError):
        read_key_set(Response(status=200, headers={}, body=body, url="https://idp.example/keys"))
