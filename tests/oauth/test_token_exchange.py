"""Token exchange, the ID-JAG, and assertions as grants."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.errors import AuthorizationServerUnavailable, DocumentRefused, TokenRefused
from mcp_auth_proxy.oauth import jwt_bearer, token_exchange
from mcp_auth_proxy.oauth.token_exchange import IdJag, SubjectToken, TokenType

IDP = "https://idp.example/token"
ID_JAG = "urn:ietf:params:oauth:token-type:id-jag"
GOOD: dict[str, object] = {"access_token": "aaa.bbb.ccc", "issued_token_type": ID_JAG, "token_type": "N_A"}


def read(status: int = 200, **changes: object) -> IdJag:
    return token_exchange.read_id_jag(status, {}, json.dumps({**GOOD, **changes}).encode(), url=IDP)


def test_a_callers_token_is_exchanged_for_one_resource() -> None:
    form = token_exchange.request(SubjectToken("caller"), resource="https://mcp.example/mcp", scopes=("a", "b"))
    assert form == [
        ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
        ("requested_token_type", "urn:ietf:params:oauth:token-type:access_token"),
        ("subject_token", "caller"),
        ("subject_token_type", "urn:ietf:params:oauth:token-type:access_token"),
        ("scope", "a b"),
        ("resource", "https://mcp.example/mcp"),
    ]
    assert (
        dict(token_exchange.request(SubjectToken("caller"), resource="", scopes=()))
        .keys()
        .isdisjoint({"resource", "scope"})
    )


def test_an_id_jag_is_requested_with_the_issuer_as_audience() -> None:
    user = SubjectToken("id", TokenType.ID_TOKEN)
    form = dict(token_exchange.id_jag_request(user, audience="https://as", resource="https://mcp", scopes=("a",)))
    assert (form["audience"], form["resource"], form["scope"]) == ("https://as", "https://mcp", "a")
    assert form["requested_token_type"] == ID_JAG
    assert form["subject_token_type"] == "urn:ietf:params:oauth:token-type:id_token"


def test_the_id_jag_and_its_scopes_are_read() -> None:
    assert read() == IdJag("aaa.bbb.ccc", None)
    assert read(scope="read") == IdJag("aaa.bbb.ccc", ("read",))
    assert "aaa" not in repr(read())  # T45


@pytest.mark.parametrize(
    "changes",
    [
        {"issued_token_type": "urn:ietf:params:oauth:token-type:access_token"},
        {"issued_token_type": None},
        {"access_token": None},
        {"access_token": "opaque"},
        {"access_token": "a.b.c\r\nx: y"},
        {"access_token": "a." * 20_000},
    ],
)
def test_anything_else_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(DocumentRefused, match=r"RFC 8693 §2\.2\.1"):
        read(200, **changes)


def test_errors_are_those_of_a_token_endpoint() -> None:
    with pytest.raises(TokenRefused, match="invalid_grant"):
        read(400, error="invalid_grant")
    with pytest.raises(AuthorizationServerUnavailable):
        read(503)


def test_a_subject_token_that_an_error_repeats_is_masked() -> None:  # T45
    body = json.dumps({"error": "invalid_grant", "error_description": "bad token short-id-token"}).encode()
    with pytest.raises(TokenRefused) as caught:
        token_exchange.read_id_jag(400, {}, body, url=IDP, secrets=["short-id-token"])
    assert "short-id-token" not in str(caught.value)


def test_an_assertion_is_sent_with_resource_and_scopes() -> None:
    assert jwt_bearer.request("a.b.c", resource="https://mcp", scopes=("r",)) == [
        ("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer"),
        ("assertion", "a.b.c"),
        ("scope", "r"),
        ("resource", "https://mcp"),
    ]
    assert len(jwt_bearer.request("a.b.c", resource="", scopes=())) == 2


@given(st.text(max_size=40))
def test_a_text_that_passes_as_a_jwt_is_safe_in_a_header_and_has_parts(text: str) -> None:
    if jwt_bearer.is_jwt(text):
        assert text.isascii()
        assert text.isprintable()
        assert text.count(".") >= 2
