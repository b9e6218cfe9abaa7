"""The keys of a server that say whom it is for, whose its grant is, and which accounts are preset."""

from pathlib import Path

import pytest

from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.servers import token_exchange_errors
from mcp_auth_proxy.config.settings import AccountSettings, InboundMode, OAuthSettings, ServerSettings
from mcp_auth_proxy.errors import ConfigurationError
from mcp_auth_proxy.models import LOCAL_PRINCIPAL, Account, GrantType, Principal, Role

URL = "url: 'https://a.example/mcp'"
IDP = "{issuer: 'https://i.example', client_id: i, id_token: 'env:T'}"
UNATTENDED = "client_id: c, client_secret: s, issuer: 'https://as.example'"


def read(folder: Path, text: str) -> ServerSettings:
    path = folder / "config.yaml"
    path.write_text(f"servers: {{a: {{{URL}, {text}}}}}\n")
    return load(path, environ={"T": "t"}).servers["a"]


def errors_of(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        read(folder, text)
    return [str(error).removeprefix("servers.a.") for error in caught.value.errors]


def test_everything_is_read(tmp_path: Path) -> None:
    preset = "{login_hint: me@work.example, authorization_params: {workspace: w}, scopes: [read, read, write]}"
    server = read(
        tmp_path, f"project: team-a, grant_owner: shared, allow: ['a*', 'role:admin'], accounts: {{work: {preset}}}"
    )
    assert (server.project, server.grant_owner, server.allow) == ("team-a", "shared", ("a*", "role:admin"))
    assert server.accounts == {
        "work": AccountSettings(
            login_hint="me@work.example", authorization_params={"workspace": "w"}, scopes=("read", "write")
        )
    }


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ("project: default", "caller"),
        ("oauth: {grant: device_code}", "caller"),
        (f"oauth: {{grant: client_credentials, {UNATTENDED}}}", "shared"),
        ("oauth: {grant: jwt_bearer, issuer: 'https://as.example', assertion: 'env:T'}", "shared"),
        (f"oauth: {{grant: id_jag, {UNATTENDED}, idp: {IDP}}}", "shared"),
        (f"grant_owner: caller, oauth: {{grant: client_credentials, {UNATTENDED}}}", "caller"),
    ],
)
def test_grants_that_need_nobody_are_shared_by_default(tmp_path: Path, text: str, owner: str) -> None:
    assert read(tmp_path, text).grant_owner == owner


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("grant_owner: team", "grant_owner: must be one of caller, shared"),
        ("project: Team A", "project: a project is 1 to 63"),
        ("allow: ada", "allow: must be a list"),
        ("allow: ['role:boss']", "allow[0]: must be a pattern of names, or one of role:admin, role:member"),
        ("accounts: {Work: {}}", "accounts.Work: an account name is 1 to 32"),
        (f"accounts: {{{'a' * 33}: {{}}}}", f"accounts.{'a' * 33}: an account name is 1 to 32"),
        ("accounts: {work: {hint: x}}", "accounts.work.hint: unknown key"),
        ("accounts: {work: {authorization_params: {state: x}}}", "accounts.work.authorization_params.state: is set by"),
        ("accounts: {work: {scopes: ['a b']}}", "accounts.work.scopes[0]:"),
        (
            f"grant_owner: shared, oauth: {{grant: token_exchange, {UNATTENDED}}}",
            "grant_owner: shared: with grant token_exchange, each token is on behalf of one caller",
        ),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, found: str) -> None:
    assert [error for error in errors_of(tmp_path, text) if error.startswith(found)]


def test_token_exchange_needs_callers_with_a_jwt() -> None:
    server = ServerSettings(name="a", url="https://a.example", oauth=OAuthSettings(grant=GrantType.TOKEN_EXCHANGE))
    other = ServerSettings(name="b", url="https://b.example")
    without: list[tuple[InboundMode, ...]] = [(), ("api_key",), ("api_key", "trusted_header")]
    for modes in without:
        (error,) = token_exchange_errors({"a": server, "b": other}, modes)
        assert error.path == "servers.a.oauth.grant"
    assert token_exchange_errors({"a": server}, ("api_key", "jwt")) == []


def test_a_shared_grant_is_the_projects_and_any_other_the_callers() -> None:
    ada = Principal(id="p1", name="ada", role=Role.ADMIN)
    own = ServerSettings(name="a", url="https://a.example")
    shared = ServerSettings(name="a", url="https://a.example", grant_owner="shared", project="team")
    assert own.account(ada) == Account("p1", "a", "default")
    assert shared.account(ada, "work") == Account("project:team", "a", "work")
    # If callers are not identified, nothing is shared: there is one principal.
    assert shared.account(LOCAL_PRINCIPAL) == Account("local", "a")


def test_local_may_use_every_server() -> None:
    server = ServerSettings(name="a", url="https://a.example", project="team", allow=(), origin="adhoc", owner="p1")
    assert server.admits(LOCAL_PRINCIPAL)
