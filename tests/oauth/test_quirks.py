"""Token responses of providers that deviate from the standard."""

import json
from typing import Any

import pytest

from mcp_auth_proxy.errors import AuthorizationServerUnavailable, DocumentRefused, TokenRefused
from mcp_auth_proxy.models import TokenSet
from mcp_auth_proxy.oauth import token_endpoint
from mcp_auth_proxy.oauth.oauth_error import TokenRequestContext

URL = "https://slack.example/api/token"


def read(answer: dict[str, Any], status: int = 200, context: TokenRequestContext | None = None) -> TokenSet:
    body = json.dumps(answer).encode()
    return token_endpoint.read_tokens(status, {}, body, url=URL, now=0.0, requested_scopes=("x",), context=context)


@pytest.mark.parametrize(
    ("own", "standard"),
    [
        ("bad_verification_code", "invalid_grant"),
        ("bad_refresh_token", "invalid_grant"),
        ("incorrect_client_credentials", "invalid_client"),
        ("invalid_refresh_token", "invalid_grant"),
        ("bad_client_secret", "invalid_client"),
        ("something_else", "something_else"),
    ],
)
def test_a_providers_name_for_a_standard_error_counts_as_that_error_and_is_shown(own: str, standard: str) -> None:
    with pytest.raises(TokenRefused, match=own) as caught:
        read({"ok": False, "error": own})
    assert caught.value.error == standard


def test_a_temporary_error_is_tried_again() -> None:
    with pytest.raises(AuthorizationServerUnavailable, match="ratelimited"):
        read({"ok": False, "error": "ratelimited"})


def test_a_users_token_is_found_in_authed_user() -> None:
    user = {"id": "U1", "access_token": "xoxp-1", "token_type": "user", "scope": "a,b", "refresh_token": "xoxe-1"}
    tokens = read({"ok": True, "authed_user": user})
    assert (tokens.access_token, tokens.token_type, tokens.refresh_token) == ("xoxp-1", "Bearer", "xoxe-1")
    assert tokens.scopes == ("a", "b")


def test_scopes_are_taken_from_the_same_users_token_only() -> None:
    answer = {"ok": True, "access_token": "xoxp-1", "token_type": "user", "scope": ""}
    same = {"access_token": "xoxp-1", "scope": "a,b"}
    assert read({**answer, "authed_user": same}).scopes == ("a", "b")
    assert read({**answer, "authed_user": {**same, "access_token": "xoxp-2"}}).scopes == ()


@pytest.mark.parametrize(
    "answer",
    [
        {"ok": True, "access_token": "xoxb-1", "token_type": "bot", "authed_user": {"access_token": "xoxp-1"}},
        {"ok": True, "authed_user": []},
        {"ok": True, "authed_user": {"access_token": "a\r\nb", "token_type": "user"}},
        {"access_token": "at", "token_type": "user"},
        {"ok": 1, "access_token": "at", "token_type": "user"},
    ],
)
def test_other_responses_are_unchanged(answer: dict[str, Any]) -> None:  # T22 T23
    with pytest.raises(DocumentRefused):
        read(answer)


@pytest.mark.parametrize(
    ("error", "description", "key"),
    [
        ("invalid_target", "", "resource"),
        ("invalid_request", "AADSTS901002: The 'resource' request parameter is not supported.", "resource"),
        ("invalid_request", "The resource parameter is unknown", "resource"),
        ("invalid_scope", "no such scope", "scopes"),
    ],
)
def test_an_error_names_the_key_that_it_is_about(error: str, description: str, key: str) -> None:
    context = TokenRequestContext(server="notes", resource="https://mcp.example/mcp", scopes=("read",))
    with pytest.raises(TokenRefused, match=rf"servers\.notes\.oauth\.{key}\b") as caught:
        read({"error": error, "error_description": description}, 400, context)
    assert caught.value.hint is not None
    assert caught.value.hint.key == f"oauth.{key}"


def test_an_error_about_a_resource_that_was_not_sent_names_no_key() -> None:
    with pytest.raises(TokenRefused) as caught:
        read({"error": "invalid_target"}, 400, TokenRequestContext(server="notes"))
    assert "oauth.resource" not in str(caught.value)
