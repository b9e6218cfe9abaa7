"""Becoming a client."""

import json
from typing import Any

import pytest
from mcp.shared.auth import OAuthClientInformationFull, OAuthClientMetadata

from mcp_auth_proxy.errors import (
    AuthorizationError,
    AuthorizationServerUnavailable,
    DocumentRefused,
    RegistrationImpossible,
)
from mcp_auth_proxy.models import ClientAuth
from mcp_auth_proxy.oauth import registration
from mcp_auth_proxy.oauth.discovery import ServerMetadata
from mcp_auth_proxy.oauth.registration import RegisteredClient

NATIVE = "http://127.0.0.1:8787/oauth/callback"
WEB = "https://proxy.example.com/oauth/callback"


def request(redirect_uri: str, methods: tuple[str, ...] | None) -> dict[str, Any]:
    metadata = ServerMetadata(
        issuer="https://as", token_endpoint="https://as/token", token_endpoint_auth_methods_supported=methods
    )
    asked = registration.method(metadata, redirect_uri=redirect_uri)
    found: dict[str, Any] = json.loads(registration.build_request(asked, redirect_uri=redirect_uri))
    return found


def chosen(methods: tuple[str, ...] | None, configured: ClientAuth) -> ClientAuth | None:
    metadata = ServerMetadata(
        issuer="https://as", token_endpoint="https://as/token", token_endpoint_auth_methods_supported=methods
    )
    return registration.method(metadata, redirect_uri=NATIVE, configured=configured, server="linear")


def response(status: int = 201, body: bytes | None = None, **members: Any) -> RegisteredClient:
    content = json.dumps({"client_id": "c", **members}).encode() if body is None else body
    return registration.read_response(status, content, url="https://as/register", server="linear")


def test_a_request_has_what_a_client_needs_and_no_scope() -> None:
    assert request(NATIVE, None) == {
        "client_name": "mcp-auth-proxy",
        "redirect_uris": [NATIVE],
        "grant_types": ["authorization_code", "refresh_token"],
        "response_types": ["code"],
        "application_type": "native",
    }


@pytest.mark.parametrize(
    ("redirect_uri", "methods", "expected"),
    [
        (NATIVE, ("client_secret_basic", "none"), "none"),
        (NATIVE, ("client_secret_basic", "client_secret_post"), "client_secret_post"),
        (WEB, ("client_secret_basic", "client_secret_post"), "client_secret_post"),
        (NATIVE, ("private_key_jwt", "client_secret_post"), "client_secret_post"),
        (NATIVE, ("private_key_jwt",), None),
        (WEB, ("none", "client_secret_post"), "client_secret_post"),
        (WEB, ("none",), "none"),
    ],
)
def test_an_authentication_method_that_the_server_lists_is_requested(
    redirect_uri: str, methods: tuple[str, ...], expected: str | None
) -> None:
    assert request(redirect_uri, methods).get("token_endpoint_auth_method") == expected


@pytest.mark.parametrize("methods", [None, (), ("none", "client_secret_basic", "client_secret_post")])
def test_the_configured_authentication_method_is_requested(methods: tuple[str, ...] | None) -> None:
    assert chosen(methods, ClientAuth.BASIC) is ClientAuth.BASIC


def test_a_configured_method_that_the_server_does_not_list_is_an_error_that_names_the_key() -> None:
    with pytest.raises(AuthorizationError) as refused:
        chosen(("client_secret_post", "private_key_jwt"), ClientAuth.BASIC)

    for word in ("servers.linear.oauth.client_auth", "client_secret_basic", "client_secret_post", "RFC 8414 §2"):
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("redirect_uri", "expected"),
    [(NATIVE, "native"), ("http://localhost:1/x", "native"), ("http://[::1]:1/x", "native"), (WEB, "web")],
)
def test_the_application_type_follows_the_redirect_uri(redirect_uri: str, expected: str) -> None:
    assert registration.application_type(redirect_uri) == expected


def test_the_sdk_reads_our_request() -> None:
    found = OAuthClientMetadata.model_validate(request(WEB, ("client_secret_post",)))

    assert (found.application_type, found.token_endpoint_auth_method, found.scope) == (
        "web",
        "client_secret_post",
        None,
    )


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, RegisteredClient("c", None, ClientAuth.NONE, None)),
        ({"client_secret": "s"}, RegisteredClient("c", "s", ClientAuth.BASIC, None)),
        ({"client_secret": "", "token_endpoint_auth_method": ""}, RegisteredClient("c", None, ClientAuth.NONE, None)),
        (
            {"client_secret": "s", "token_endpoint_auth_method": "client_secret_post", "client_secret_expires_at": 0},
            RegisteredClient("c", "s", ClientAuth.POST, None),
        ),
        (
            {"token_endpoint_auth_method": "none", "client_secret_expires_at": "17"},
            RegisteredClient("c", None, ClientAuth.NONE, 17.0),
        ),
        ({"client_secret": "s", "client_secret_expires_at": True}, RegisteredClient("c", "s", ClientAuth.BASIC, None)),
    ],
)
def test_a_response_is_read_as_the_sdk_reads_it(members: dict[str, Any], expected: RegisteredClient) -> None:
    assert response(**members) == expected
    assert OAuthClientInformationFull.model_validate({"client_id": "c", **members}).client_secret == expected[1]


def test_a_response_without_method_follows_what_the_server_lists() -> None:
    found = registration.read_response(
        201,
        b'{"client_id": "c", "client_secret": "s"}',
        url="https://as/register",
        server="linear",
        supported=("client_secret_post",),
    )

    assert found.client_auth is ClientAuth.POST


@pytest.mark.parametrize("asked", [ClientAuth.BASIC, ClientAuth.POST])
def test_a_response_without_method_means_the_requested_one(asked: ClientAuth) -> None:
    found = registration.read_response(
        201,
        b'{"client_id": "c", "client_secret": "s"}',
        url="https://as/register",
        server="linear",
        supported=("client_secret_post", "client_secret_basic"),
        requested=asked,
    )

    assert found.client_auth is asked


def test_a_client_that_was_registered_for_another_method_than_configured_is_refused() -> None:
    with pytest.raises(RegistrationImpossible, match=r"client_secret_basic, but servers\.linear\.oauth\.client_auth"):
        registration.read_response(
            201,
            b'{"client_id": "c", "client_secret": "s", "token_endpoint_auth_method": "client_secret_basic"}',
            url="https://as/register",
            server="linear",
            requested=ClientAuth.POST,
            configured=ClientAuth.POST,
        )


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b'{"error": "invalid_redirect_uri", "error_description": "no\\r\\n loopback"}'),
        (403, b"<html>"),
        (401, b"{}"),
        (404, b""),
        (201, b'{"client_id": "c", "token_endpoint_auth_method": "private_key_jwt"}'),
    ],
)
def test_a_refused_registration_names_the_keys(status: int, body: bytes) -> None:
    with pytest.raises(RegistrationImpossible) as refused:
        response(status, body)

    text = str(refused.value)
    assert "servers.linear.oauth.client_id" in text and "servers.linear.oauth.client_secret" in text
    assert "\n" not in text and "https://as/register" in text


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"{}",
        b'{"client_id": ""}',
        b'{"client_id": "a\\nb"}',
        b'{"client_id": 3}',
        b'{"client_id": "a", "client_id": "b"}',
        b'{"client_id": "c", "token_endpoint_auth_method": "client_secret_basic"}',
    ],
)
def test_a_malformed_registration_is_refused(body: bytes) -> None:
    with pytest.raises(DocumentRefused, match="client registration at https://as/register"):
        response(201, body)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_temporary_failure_of_registration_is_unavailable(status: int) -> None:
    with pytest.raises(AuthorizationServerUnavailable):
        response(status)


def test_a_registered_client_shows_no_secret() -> None:
    assert "s3cret" not in repr(response(client_secret="s3cret"))


def test_the_client_metadata_document_names_its_own_url() -> None:
    found = registration.client_metadata_document("https://proxy.example.com")

    assert found["client_id"] == "https://proxy.example.com/oauth/client-metadata.json"
    assert found["redirect_uris"] == [WEB]
    assert found["token_endpoint_auth_method"] == "none"
    assert OAuthClientMetadata.model_validate(found).application_type == "web"


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (404, b'{"error": "not found"}', True),
        (405, b"", True),
        (401, b"<html>", True),
        (403, b"{}", True),
        (403, b'{"error": "access_denied"}', False),
        (400, b'{"error": "invalid_redirect_uri"}', False),
        (201, b'{"client_id": "c"}', False),
        (503, b"", False),
    ],
)
def test_a_response_that_is_not_oauth_is_distinguished_from_a_refusal(status: int, body: bytes, expected: bool) -> None:
    assert registration.is_not_oauth(status, body) is expected
