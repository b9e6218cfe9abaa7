"""Secrets are masked whatever wrote them, and text without secrets stays readable."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.observability.redaction import redact

CANARY = "cAnArY-0123456789.abc_DEF~x"
PARAMETERS = [
    "access_token",
    "refresh_token",
    "id_token",
    "id_token_hint",
    "subject_token",
    "actor_token",
    "token",
    "code",
    "user_code",
    "device_code",
    "code_verifier",
    "client_secret",
    "client_assertion",
    "assertion",
    "state",
    "password",
    "registration_access_token",
]

SHAPES = [
    "GET https://as.example/token?{name}={canary} 200",
    "https://as.example/cb?a=1&{name}={canary}&iss=x",
    "https://as.example/cb#{name}={canary}",
    "next=https%3A%2F%2Fas.example%2Fcb%3F{name}%3D{canary}%26a%3D1",
    "grant_type=refresh_token&{name}={canary}",
    '{{"{name}":"{canary}","a":1}}',
    '{{"{name}" : "{canary}"}}',
    '{{\n  "{name}": "{canary}"\n}}',
    '"{{\\"{name}\\":\\"{canary}\\"}}"',
    "{{'{name}': '{canary}', 'a': 1}}",
    "[('{name}', '{canary}')]",
    "[(b'{name}', b'{canary}')]",
    "Form(grant='x', {name}='{canary}')",
    '{name}="{canary}"',
    '{name}="two words {canary}"',
    "{NAME}={canary}",
    '{{"{name}":"with \\" and {canary}"}}',
]


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_value_of_a_secret_parameter_is_masked(shape: str, name: str) -> None:  # T45
    line = shape.format(name=name, NAME=name.upper(), canary=CANARY)
    shown = redact(line)
    assert CANARY not in shown
    assert "cAnArY" not in shown
    assert name in shown.lower()


@pytest.mark.parametrize(
    "line",
    [
        f"Authorization: Bearer {CANARY}",
        f"authorization: Basic {CANARY}==",
        f"authorization: DPoP {CANARY}",
        f"authorization: {CANARY}",
        f"Proxy-Authorization: Basic {CANARY}",
        f"(b'authorization', b'Bearer {CANARY}')",
        f"[('authorization', 'Custom {CANARY}')]",
        f"{{'Authorization': 'Bearer {CANARY}'}}",
        f"bearer {CANARY} was refused",
        f"Cookie: mcp_auth_flow_1a={CANARY}; other={CANARY}",
        f"set-cookie: mcp_auth_flow_1a={CANARY}; Path=/; HttpOnly",
        f"[(b'cookie', b'a={CANARY}; b=1'), (b'accept', b'*/*')]",
        f"DPoP: {CANARY}",
        f"X-Api-Key: {CANARY}",
        f"client_secret: {CANARY}",
        f"password: {CANARY}",
        f"refresh_token is {CANARY[:0]}access_token: {CANARY}",
        "token=" + "\\" * 15 + f'"{CANARY}',
        "token=" + "\\" * 40 + f'"{CANARY} and {CANARY}',
        f"https://user:{CANARY}@as.example/token",
        f"postgresql://proxy:{CANARY}@db/proxy",
        "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJjQW5BclkifQ.c2lnbmF0dXJlLWNBbkFyWQ was refused",
    ],
)
def test_a_credential_in_another_place_is_masked(line: str) -> None:  # T45
    shown = redact(line)
    assert "cAnArY" not in shown
    assert "eyJzdWI" not in shown
    assert "****" in shown


@pytest.mark.parametrize(
    "line",
    [
        "GET https://as.example/token 200",
        "the token endpoint answered status code: 200",
        "the token endpoint answered with code 200, not JSON",
        "server linear answered HTTP 401",
        '{"jsonrpc":"2.0","id":1,"error":{"code":-32001,"message":"no"}}',
        "the state of the flow is pending",
        "state: pending, token: dead, code: unknown",
        "invalid_grant: the refresh token has expired",
        "token_type=Bearer expires_in=3600",
        "tokens=5 barcode=7 stateful=yes max_tokens=9",
        "Bearer tokens are refused there",
        "Basic authentication failed",
        'WWW-Authenticate: Bearer resource_metadata="https://mcp.example/.well-known/oauth-protected-resource"',
        'WWW-Authenticate: Bearer realm="x", error="insufficient_scope", scope="read write"',
        "server linear needs your authorization, open this link: http://127.0.0.1:8787/connect/linear?flow=Ab3-_9",
        "servers.linear.oauth.client_secret must be a text",
        "it can't be authorized: the authorization server said no",
        "https://as.example:8443/path@2?x=y",
        "the password grant is not offered",
    ],
)
def test_text_without_secrets_is_unchanged(line: str) -> None:
    assert redact(line) == line


@given(
    st.text(alphabet="abc&=\"'\\:,;{}[]() \n%3D", max_size=20),
    st.sampled_from(PARAMETERS),
    st.sampled_from(["=", '":"', '": "', "': '", "%3D"]),
)
def test_a_canary_is_masked_in_any_surroundings(before: str, name: str, separator: str) -> None:  # T45
    quote = separator[-1] if separator[-1] in "\"'" else ""
    opening = separator[0] if quote else ""
    line = f"{before} {opening}{name}{separator}{CANARY}{quote} end"
    assert CANARY not in redact(line)


@pytest.mark.parametrize(
    "text",
    [
        "token=" * 20_000,
        "a_" * 50_000,
        '"token":"' * 20_000,
        "://a:" * 20_000,
        "\\" * 100_000,
        'token="' + "\\" * 100_000,
        "Bearer " * 20_000,
        "eyJ" * 30_000,
        "cookie:" * 20_000,
        " " * 100_000,
        "token" + " " * 100_000,
        "-" * 100_000,
    ],
    ids=lambda text: text[:8],
)
def test_long_lines_are_masked_in_time_that_grows_with_their_length(text: str) -> None:
    begun = time.process_time()
    redact(text)
    assert time.process_time() - begun < 1
