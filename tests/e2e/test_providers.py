"""The recipes of docs/providers.md, each against a fake that behaves as the provider does."""

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.fixtures import Servers
from fakes.headless import Browser, consent
from fakes.http_exchange import FakeResponse
from fakes.mcp_client import McpResponse, PlainClient
from fakes.mcp_server import FakeMcpServer
from fakes.providers import (
    PROVIDERS,
    SECRET,
    Auth0,
    Cognito,
    EntraId,
    GitHub,
    Google,
    Keycloak,
    Okta,
    Provider,
    Slack,
)
from fakes.proxy import link_in, running_proxy
from fakes.proxy_setup import Clock, proxy_setup
from mcp_auth_proxy.config.load import load

DOCS = (Path(__file__).parents[2] / "docs" / "providers.md").read_text()
YEAR = 365 * 86400.0
RECIPES: dict[str, list[str]] = {
    section.partition("\n")[0]: re.findall(r"^```yaml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    for section in DOCS.split("\n## ")[1:]
}
BLOCKS = [pytest.param(text, id=f"{name}-{at}") for name, texts in RECIPES.items() for at, text in enumerate(texts)]


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in re.findall(r"env:([A-Z0-9_]+)", DOCS):
        monkeypatch.setenv(name, SECRET)


@pytest.mark.parametrize("text", BLOCKS)
def test_every_recipe_loads(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert load(path, environ=os.environ).servers


def test_every_provider_has_a_recipe() -> None:
    assert {provider.name for provider in PROVIDERS} == {name for name, texts in RECIPES.items() if texts}


@dataclass(kw_only=True)
class Connection:
    """A server ``notes`` that trusts the provider, and the proxy before it with the provider's recipe."""

    issuer: Any
    upstream: FakeMcpServer
    client: PlainClient
    clock: Clock
    callback: str

    async def ask(self, text: str = "x") -> McpResponse:
        return await self.client.call("echo", text=text)

    async def consent(self) -> str:
        """Authorize as a user would; return the text of the last page."""
        return (await consent(link_in((await self.ask()).message))).text

    async def works(self) -> bool:
        return (await self.ask("works")).text == "works"


@asynccontextmanager
async def behind(
    provider: type[Provider], folder: Path, *, number: int = 0, without: tuple[str, ...] = (), **changes: Any
) -> AsyncIterator[Connection]:
    """Run recipe ``number`` of the provider, ``without`` some of its keys and with ``changes`` to its oauth section."""
    clock = Clock()
    async with (
        provider.running(provider.path()) as issuer,
        FakeMcpServer.running(issuer, checks_audience=provider not in (EntraId, Cognito)) as upstream,
    ):
        if isinstance(issuer, Okta):
            issuer.audience = upstream.url
        text = RECIPES[provider.name][number].replace(provider.address, issuer.issuer)
        (entry,) = yaml.safe_load(text)["servers"].values()
        text = text.replace(entry["url"], upstream.url)
        (entry,) = yaml.safe_load(text)["servers"].values()
        oauth = {key: value for key, value in entry.get("oauth", {}).items() if key not in without} | changes
        config = {"notes": {"url": upstream.url, "oauth": oauth}}
        async with (
            running_proxy(folder, config, clock=clock, authorization={"wait": "0s"}) as proxy,
            proxy.client("notes") as client,
        ):
            callback = f"{proxy.origin}/oauth/callback"
            if "client_id" in oauth:
                issuer.add_client(client_id=oauth["client_id"], secret=SECRET, redirect_uris=(callback,))
            yield Connection(issuer=issuer, upstream=upstream, client=client, clock=clock, callback=callback)


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.__name__)
async def test_the_recipe_connects_and_renews(tmp_path: Path, provider: type[Provider]) -> None:
    async with behind(provider, tmp_path) as setup:
        page = await setup.consent()
        assert await setup.works(), page
        if provider is not GitHub:
            setup.issuer.end_access_tokens()
            assert await setup.works()
            assert setup.issuer.refreshes == 1
        assert setup.issuer.authorizations == 1


# errors that name a missing key


@pytest.mark.parametrize("provider", [EntraId, Google, GitHub, Okta, Auth0, Cognito, Slack], ids=lambda p: p.__name__)
async def test_without_a_client_the_error_names_the_key(tmp_path: Path, provider: type[Provider]) -> None:
    async with behind(provider, tmp_path, without=("client_id", "client_secret")) as setup:
        reply = await setup.ask()
        assert "servers.notes.oauth.client_id" in reply.error["message"]
        assert setup.issuer.authorizations == 0


@pytest.mark.parametrize("provider", [EntraId, Cognito], ids=lambda p: p.__name__)
async def test_missing_pkce_is_refused_with_the_key(tmp_path: Path, provider: type[Provider]) -> None:  # T10
    async with behind(provider, tmp_path, without=("allow_missing_pkce",)) as setup:
        assert "servers.notes.oauth.allow_missing_pkce" in (await setup.ask()).error["message"]


async def test_a_sign_in_page_on_another_site_is_refused_with_the_key(tmp_path: Path) -> None:  # T77
    async with behind(Cognito, tmp_path, without=("issuer",)) as setup:
        message = (await setup.ask()).error["message"]
        assert f"servers.notes.oauth.issuer: {setup.issuer.issuer} (RFC 9700 §4.4)" in message
        assert setup.issuer.authorizations == 0


@pytest.mark.parametrize("provider", [EntraId, Cognito], ids=lambda p: p.__name__)
async def test_a_refused_resource_names_the_key(tmp_path: Path, provider: type[Provider]) -> None:
    async with behind(provider, tmp_path, without=("resource",)) as setup:
        page = await setup.consent()
        assert "servers.notes.oauth.resource" in page
        assert setup.issuer.token_requests() == 0


async def test_a_resource_that_the_token_endpoint_refuses_names_the_key(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        setup.issuer.answers["token"] = FakeResponse.json({"error": "invalid_target", "error_description": "no"}, 400)
        page = await consent(await setup.link())
        assert "servers.notes.oauth.resource" in page.text
        assert setup.upstream.url in page.text


# Entra ID


async def test_entra_is_sent_the_scope_at_each_refresh(tmp_path: Path) -> None:
    async with behind(EntraId, tmp_path) as setup:
        await setup.consent()
        setup.issuer.end_access_tokens()
        assert await setup.works()
        (refresh,) = setup.issuer.seen("token", grant_type="refresh_token")
        assert refresh.form["scope"] == "api://APPLICATION-ID/.default offline_access"
        assert all("resource" not in request.form for request in setup.issuer.requests)


async def test_a_server_that_refuses_scope_at_a_refresh_is_asked_without(servers: Servers, tmp_path: Path) -> None:
    oauth = {"resource": "omit", "scopes": ["a"]}
    async with proxy_setup(servers, tmp_path, oauth=oauth, upstream={"checks_audience": False}) as setup:
        await setup.connect()
        refusal = FakeResponse.json({"error": "invalid_scope"}, 400)
        setup.issuer.answers["token"] = lambda received: refusal if "scope" in received.form else None
        setup.issuer.end_access_tokens()
        assert (await setup.ask("renewed")).text == "renewed"
        assert setup.issuer.refreshes == 2


async def test_entra_unattended(tmp_path: Path) -> None:
    async with behind(EntraId, tmp_path, number=1) as setup:
        assert await setup.works()
        (request,) = setup.issuer.seen("token")
        assert request.form["scope"] == "api://APPLICATION-ID/.default"


# Google


@pytest.mark.parametrize("prompt", ["consent", "select_account"])
async def test_a_second_consent_brings_a_refresh_token_only_if_requested(tmp_path: Path, prompt: str) -> None:
    params = {"access_type": "offline", "prompt": prompt}
    async with behind(Google, tmp_path, authorization_params=params) as setup:
        await setup.consent()
        setup.issuer.end_grants()
        await setup.consent()
        assert await setup.works()
        before = setup.issuer.refreshes
        setup.issuer.end_access_tokens()
        # Nothing says that the same account has consented: the refresh token of before is not used for it.
        assert await setup.works() == (prompt == "consent")
        assert setup.issuer.refreshes == before + (prompt == "consent")


# GitHub


async def test_a_token_without_an_end_is_used_until_it_is_refused(tmp_path: Path) -> None:
    async with behind(GitHub, tmp_path) as setup:
        await setup.consent()
        setup.clock.ahead = YEAR
        assert await setup.works()
        assert setup.issuer.token_requests() == 1
        setup.issuer.end_access_tokens()
        assert "/connect/notes" in str((await setup.ask()).message)
        assert setup.issuer.discoveries == 0


@pytest.mark.parametrize("provider", [GitHub, Slack], ids=lambda p: p.__name__)
async def test_an_error_with_status_200_is_an_error(tmp_path: Path, provider: type[Provider]) -> None:
    async with behind(provider, tmp_path) as setup:
        link = link_in((await setup.ask()).message)
        setup.issuer.ledger.rules.token_seconds = 60
        async with Browser() as browser:
            callback = await browser.stop_before(link)
            setup.issuer.ledger.codes.clear()
            page = await browser.follow(callback)
        assert provider.errors["invalid_grant"] in page.text
        assert setup.issuer.token_requests() == 1


# Okta, Auth0


async def test_oktas_issuer_may_have_a_path(tmp_path: Path) -> None:
    async with behind(Okta, tmp_path, grant="client_credentials") as setup:
        assert await setup.works()
        assert {request.path for request in setup.issuer.seen("token")} == {"/oauth2/default/token"}


async def test_auth0s_audience_is_in_the_token_request_of_unattended_grants(tmp_path: Path) -> None:
    async with behind(Auth0, tmp_path, number=1) as setup:
        assert await setup.works()
        assert [request.form["audience"] for request in setup.issuer.seen("token")] == [setup.upstream.url]


async def test_auth0_without_an_audience_gives_a_token_that_is_reported(tmp_path: Path) -> None:
    async with behind(Auth0, tmp_path, number=1, without=("token_params",)) as setup:
        message = (await setup.ask()).error["message"]
        assert "refuses a token that its authorization server has just issued" in message
        assert "token_params" in message


async def test_token_params_are_sent_with_code_and_refresh_too(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, oauth={"token_params": {"organization": "a b&c"}}) as setup:
        await setup.connect()
        setup.issuer.end_access_tokens()
        assert (await setup.ask("renewed")).text == "renewed"
        assert [request.form["organization"] for request in setup.issuer.seen("token")] == ["a b&c"] * 2
        assert "organization" not in setup.issuer.seen("authorize")[0].form


# Keycloak


async def test_a_realm_that_moves_is_another_issuer(tmp_path: Path) -> None:  # T11
    async with behind(Keycloak, tmp_path) as setup, Keycloak.running("/realms/RENAMED") as moved:
        await setup.consent()
        assert await setup.works()
        setup.upstream.authorization_servers[:] = [moved]
        await setup.consent()
        assert await setup.works()
        assert (setup.issuer.registrations, moved.registrations) == (1, 1)
        sent = repr([(request.headers, request.body, request.query_string) for request in moved.requests])
        assert not [secret for secret in setup.issuer.secrets() | set(setup.issuer.ledger.clients) if secret in sent]


async def test_a_realm_that_moves_does_not_see_a_configured_client(tmp_path: Path) -> None:  # T11
    async with (
        behind(Keycloak, tmp_path, number=1, without=("issuer",)) as setup,
        Keycloak.running("/realms/RENAMED") as moved,
    ):
        await setup.consent()
        assert await setup.works()
        setup.upstream.authorization_servers[:] = [moved]
        message = (await setup.ask()).error["message"]
        assert "servers.notes.oauth.issuer" in message
        assert {request.endpoint for request in moved.requests} <= {"metadata", "other"}
        assert {request.method for request in moved.requests} == {"GET"}


# Slack


async def test_a_permanent_refusal_by_slack_ends_the_grant(tmp_path: Path) -> None:
    async with behind(Slack, tmp_path) as setup:
        await setup.consent()
        setup.issuer.end_grants()
        assert "/connect/notes" in str((await setup.ask()).message)
        assert setup.issuer.refreshes == 1
        await setup.consent()
        assert await setup.works()
