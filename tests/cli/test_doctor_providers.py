"""What is known of authorization servers by their issuer, and what becomes of it in the proposed configuration."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes import providers as fakes
from fakes.proxy import write_config
from mcp_auth_proxy.cli.doctor import providers
from mcp_auth_proxy.cli.doctor.proposal import PLACEHOLDER, Proposal
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.settings import Settings
from mcp_auth_proxy.errors import ConfigHint
from mcp_auth_proxy.oauth.discovery import ServerMetadata

ISSUERS = {
    "https://login.microsoftonline.com/11111111-2222-3333-4444-555555555555/v2.0": "Microsoft Entra ID",
    "https://accounts.google.com": "Google",
    "https://github.com/login/oauth": "GitHub",
    "https://dev-1.okta.com/oauth2/default": "Okta",
    "https://tenant.eu.auth0.com/": "Auth0",
    "https://cognito-idp.eu-west-1.amazonaws.com/eu-west-1_AbC": "Amazon Cognito",
    "https://slack.com": "Slack",
    "https://id.example.com/realms/main": "Keycloak",
}

DOCS = (Path(__file__).parents[2] / "docs" / "providers.md").read_text()
RECIPES: list[tuple[str, dict[str, Any]]] = [
    (fake.address, yaml.safe_load(text)["servers"].popitem()[1])
    for fake in fakes.PROVIDERS
    for section in DOCS.split("\n## ")
    if section.partition("\n")[0] == fake.name
    for text in re.findall(r"^```yaml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
]
OWN = {"client_id", "client_secret", "issuer", "grant"}
"""Keys of a recipe that say whom it is for and what it does."""
CURED = {"metadata", "allow_missing_pkce"}
"""Keys that errors name."""


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in re.findall(r"env:([A-Z0-9_]+)", DOCS):
        monkeypatch.setenv(name, "provider-secret")


def known(issuer: str) -> providers.Provider | None:
    metadata = ServerMetadata(issuer=issuer, token_endpoint=f"{issuer}/protocol/openid-connect/token")
    return providers.recognize(issuer, metadata)


def proposal(folder: Path, server: dict[str, Any]) -> tuple[Proposal, Settings]:
    settings = load(write_config(folder, {"notes": server}), environ=os.environ)
    return Proposal(settings, settings.servers["notes"]), settings


@pytest.mark.parametrize(("issuer", "name"), ISSUERS.items())
def test_a_provider_is_recognized_by_its_issuer(issuer: str, name: str) -> None:
    found = known(issuer)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    "issuer",
    [
        "https://auth0.com.evil.example",
        "https://evil.example/login.microsoftonline.com",
        "https://login.microsoftonline.com.evil.example/x",
        "https://notgithub.com/login/oauth",
        "https://x.amazonaws.com/api",
        "https://as.example.com",
    ],
)
def test_an_unknown_issuer_is_no_known_provider(issuer: str) -> None:
    assert known(issuer) is None


@pytest.mark.parametrize("provider", providers.PROVIDERS, ids=lambda provider: provider.name)
def test_what_a_provider_needs_makes_a_configuration_that_loads(tmp_path: Path, provider: providers.Provider) -> None:
    found, settings = proposal(tmp_path, {"url": "https://mcp.example.com/mcp"})
    found.apply_hint(ConfigHint("oauth.client_id"), provider)
    found.apply_hint(ConfigHint("oauth.metadata"), provider)
    found.apply_provider(provider, scopes_known=False)
    printed = tmp_path / "printed.yaml"
    printed.write_text(found.as_yaml("http://127.0.0.1:8787/oauth/callback"))
    oauth = load(printed, environ=os.environ).servers["notes"].oauth
    assert oauth == found.settings().oauth
    assert oauth.client_id == PLACEHOLDER
    assert not found.complete
    assert all(name in yaml.safe_load(printed.read_text())["servers"]["notes"]["oauth"] for name in provider.oauth)
    assert settings.servers["notes"].oauth.client_id is None


def test_what_the_operator_has_set_stays(tmp_path: Path) -> None:
    oauth = {"client_id": "mine", "authorization_params": {"prompt": "select_account"}, "resource": "auto"}
    found, _ = proposal(tmp_path, {"url": "https://mcp.example.com/mcp", "oauth": oauth})
    for provider in providers.PROVIDERS:
        found.apply_provider(provider, scopes_known=False)
    settings = found.settings().oauth
    assert settings.authorization_params == {"access_type": "offline", "prompt": "select_account"}
    assert (settings.client_id, settings.resource) == ("mine", "auto")


@pytest.mark.parametrize(("issuer", "recipe"), RECIPES)
def test_doctor_has_nothing_to_add_to_a_recipe(tmp_path: Path, issuer: str, recipe: dict[str, Any]) -> None:
    provider = known(issuer)
    assert provider is not None
    found, _ = proposal(tmp_path, recipe)
    found.apply_provider(provider, scopes_known=False)
    assert found.changes == []


@pytest.mark.parametrize(("issuer", "recipe"), RECIPES)
def test_doctor_knows_every_key_of_a_recipe(tmp_path: Path, issuer: str, recipe: dict[str, Any]) -> None:
    provider = known(issuer)
    assert provider is not None
    wanted = recipe.get("oauth", {})
    found, _ = proposal(tmp_path, {"url": recipe["url"], "oauth": {k: v for k, v in wanted.items() if k in OWN}})
    found.apply_provider(provider, scopes_known=False)
    said = {change.key.removeprefix("servers.notes.oauth."): change for change in found.changes}
    assert said.keys() == wanted.keys() - OWN - CURED
    for name, change in said.items():
        assert change.value == wanted[name] or not change.applied


def test_metadata_by_hand_is_that_of_the_recipe() -> None:
    for provider in providers.PROVIDERS:
        if provider.metadata is not None:
            assert provider.metadata in [recipe.get("oauth", {}).get("metadata") for _, recipe in RECIPES]
