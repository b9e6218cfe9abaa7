"""private_key_jwt: the assertion that replaces a secret."""

import dataclasses

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from mcp_auth_proxy.config.signing_key import PrivateKey, SigningKey
from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import ClientAuth, Registration, RegistrationKind
from mcp_auth_proxy.oauth import client_assertion, client_auth

NOW = 1_800_000_000.7
KEY = SigningKey(ec.generate_private_key(ec.SECP256R1()), "ES256")
CLIENT = Registration(
    server="linear",
    issuer="https://as.example/Tenant/",
    client_id="agent",
    client_auth=ClientAuth.PRIVATE_KEY_JWT,
    kind=RegistrationKind.CONFIGURED,
)


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (ec.generate_private_key(ec.SECP256R1()), "ES256"),
        (ec.generate_private_key(ec.SECP521R1()), "ES512"),
        (rsa.generate_private_key(65537, 2048), "RS256"),
        (rsa.generate_private_key(65537, 2048), "PS256"),
        (ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
    ],
)
def test_the_assertion_is_signed_by_the_key_and_short_lived(key: PrivateKey, algorithm: str) -> None:
    text = client_assertion.build(SigningKey(key, algorithm), client_id="agent", audience="https://as", now=NOW)
    claims = jwt.decode(
        text,
        key.public_key(),
        algorithms=[algorithm],
        audience="https://as",
        options={"verify_exp": False, "verify_iat": False},
    )
    assert (claims["iss"], claims["sub"], claims["iat"]) == ("agent", "agent", 1_800_000_000)
    assert 0 < claims["exp"] - claims["iat"] <= 300


def test_no_two_assertions_share_a_jti() -> None:
    made = [client_assertion.build(KEY, client_id="a", audience="https://as", now=NOW) for _ in range(50)]
    assert len({jwt.decode(text, options={"verify_signature": False})["jti"] for text in made}) == 50


def test_the_audience_is_the_issuer_as_spelled_and_no_client_id_is_sent() -> None:
    fields, headers = client_auth.authenticate(CLIENT, [("grant_type", "x")], key=KEY, now=NOW)
    sent = dict(fields)
    assert (headers, set(sent)) == ([], {"grant_type", "client_assertion_type", "client_assertion"})
    assert sent["client_assertion_type"] == "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
    claims = jwt.decode(sent["client_assertion"], options={"verify_signature": False})
    assert claims["aud"] == "https://as.example/Tenant/"


def test_a_missing_key_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(AuthorizationError, match=r"servers\.linear\.oauth\.private_key"):
        client_auth.authenticate(CLIENT, [])


def test_a_client_with_a_key_and_no_secret_uses_private_key_jwt() -> None:
    assert client_auth.choose(None, configured=None, has_secret=False, has_key=True) is ClientAuth.PRIVATE_KEY_JWT
    assert client_auth.choose(None, configured=None, has_secret=True, has_key=True) is ClientAuth.BASIC


def test_a_workload_without_a_client_id_sends_none() -> None:
    nobody = dataclasses.replace(CLIENT, client_id="", client_auth=ClientAuth.NONE)
    assert client_auth.authenticate(nobody, [("a", "b")]) == ([("a", "b")], [])
