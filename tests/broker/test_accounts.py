"""Several accounts of one principal at one server: what is preset for each, and whose it turns out to be."""

from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from broker.broker_setup import NOTES, BrokerSetup, broker_setup, server
from fakes.authorization_server import FakeAuthorizationServer
from fakes.http_exchange import FakeResponse
from fakes.mcp_server import FakeMcpServer
from mcp_auth_proxy.broker import AuthorizationRedirect
from mcp_auth_proxy.config.settings import AccountSettings
from mcp_auth_proxy.models import Account
from mcp_auth_proxy.oauth.scopes import OFFLINE_ACCESS

WORK = Account("local", "notes", "work")
OTHER = Account("somebody", "notes", "work")


async def asked_for(setup: BrokerSetup, account: Account) -> dict[str, str]:
    """Start an authorization, and return the parameters that the browser takes to the authorization server."""
    pending = await setup.pending(account)
    opened = await setup.broker.confirm_link("notes", pending.flow.id)
    assert isinstance(opened, AuthorizationRedirect)
    return dict(parse_qsl(urlsplit(opened.authorization_url).query))


async def label(setup: BrokerSetup, account: Account = NOTES) -> str:
    await setup.connect(account)
    grant = await setup.grants.current(account)
    assert grant is not None
    return grant.label


async def test_what_is_preset_for_an_account_is_requested(tmp_path: Path, upstream: FakeMcpServer) -> None:
    work = AccountSettings(login_hint="me@work.example", authorization_params={"audience": "w"}, scopes=("read",))
    notes = replace(
        server(upstream.url, authorization_params={"audience": "all", "access_type": "offline"}),
        accounts={"work": work},
    )
    async with broker_setup(tmp_path, notes) as setup:
        asked = await asked_for(setup, WORK)
        assert (asked["login_hint"], asked["audience"], asked["access_type"]) == ("me@work.example", "w", "offline")
        assert asked["scope"] == "read"
        assert "prompt" not in asked
        other = await asked_for(setup, NOTES)
        assert other["audience"] == "all"
        assert "login_hint" not in other


async def test_from_the_second_account_on_the_user_chooses_one(setup: BrokerSetup) -> None:
    assert "prompt" not in await asked_for(setup, NOTES)
    await setup.connect(NOTES)
    assert (await asked_for(setup, WORK))["prompt"] == "select_account"
    assert "prompt" not in await asked_for(setup, OTHER)


async def test_a_further_account_still_gets_its_refresh_token(
    setup: BrokerSetup, issuer: FakeAuthorizationServer, upstream: FakeMcpServer
) -> None:
    upstream.scopes = ("read",)
    issuer.metadata_changes = {"scopes_supported": ["read", OFFLINE_ACCESS]}
    await setup.connect(NOTES)
    assert (await asked_for(setup, WORK))["prompt"] == "select_account consent"


async def test_the_configuration_decides_how_the_user_is_prompted(tmp_path: Path, upstream: FakeMcpServer) -> None:
    async with broker_setup(tmp_path, server(upstream.url, authorization_params={"prompt": "login"})) as setup:
        await setup.connect(NOTES)
        assert (await asked_for(setup, WORK))["prompt"] == "login"


async def test_each_account_has_a_grant_and_a_client_of_its_own(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    tokens = [await setup.connect(account) for account in (NOTES, WORK)]
    assert tokens[0].header != tokens[1].header
    assert issuer.registrations == 2
    assert [await setup.broker.token(account) for account in (NOTES, WORK)] == tokens


async def test_a_grant_says_whose_it_is(setup: BrokerSetup, issuer: FakeAuthorizationServer) -> None:
    issuer.token_changes = {"user": {"email": "me@work.example"}, "workspace_name": "Acme"}
    assert await label(setup) == "me@work.example, workspace Acme"


async def test_the_userinfo_endpoint_is_asked_if_the_response_does_not_say(
    setup: BrokerSetup, issuer: FakeAuthorizationServer, upstream: FakeMcpServer
) -> None:
    upstream.scopes = ("openid",)
    issuer.metadata_changes = {"userinfo_endpoint": f"{issuer.issuer}/userinfo"}
    issuer.answers["userinfo"] = FakeResponse.json({"sub": "7", "email": "me@work.example"})
    assert await label(setup) == "me@work.example"
    (asked,) = issuer.seen("userinfo")
    token = await setup.broker.token(NOTES)
    assert token is not None
    assert asked.header("authorization") == token.header.decode()


async def test_a_userinfo_endpoint_that_fails_costs_only_the_label(
    setup: BrokerSetup, issuer: FakeAuthorizationServer, upstream: FakeMcpServer
) -> None:
    upstream.scopes = ("openid",)
    issuer.metadata_changes = {"userinfo_endpoint": f"{issuer.issuer}/userinfo"}
    issuer.answers["userinfo"] = FakeResponse.json({"error": "invalid_token"}, 401)
    assert await label(setup) == ""


async def test_without_the_scope_openid_nobody_is_asked(setup: BrokerSetup, issuer: FakeAuthorizationServer) -> None:
    issuer.metadata_changes = {"userinfo_endpoint": f"{issuer.issuer}/userinfo"}
    assert await label(setup) == ""
    assert issuer.seen("userinfo") == []
