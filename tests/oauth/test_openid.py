"""Sign-in with OpenID Connect: what is asked for, and what of the answers is believed."""

from collections.abc import Sequence
from urllib.parse import parse_qs, urlsplit

import pytest

from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, CallbackRefused
from mcp_auth_proxy.oauth import openid

ISSUER = "https://idp.example"


def test_the_request_has_nonce_and_pkce_and_keeps_the_query_of_the_endpoint() -> None:
    url = openid.authentication_url(
        "https://idp.example/authorize?tenant=a&state=evil",
        client_id="proxy",
        redirect_uri="https://proxy.example/sign-in/callback",
        scopes=("openid", "email"),
        state="S",
        nonce="N",
        code_verifier="v" * 43,
    )
    query = parse_qs(urlsplit(url).query)
    assert query.pop("code_challenge") != ["v" * 43]
    assert query == {
        "tenant": ["a"],
        "response_type": ["code"],
        "client_id": ["proxy"],
        "redirect_uri": ["https://proxy.example/sign-in/callback"],
        "scope": ["openid email"],
        "state": ["S"],
        "nonce": ["N"],
        "code_challenge_method": ["S256"],
    }


@pytest.mark.parametrize(
    ("claims", "supported", "scopes"),
    [
        ((), None, ("openid",)),
        (("sub", "groups"), ("openid", "groups", "offline_access"), ("openid", "groups")),
        (("email",), ("email", "profile", "openid"), ("openid", "profile", "email")),
    ],
)
def test_only_scopes_that_the_provider_lists_are_asked_for(
    claims: Sequence[str], supported: tuple[str, ...] | None, scopes: tuple[str, ...]
) -> None:
    assert openid.scopes_for(claims, supported) == scopes


def test_a_response_from_the_issuer_has_a_code() -> None:
    params = {"code": ["C"], "state": ["S"], "iss": [ISSUER]}
    assert openid.check_response(params, issuer=ISSUER, iss_supported=True) == "C"
    del params["iss"]
    assert openid.check_response(params, issuer=ISSUER, iss_supported=False) == "C"


@pytest.mark.parametrize(
    "params",
    [
        {"code": ["C"]},
        {"code": ["C"], "iss": [f"{ISSUER}/"]},
        {"code": ["C", "D"], "iss": [ISSUER]},
        {"code": ["C"], "iss": [ISSUER, ISSUER]},
        {"iss": [ISSUER]},
        {"code": ["\u00e4"], "iss": [ISSUER]},
        {"code": ["x" * 5000], "iss": [ISSUER]},
        {"error": ["access_denied"], "iss": ["https://evil.example"]},
    ],
)
def test_every_other_response_is_refused(params: dict[str, list[str]]) -> None:
    with pytest.raises(CallbackRefused):
        openid.check_response(params, issuer=ISSUER, iss_supported=True)


def test_an_error_of_the_provider_is_told() -> None:
    params = {"error": ["access_denied"], "error_description": ["You said no."]}
    with pytest.raises(AuthorizationDenied, match="You said no"):
        openid.check_response(params, issuer=ISSUER, iss_supported=False)


@pytest.mark.parametrize("answer", [{}, {"id_token": None}, {"id_token": 1}, {"id_token": "\u00e4"}])
def test_a_token_response_without_an_id_token_is_refused(answer: dict[str, object]) -> None:
    with pytest.raises(AuthorizationError, match="id_token"):
        openid.id_token(answer, issuer=ISSUER)
    assert openid.id_token({"id_token": "a.b.c"}, issuer=ISSUER) == "a.b.c"


@pytest.mark.parametrize(
    ("claims", "good"),
    [
        ({"aud": "proxy", "nonce": "N"}, True),
        ({"aud": ["proxy"], "nonce": "N", "azp": "proxy"}, True),
        ({"aud": ["proxy", "other"], "nonce": "N", "azp": "proxy"}, True),
        ({"aud": ["proxy", "other"], "nonce": "N"}, False),
        ({"aud": "proxy", "nonce": "N", "azp": "other"}, False),
        ({"aud": "proxy", "nonce": "M"}, False),
        ({"aud": "proxy"}, False),
    ],
)
def test_an_id_token_is_for_this_client_and_this_request(claims: dict[str, object], good: bool) -> None:
    assert openid.is_for(claims, client_id="proxy", nonce="N") is good
