"""Becoming a client of an authorization server, over real sockets and with a real store."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.broker_setup import NOTES, PUBLIC_URL, server
from fakes.authorization_server import FakeAuthorizationServer
from fakes.http_exchange import ABSENT
from fakes.proxy_setup import Clock
from mcp_auth_proxy.broker.client_registration import ClientRegistrar, redirect_uri
from mcp_auth_proxy.broker.discovery import Discoverer
from mcp_auth_proxy.config.settings import Secret, ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, ConfigHint, RegistrationImpossible
from mcp_auth_proxy.models import ClientAuth, GrantType, Registration, RegistrationKind
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.registrations import Registrations
from store.builders import store_settings

CALLBACK = f"{PUBLIC_URL}/oauth/callback"


class Setup:
    """The server ``notes``, whose authorization server is ``issuer``."""

    def __init__(self, issuer: FakeAuthorizationServer, fetcher: Fetcher, database: Engine) -> None:
        self.issuer = issuer
        self.clock = Clock()
        self.registrations = Registrations(database)
        self.discoverer = Discoverer(fetcher=fetcher, allow_private=())
        self._fetcher = fetcher
        self.registrar = self.made_for(PUBLIC_URL)

    def made_for(self, public_url: str) -> ClientRegistrar:
        return ClientRegistrar(
            fetcher=self._fetcher, registrations=self.registrations, public_url=public_url, clock=self.clock
        )

    def settings(self, issuer: FakeAuthorizationServer | None = None, **oauth: Any) -> ServerSettings:
        """The settings of ``notes``, whose resource metadata is never asked for."""
        document = (issuer or self.issuer).metadata()
        return server("http://127.0.0.1:1/mcp", metadata=document, **oauth)

    async def client(
        self, settings: ServerSettings | None = None, *, registrar: ClientRegistrar | None = None, preview: bool = False
    ) -> Registration:
        settings = settings or self.settings()
        registrar = registrar or self.registrar
        _, metadata = await self.discoverer.discover(settings, None)
        if preview:
            return await registrar.preview(NOTES, settings, metadata)
        return await registrar.register(NOTES, settings, metadata, self.discoverer.policy(settings.url))

    async def stored(self) -> Registration | None:
        return await self.registrations.find("notes", self.issuer.issuer, CALLBACK)


@pytest.fixture
async def setup(issuer: FakeAuthorizationServer, tmp_path: Path) -> AsyncIterator[Setup]:
    fetcher = Fetcher()
    database = await open_store(store_settings(tmp_path))
    yield Setup(issuer, fetcher, database)
    await fetcher.aclose()
    await database.close()


def test_only_a_grant_with_a_redirect_has_a_redirect_uri() -> None:
    assert redirect_uri(PUBLIC_URL, GrantType.AUTHORIZATION_CODE) == CALLBACK
    assert {redirect_uri(PUBLIC_URL, grant) for grant in GrantType if grant is not GrantType.AUTHORIZATION_CODE} == {""}


# Dynamic registration (RFC 7591)


async def test_a_client_is_registered_once_and_found_in_the_store_from_then_on(setup: Setup) -> None:
    client = await setup.client()
    assert (client.kind, client.redirect_uri, client.issuer) == (
        RegistrationKind.DYNAMIC,
        CALLBACK,
        setup.issuer.issuer,
    )
    assert setup.issuer.seen("register")[0].message["redirect_uris"] == [CALLBACK]
    assert await setup.client() == client == await setup.stored()
    assert setup.issuer.registrations == 1


async def test_another_public_url_has_a_client_of_its_own(setup: Setup) -> None:
    first = await setup.client()
    second = await setup.client(registrar=setup.made_for("http://127.0.0.1:9999"))
    assert second.client_id != first.client_id
    assert setup.issuer.registrations == 2


async def test_a_client_whose_secret_has_expired_is_registered_again(setup: Setup) -> None:
    client = await setup.client()
    await setup.registrations.save(replace(client, secret_expires_at=setup.clock() + 100))
    assert (await setup.client()).client_id == client.client_id
    setup.clock.ahead += 200
    assert (await setup.client()).client_id != client.client_id


async def test_a_client_with_another_authentication_than_configured_is_registered_again(setup: Setup) -> None:
    assert (await setup.client()).client_auth is ClientAuth.NONE
    for _ in range(2):
        client = await setup.client(setup.settings(client_auth=ClientAuth.POST))
        assert client.client_auth is ClientAuth.POST
    assert setup.issuer.registrations == 2


async def test_a_server_without_registration_is_an_error_that_says_what_to_do(setup: Setup) -> None:
    setup.issuer.metadata_changes = {"registration_endpoint": ABSENT}
    for preview in (False, True):
        with pytest.raises(RegistrationImpossible, match=r"servers\.notes\.oauth\.client_id") as refused:
            await setup.client(preview=preview)
        assert refused.value.hint == ConfigHint("oauth.client_id")
        assert CALLBACK in str(refused.value)


async def test_only_a_dynamic_registration_is_forgotten(setup: Setup) -> None:
    client = await setup.client()
    await setup.registrar.forget(replace(client, kind=RegistrationKind.CONFIGURED))
    assert await setup.stored() == client
    await setup.registrar.forget(client)
    assert await setup.stored() is None
    await setup.client()
    await setup.registrar.forget_all(NOTES)
    assert await setup.stored() is None


async def test_a_preview_registers_and_stores_nothing(setup: Setup) -> None:
    client = await setup.client(preview=True)
    assert (client.kind, client.client_id) == (RegistrationKind.DYNAMIC, "")
    assert (setup.issuer.requests, await setup.stored()) == ([], None)
    registered = await setup.client()
    assert await setup.client(preview=True) == registered


# Client ID Metadata Documents


async def test_a_public_url_with_https_is_a_client_by_its_document(setup: Setup) -> None:
    setup.issuer.client_documents = True
    client = await setup.client(registrar=setup.made_for("https://proxy.example"))
    assert client.kind is RegistrationKind.METADATA_DOCUMENT
    assert client.client_id == "https://proxy.example/oauth/client-metadata.json"
    client = await setup.client(setup.settings(client_metadata_url="https://elsewhere.example/client.json"))
    assert client.client_id == "https://elsewhere.example/client.json"
    assert setup.issuer.requests == []


@pytest.mark.parametrize("reason", ["the server does not know them", "http", "a secret is wanted"])
async def test_without_a_usable_document_the_client_is_registered(setup: Setup, reason: str) -> None:
    setup.issuer.client_documents = reason != "the server does not know them"
    public_url = "http://127.0.0.1:8787" if reason == "http" else "https://proxy.example"
    auth = ClientAuth.POST if reason == "a secret is wanted" else None
    client = await setup.client(setup.settings(client_auth=auth), registrar=setup.made_for(public_url))
    assert (client.kind, setup.issuer.registrations) == (RegistrationKind.DYNAMIC, 1)


# Configured clients


async def test_a_configured_client_comes_first(setup: Setup) -> None:
    setup.issuer.client_documents = True
    settings = setup.settings(client_id="mine", client_secret=Secret("canary"))
    client = await setup.client(settings, registrar=setup.made_for("https://proxy.example"))
    assert (client.kind, client.client_id, client.client_secret) == (RegistrationKind.CONFIGURED, "mine", "canary")
    assert client.client_auth in (ClientAuth.BASIC, ClientAuth.POST)
    assert "canary" not in repr(client)
    assert setup.issuer.requests == []


async def test_configured_credentials_go_only_to_the_first_issuer(
    setup: Setup, authorization_server: FakeAuthorizationServer
) -> None:
    credentials: dict[str, Any] = {"client_id": "mine", "client_secret": Secret("canary")}
    await setup.client(setup.settings(**credentials))
    moved = setup.settings(authorization_server, **credentials)
    for preview in (False, True):
        with pytest.raises(AuthorizationError, match=r"set servers\.notes\.oauth\.issuer to") as refused:
            await setup.client(moved, preview=preview)
        assert setup.issuer.issuer in str(refused.value)
        assert refused.value.hint == ConfigHint("oauth.issuer", authorization_server.issuer)
    # Genuine moves are configured.
    pinned = replace(moved, oauth=replace(moved.oauth, issuer=authorization_server.issuer))
    assert (await setup.client(pinned)).issuer == authorization_server.issuer


async def test_a_preview_binds_nothing(setup: Setup, authorization_server: FakeAuthorizationServer) -> None:
    credentials: dict[str, Any] = {"client_id": "mine", "client_secret": Secret("canary")}
    await setup.client(setup.settings(**credentials), preview=True)
    assert (
        await setup.client(setup.settings(authorization_server, **credentials))
    ).issuer == authorization_server.issuer


async def test_a_workload_with_a_token_of_its_own_needs_no_client(setup: Setup) -> None:
    client = await setup.client(setup.settings(grant=GrantType.JWT_BEARER))
    assert (client.kind, client.client_id, client.redirect_uri) == (RegistrationKind.CONFIGURED, "", "")
    assert setup.issuer.requests == []
