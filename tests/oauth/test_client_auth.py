"""Client authentication at the token endpoint."""

import base64
from urllib.parse import parse_qsl

import pytest

from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import ClientAuth, Registration, RegistrationKind
from mcp_auth_proxy.oauth import client_auth, revocation

FORM = [("grant_type", "x")]


def client(method: ClientAuth, secret: str | None = "p:w d/ü") -> Registration:
    return Registration(
        server="linear",
        issuer="https://as",
        client_id="https://c:1/é a",
        client_auth=method,
        kind=RegistrationKind.CONFIGURED,
        client_secret=secret,
    )


@pytest.mark.parametrize(
    ("supported", "configured", "has_secret", "expected"),
    [
        (None, None, False, ClientAuth.NONE),
        (("client_secret_basic",), None, False, ClientAuth.NONE),
        (None, None, True, ClientAuth.BASIC),
        (("client_secret_post", "client_secret_basic"), None, True, ClientAuth.BASIC),
        (("none", "client_secret_post"), None, True, ClientAuth.POST),
        (("private_key_jwt",), None, True, ClientAuth.BASIC),
        (("client_secret_basic",), ClientAuth.POST, True, ClientAuth.POST),
    ],
)
def test_the_method_is_as_configured_or_as_the_server_supports(
    supported: tuple[str, ...] | None, configured: ClientAuth | None, has_secret: bool, expected: ClientAuth
) -> None:
    assert client_auth.choose(supported, configured=configured, has_secret=has_secret) is expected


def test_a_public_client_sends_its_id() -> None:
    assert client_auth.authenticate(client(ClientAuth.NONE, None), FORM) == (
        [*FORM, ("client_id", "https://c:1/é a")],
        [],
    )


def test_post_puts_id_and_secret_into_the_form() -> None:
    fields, headers = client_auth.authenticate(client(ClientAuth.POST), FORM)

    assert (fields, headers) == ([*FORM, ("client_id", "https://c:1/é a"), ("client_secret", "p:w d/ü")], [])
    assert parse_qsl(client_auth.encode_form(fields).decode()) == fields


def test_basic_form_encodes_id_and_secret_first() -> None:
    fields, ((name, value),) = client_auth.authenticate(client(ClientAuth.BASIC), FORM)

    assert (fields, name) == (FORM, "Authorization")
    decoded = base64.b64decode(value.removeprefix("Basic ")).decode()
    assert decoded == "https%3A%2F%2Fc%3A1%2F%C3%A9%20a:p%3Aw%20d%2F%C3%BC"


def test_basic_can_include_client_id_in_the_form_but_never_the_secret() -> None:
    fields, headers = client_auth.authenticate(client(ClientAuth.BASIC), FORM, include_client_id=True)

    assert fields == [*FORM, ("client_id", "https://c:1/é a")]
    assert [name for name, _ in headers] == ["Authorization"]


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (401, b'{"error": "invalid_client"}', True),
        (400, b'{"error": "invalid_client"}', True),
        (400, b'{"error": "invalid_grant"}', False),
        (500, b'{"error": "invalid_client"}', False),
        (401, b'{"error": ["invalid_client"]}', False),
        (401, b"<html>", False),
    ],
)
def test_only_a_structured_error_counts_as_a_refusal_of_the_client(status: int, body: bytes, expected: bool) -> None:
    assert client_auth.is_error_response(status, body, "invalid_client") is expected


def test_a_missing_secret_is_an_error_that_names_the_key() -> None:
    with pytest.raises(AuthorizationError, match=r"servers\.linear\.oauth\.client_secret"):
        client_auth.authenticate(client(ClientAuth.BASIC, None), FORM)


def test_a_revocation_says_what_it_revokes() -> None:
    assert revocation.request("t", "refresh_token") == [("token", "t"), ("token_type_hint", "refresh_token")]
