"""The oauth section of a server, grant by grant."""

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from mcp_auth_proxy.config import signing_key
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.oauth import first_contact_warning
from mcp_auth_proxy.config.settings import OAuthSettings, Secret, ServerSettings, Settings
from mcp_auth_proxy.config.signing_key import PrivateKey
from mcp_auth_proxy.errors import ConfigurationError
from mcp_auth_proxy.models import ClientAuth, GrantType

ISSUER = "issuer: 'https://as.example'"
P256 = ec.generate_private_key(ec.SECP256R1())


def pem(key: PrivateKey | dsa.DSAPrivateKey, password: bytes | None = None) -> str:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption).decode()


def read(folder: Path, text: str) -> OAuthSettings:
    path = folder / "config.yaml"
    path.write_text(f"servers: {{a: {{url: 'https://a.example/mcp', oauth: {{{text}}}}}}}\n")
    return load(path, environ={"KEY": pem(P256), "ENCRYPTED": pem(P256, b"x"), "S": "s"}).servers["a"].oauth


def errors_of(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        read(folder, text)
    return [str(error).removeprefix("servers.a.oauth.") for error in caught.value.errors]


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (P256, "ES256"),
        (ec.generate_private_key(ec.SECP384R1()), "ES384"),
        (ec.generate_private_key(ec.SECP521R1()), "ES512"),
        (ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
        (rsa.generate_private_key(65537, 2048), "RS256"),
    ],
)
def test_a_key_signs_with_the_first_algorithm_that_it_supports(key: PrivateKey, algorithm: str) -> None:
    found = signing_key.read(pem(key))
    assert found.algorithm == algorithm
    assert signing_key.read(pem(key), algorithm) == found or found.key is not key


def test_an_rsa_key_signs_with_the_configured_algorithm() -> None:
    assert signing_key.read(pem(rsa.generate_private_key(65537, 2048)), "PS384").algorithm == "PS384"


def test_a_private_key_is_read_and_never_shown(tmp_path: Path) -> None:
    (tmp_path / "client.pem").write_text(pem(P256))
    found = read(tmp_path, "client_id: a, client_auth: private_key_jwt, private_key: 'file:client.pem'")
    assert found.client_auth is ClientAuth.PRIVATE_KEY_JWT
    assert found.private_key is not None
    assert found.private_key.algorithm == "ES256"
    assert repr(found.private_key) == "SigningKey(algorithm='ES256')"
    assert "PrivateKey object" not in repr(found)  # T45


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("client_id: a, client_auth: private_key_jwt", "private_key: is needed with client_auth private_key_jwt"),
        ("private_key: 'env:KEY'", "private_key: needs a client_id"),
        ("client_auth: private_key_jwt, private_key: 'env:KEY'", "client_id: is needed with client_auth"),
        ("client_id: a, client_auth: none, private_key: 'env:KEY'", "private_key: has no effect with client_auth none"),
        ("client_id: a, client_secret: s, private_key: 'env:KEY'", "private_key: there is a client_secret too"),
        ("client_id: a, private_key: 'env:KEY', signing_alg: RS256", "private_key: can't sign with RS256: this key is"),
        ("client_id: a, private_key: 'env:KEY', signing_alg: HS256", "signing_alg: must be one of RS256"),
        ("client_id: a, private_key: 'env:S'", "private_key: is not a private key in PEM form"),
        ("client_id: a, private_key: 'env:ENCRYPTED'", "private_key: is encrypted"),
        ("client_id: a, private_key: 'file:none.pem'", "private_key: the file"),
        ("signing_alg: ES256", "signing_alg: needs a private_key"),
    ],
)
def test_a_key_that_cannot_be_used_is_an_error(tmp_path: Path, text: str, found: str) -> None:
    assert [error for error in errors_of(tmp_path, text) if error.startswith(found)]


@pytest.mark.parametrize(
    "key",
    [rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP256K1()), dsa.generate_private_key(2048)],
)
def test_weak_and_unsuitable_keys_are_refused(key: PrivateKey | dsa.DSAPrivateKey) -> None:
    with pytest.raises(ValueError, match=r"^is "):
        signing_key.read(pem(key))


def test_the_assertion_file_of_a_workload_need_not_exist_yet(tmp_path: Path) -> None:
    found = read(tmp_path, f"grant: jwt_bearer, {ISSUER}, assertion: 'file:tokens/mcp'")
    assert (found.grant, found.assertion) == (GrantType.JWT_BEARER, tmp_path / "tokens/mcp")
    assert read(tmp_path, f"grant: jwt_bearer, {ISSUER}, assertion: 'env:S'").assertion == Secret("s")


def test_an_identity_provider_is_read(tmp_path: Path) -> None:
    idp = "issuer: 'https://idp.example', client_id: i, client_secret: 'env:S', id_token: 'file:id'"
    found = read(tmp_path, f"grant: id_jag, {ISSUER}, client_id: a, client_secret: 'env:S', idp: {{{idp}}}")
    assert found.idp is not None
    assert (found.idp.issuer, found.idp.token_endpoint) == ("https://idp.example", None)
    assert (found.idp.client_id, found.idp.client_secret) == ("i", Secret("s"))
    assert (found.idp.id_token, found.idp.refresh_token) == (tmp_path / "id", None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("grant: jwt_bearer", "assertion: is needed with grant jwt_bearer"),
        ("grant: jwt_bearer, assertion: eyJhbGciOi", "assertion: must be file:PATH"),
        ("grant: jwt_bearer, assertion: 'env:NONE'", "assertion: the environment variable"),
        ("assertion: 'file:x'", "assertion: is for grant jwt_bearer only"),
        ("grant: id_jag, client_id: a", "idp: is needed with grant id_jag"),
        ("grant: id_jag, idp: {}", "client_id: is needed with grant id_jag"),
        ("grant: id_jag, client_id: a, idp: {client_id: i}", "idp.issuer: is needed, or token_endpoint"),
        ("grant: id_jag, client_id: a, idp: {issuer: 'https://i.example'}", "idp.client_id: is needed"),
        ("grant: id_jag, client_id: a, idp: {client_id: i}", "idp.id_token: is needed, or refresh_token"),
        (
            "grant: id_jag, client_id: a, idp: {id_token: 'env:S', refresh_token: 'env:S'}",
            "idp.id_token: is needed, or",
        ),
        ("grant: id_jag, client_id: a, idp: {client_id: i, secret: x}", "idp.secret: unknown key"),
        ("grant: id_jag, client_id: a, idp: {client_auth: client_secret_post}", "idp.client_auth: client_secret_post"),
        ("idp: {client_id: i}", "idp: is for grant id_jag only"),
        ("grant: token_exchange", "client_id: is needed with grant token_exchange"),
        ("grant: token_exchange, client_id: a", "issuer: is needed with grant token_exchange, or metadata"),
        (f"grant: token_exchange, client_id: a, {ISSUER}", "grant: token_exchange needs jwt in inbound.mode"),
        (
            "grant: device_code, metadata: {token_endpoint: 'https://a.example'}",
            "metadata.device_authorization_endpoint: is needed",
        ),
    ],
)
def test_a_missing_key_that_the_grant_needs_is_an_error(tmp_path: Path, text: str, found: str) -> None:
    assert [error for error in errors_of(tmp_path, text) if error.startswith(found)]


@pytest.mark.parametrize(
    "text",
    [
        "grant: jwt_bearer, assertion: 'env:S'",
        "grant: id_jag, client_id: a, idp: {issuer: 'https://i.example', client_id: i, id_token: 'env:S'}",
    ],
)
def test_a_workload_names_its_authorization_server(tmp_path: Path, text: str) -> None:
    # T84
    (found,) = errors_of(tmp_path, text)
    assert found.startswith("issuer: is needed with grant ")
    assert "metadata" in found
    assert read(tmp_path, f"{text}, {ISSUER}").pinned
    assert read(tmp_path, f"{text}, metadata: {{token_endpoint: 'https://as.example/t'}}").pinned
    assert errors_of(tmp_path, f"{text}, issuer: null") == [found]


def test_only_client_credentials_without_an_issuer_are_warned_of(tmp_path: Path) -> None:
    # T84
    client = "grant: client_credentials, client_id: a, client_auth: none"
    servers = {"a": ServerSettings(name="a", url="https://a.example/mcp", oauth=read(tmp_path, client))}
    warning = first_contact_warning(servers)
    assert warning is not None
    assert warning.startswith("servers.a.oauth.issuer: ")
    for text in (f"{client}, {ISSUER}", f"{client}, metadata: {{{STATIC}}}", "client_id: a"):
        servers["a"] = replace(servers["a"], oauth=read(tmp_path, text))
        assert first_contact_warning(servers) is None
    many = {str(number): replace(servers["a"], name=str(number), oauth=read(tmp_path, client)) for number in range(99)}
    assert len(first_contact_warning(many) or "") < 1000


def test_an_error_never_repeats_a_key_or_an_assertion(tmp_path: Path) -> None:
    assert "eyJhbGciOi" not in "".join(errors_of(tmp_path, "grant: jwt_bearer, assertion: eyJhbGciOi"))  # T45


def test_parameters_of_the_protocol_can_not_be_configured(tmp_path: Path) -> None:
    assert read(tmp_path, "token_params: {audience: x, organization: o}").token_params == {
        "audience": "x",
        "organization": "o",
    }
    for name in ("grant_type", "scope", "resource", "client_secret", "refresh_token", "assertion", "device_code"):
        found = errors_of(tmp_path, f"token_params: {{{name}: x}}")
        assert len(found) == 1
        assert found[0].startswith(f"token_params.{name}: is set by the proxy itself")


def test_an_audience_of_assertions_needs_a_key(tmp_path: Path) -> None:
    client = "client_id: a, private_key: 'env:KEY', client_assertion_audience"
    assert read(tmp_path, f"{client}: endpoint").client_assertion_audience == "endpoint"
    assert errors_of(tmp_path, f"{client}: other")[0].startswith("client_assertion_audience: must be one of")
    assert errors_of(tmp_path, "client_assertion_audience: endpoint") == [
        "client_assertion_audience: needs a private_key"
    ]


STATIC = "authorization_endpoint: https://as.example/a, token_endpoint: https://as.example/t"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("issuer: 'http://as.example'", "issuer"),
        (f"metadata: {{issuer: 'http://as.example', {STATIC}}}", "metadata.issuer"),
        ("metadata: {authorization_endpoint: https://a.example/a, token_endpoint: 'http://a.example/t'}", None),
        (f"metadata: {{registration_endpoint: 'http://10.0.0.1/r', {STATIC}}}", "metadata.registration_endpoint"),
        (f"metadata: {{revocation_endpoint: 'http://10.0.0.1/r', {STATIC}}}", "metadata.revocation_endpoint"),
        (
            f"grant: id_jag, {ISSUER}, client_id: a, idp: {{issuer: 'http://i.example', client_id: b, "
            "id_token: env:S}",
            "idp.issuer",
        ),
        (
            f"grant: id_jag, {ISSUER}, client_id: a, idp: {{token_endpoint: 'http://i.example/t', client_id: b, "
            "id_token: env:S}",
            "idp.token_endpoint",
        ),
    ],
)
def test_http_elsewhere_than_on_loopback_is_an_error_as_it_would_be_at_discovery(
    tmp_path: Path, text: str, path: str | None
) -> None:
    (error,) = errors_of(tmp_path, text)
    assert error.startswith(f"{path or 'metadata.token_endpoint'}: must be https")


def with_http(folder: Path, url: str, allow_http: str, oauth: str) -> Settings:
    path = folder / "config.yaml"
    path.write_text(f"servers: {{a: {{url: '{url}', allow_http: {allow_http}, oauth: {{{oauth}}}}}}}\n")
    return load(path, environ={})


@pytest.mark.parametrize(
    "oauth", ["issuer: 'http://mcp.svc:81/x'", f"metadata: {{issuer: 'http://mcp.svc:81', {STATIC}}}"]
)
def test_the_origin_of_a_server_with_allow_http_may_be_its_issuer_and_no_other_may(tmp_path: Path, oauth: str) -> None:
    with_http(tmp_path, "http://mcp.svc:81/mcp", "true", oauth)
    for url, allow_http in (("http://mcp.svc/mcp", "true"), ("https://mcp.svc:81/mcp", "true")):
        with pytest.raises(ConfigurationError, match=r"issuer: must be https"):
            with_http(tmp_path, url, allow_http, oauth)
    with pytest.raises(ConfigurationError, match=r"issuer: must be https"):
        with_http(tmp_path, "http://mcp.svc:81/mcp", "false", oauth)


@pytest.mark.parametrize(
    "text",
    [
        "issuer: 'http://127.0.0.1:9000'",
        "issuer: 'http://localhost:9000/tenant'",
        "metadata: {authorization_endpoint: 'http://[::1]:1/a', token_endpoint: 'http://localhost:1/t'}",
        f"metadata: {{op_policy_uri: 'http://as.example/policy', {STATIC}}}",
        f"metadata: {{introspection_endpoint: 'http://10.0.0.1/i', {STATIC}}}",
    ],
)
def test_http_on_loopback_and_for_unused_urls_is_not_an_error(tmp_path: Path, text: str) -> None:
    read(tmp_path, text)
