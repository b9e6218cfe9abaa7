"""The sections ``inbound`` and ``admin``: what they may say, and all their errors at once."""

from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from mcp_auth_proxy.config import load as config
from mcp_auth_proxy.config.inbound import warnings
from mcp_auth_proxy.config.settings import (
    AdminSettings,
    InboundSettings,
    JwtSettings,
    Secret,
    Settings,
    SignInSettings,
    TrustedHeaderSettings,
)
from mcp_auth_proxy.errors import ConfigurationError

JWT = "{issuer: https://idp.example.com, audience: https://proxy.example.com}"
ENVIRON = {"PROXY_SECRET": "canary-front", "SIGN_IN_SECRET": "canary-sign-in"}


def load(folder: Path, text: str, **options: Any) -> Settings:
    path = folder / "mcp-auth-proxy.yaml"
    path.write_text(f"servers: {{a: {{url: 'https://a.example/mcp'}}}}\n{text}\n")
    return config.load(path, environ=options.pop("environ", ENVIRON), **options)


def errors(folder: Path, text: str, **options: Any) -> dict[str, str]:
    with pytest.raises(ConfigurationError) as caught:
        load(folder, text, **options)
    return {error.path: error.problem for error in caught.value.errors}


def test_without_the_section_everybody_is_local(tmp_path: Path) -> None:
    settings = load(tmp_path, "")
    assert (settings.inbound, settings.admin) == (InboundSettings(), AdminSettings())
    assert load(tmp_path, "inbound: {mode: none}").inbound.modes == ()


@pytest.mark.parametrize(
    ("text", "modes"),
    [
        ("api_key", ("api_key",)),
        ("[api_key]", ("api_key",)),
        ("[jwt, api_key, jwt]", ("jwt", "api_key")),
    ],
)
def test_modes_may_be_one_or_several(tmp_path: Path, text: str, modes: tuple[str, ...]) -> None:
    assert load(tmp_path, f"inbound: {{mode: {text}, jwt: [{JWT}]}}").inbound.modes == modes


def test_everything_that_the_sections_say_is_read(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        """
inbound:
  mode: [jwt, trusted_header]
  provision: listed
  jwt:
    - {issuer: https://idp.example.com/realm/, audience: p, jwks: https://keys.example.com/k, principal: email,
       roles: {claim: groups, admin: [mcp-admins, root]}, scopes: [mcp, openid, mcp]}
    - {kubernetes: true, audience: q}
  trusted_header:
    {name: X-Forwarded-User, from: [10.0.0.0/8, "::1"], secret: env:PROXY_SECRET, secret_header: X-Proxy-Secret}
  sign_in: {issuer: https://idp.example.com/realm/, client_id: proxy, client_secret: env:SIGN_IN_SECRET}
admin:
  enabled: false
  adhoc: member
  popup_origins: ["https://app.example"]
  allow_private: [10.0.0.0/8, nas.lan]
  customer_id: acme
  token_file: token
""",
    )
    assert settings.inbound == InboundSettings(
        modes=("jwt", "trusted_header"),
        provision="listed",
        jwt=(
            JwtSettings(
                issuer="https://idp.example.com/realm/",
                audience="p",
                jwks="https://keys.example.com/k",
                principal="email",
                roles_claim="groups",
                roles_admin=("mcp-admins", "root"),
                scopes=("mcp", "openid"),
            ),
            JwtSettings(issuer="", audience="q", kubernetes=True),
        ),
        trusted_header=TrustedHeaderSettings(
            name="x-forwarded-user",
            sources=(ip_network("10.0.0.0/8"), ip_network("::1/128")),
            secret=Secret("canary-front"),
            secret_header="x-proxy-secret",
        ),
        sign_in=SignInSettings(
            issuer="https://idp.example.com/realm/", client_id="proxy", client_secret=Secret("canary-sign-in")
        ),
    )
    assert settings.admin == AdminSettings(
        enabled=False,
        adhoc="member",
        popup_origins=("https://app.example",),
        allow_private=("10.0.0.0/8", "nas.lan"),
        customer_id="acme",
        token_file=tmp_path / "token",
    )
    assert "canary" not in repr(settings)


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    found = errors(
        tmp_path,
        """
inbound:
  mode: [api_key, magic]
  provision: sometimes
  jwt:
    - {issuer: "http://idp.example.com", algorithms: [HS256]}
    - {kubernetes: true, issuer: "https://k.example", audience: p, roles: {claims: groups}, scopes: [a]}
    - nonsense
  trusted_header: {name: "X User", from: [], secret: s}
  sign_in: {client_id: proxy}
  modes: api_key
admin: {enabled: maybe, adhoc: everybody, popup_origins: [app.example], allow_private: ["10.0.0.1/8"], token: x}
""",
    )
    assert set(found) == {
        "inbound.mode[1]",
        "inbound.provision",
        "inbound.jwt[0].issuer",
        "inbound.jwt[0].audience",
        "inbound.jwt[0].algorithms",
        "inbound.jwt[1].issuer",
        "inbound.jwt[1].scopes",
        "inbound.jwt[1].roles.claims",
        "inbound.jwt[1].roles.admin",
        "inbound.jwt[2]",
        "inbound.trusted_header.name",
        "inbound.trusted_header.from",
        "inbound.trusted_header.secret_header",
        "inbound.sign_in.issuer",
        "inbound.modes",
        "admin.enabled",
        "admin.adhoc",
        "admin.popup_origins[0]",
        "admin.allow_private[0]",
        "admin.token",
    }
    assert "did you mean mode?" in found["inbound.modes"]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("inbound: {mode: jwt}", "inbound.jwt"),
        ("inbound: {mode: jwt, jwt: []}", "inbound.jwt"),
        ("inbound: {mode: trusted_header}", "inbound.trusted_header"),
        ("inbound: {mode: []}", "inbound.mode"),
        ("inbound: {mode: [none, api_key]}", "inbound.mode"),
        (f"inbound: {{mode: jwt, jwt: [{JWT}, {JWT}]}}", "inbound.jwt[1].issuer"),
        ("inbound: {mode: jwt, jwt: [{audience: p}]}", "inbound.jwt[0].issuer"),
        ("inbound: {trusted_header: {name: X-User, from: [10.0.0.0/8], secret_header: S}}", "secret"),
        ("inbound: {trusted_header: {name: Authorization, from: [10.0.0.0/8]}}", "name"),
        ("inbound: {trusted_header: {name: Mcp-Session-Id, from: [10.0.0.0/8]}}", "name"),
        ("inbound: {trusted_header: {name: X_User, from: [10.0.0.0/8]}}", "name"),
        ("inbound: {trusted_header: {name: U, from: [10.0.0.0/8], secret: s, secret_header: U}}", "secret_header"),
    ],
)
def test_what_does_not_fit_together_is_an_error(tmp_path: Path, text: str, path: str) -> None:
    found = errors(tmp_path, text)
    assert [key.rpartition("trusted_header.")[2] for key in found] == [path]


@pytest.mark.parametrize("listen", ["0.0.0.0:8787", "192.0.2.1:8787"])
def test_callers_that_are_identified_may_come_from_anywhere(tmp_path: Path, listen: str) -> None:
    assert load(tmp_path, f"listen: {listen}\ninbound: {{mode: api_key}}", allow_anonymous=False).inbound.modes
    found = errors(tmp_path, f"listen: {listen}", allow_anonymous=False)
    assert "inbound.mode" in found["inbound.allow_anonymous"]
    found = errors(tmp_path, f"listen: {listen}\ninbound: {{mode: none}}", allow_anonymous=False)
    assert set(found) == {"inbound.allow_anonymous"}


def test_secrets_may_be_missing_if_they_are_not_needed(tmp_path: Path) -> None:
    text = "inbound: {sign_in: {issuer: 'https://i.example', client_id: p, client_secret: env:SIGN_IN_SECRET}}"
    assert set(errors(tmp_path, text, environ={})) == {"inbound.sign_in.client_secret"}
    sign_in = load(tmp_path, text, environ={}, secrets_of=()).inbound.sign_in
    assert sign_in == SignInSettings(issuer="https://i.example", client_id="p")


def test_what_has_no_effect_is_a_warning(tmp_path: Path) -> None:
    assert warnings(load(tmp_path, f"inbound: {{mode: jwt, jwt: [{JWT}]}}").inbound) == []
    (line,) = warnings(load(tmp_path, f"inbound: {{jwt: [{JWT}]}}").inbound)
    assert line == "inbound.jwt: without effect, because inbound.mode is none"
    (line,) = warnings(load(tmp_path, f"inbound: {{mode: api_key, jwt: [{JWT}]}}").inbound)
    assert line == "inbound.jwt: without effect, because inbound.mode does not have jwt"


def test_secrets_in_files_are_read_again(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("canary-front\n")
    named: set[Path] = set()
    text = (
        "inbound: {trusted_header: {name: U, from: [10.0.0.0/8], secret: 'file:secret', secret_header: S}, "
        "mode: trusted_header}"
    )
    header = load(tmp_path, text, secret_files=named).inbound.trusted_header
    assert header is not None
    assert header.secret == Secret("canary-front")
    assert named == {tmp_path / "secret"}
