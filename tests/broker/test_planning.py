"""From a challenge to what is requested: resource, scopes, and a preview that changes nothing."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.broker_setup import NOTES, PUBLIC_URL, server, unattended
from fakes.authorization_server import FakeAuthorizationServer
from fakes.extension_server import ExtensionServer
from fakes.fixtures import Servers
from fakes.http_exchange import ABSENT
from fakes.mcp_server import FakeMcpServer
from mcp_auth_proxy.broker import planning
from mcp_auth_proxy.broker.backoff import Backoff
from mcp_auth_proxy.broker.client_registration import ClientRegistrar
from mcp_auth_proxy.broker.discovery import Discoverer
from mcp_auth_proxy.broker.planning import Planner
from mcp_auth_proxy.broker.token_requests import TokenClient
from mcp_auth_proxy.errors import AuthorizationError, AuthorizationServerUnavailable
from mcp_auth_proxy.models import GrantType
from mcp_auth_proxy.oauth.challenge import BearerChallenge
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.oauth.scopes import OFFLINE_ACCESS
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.registrations import Registrations
from store.builders import store_settings

READ = BearerChallenge(scopes=("read",))


@pytest.fixture
async def planner(tmp_path: Path) -> AsyncIterator[Planner]:
    database = await open_store(store_settings(tmp_path), announce=lambda line: None)
    fetcher = Fetcher()
    discoverer = Discoverer(fetcher=fetcher, allow_private=())
    registrar = ClientRegistrar(
        fetcher=fetcher, registrations=Registrations(database), public_url=PUBLIC_URL, clock=time.time
    )
    token_client = TokenClient(fetcher=fetcher, discoverer=discoverer, clock=time.time)
    yield Planner(
        discoverer=discoverer, registrar=registrar, token_client=token_client, backoff=Backoff(clock=time.time)
    )
    await fetcher.aclose()
    await database.close()


@pytest.mark.parametrize(
    ("resource", "planned"), [("auto", None), ("omit", ""), ("https://api.example/v1", "https://api.example/v1")]
)
async def test_the_resource_is_as_configured_else_as_the_metadata_spells_it(
    planner: Planner, upstream: FakeMcpServer, resource: str, planned: str | None
) -> None:
    plan = await planner.plan(NOTES, server(upstream.url, resource=resource), READ)
    assert plan.key.resource == (upstream.url if planned is None else planned)
    assert plan.key.upstream == upstream.origin
    assert (plan.key.account, plan.scopes) == (NOTES, ("read",))


async def test_a_server_without_metadata_is_its_own_resource(
    planner: Planner, servers: Servers, issuer: FakeAuthorizationServer
) -> None:
    upstream = await servers.mcp_server(issuer, metadata_at=set(), challenge_names_metadata=False)
    settings = server(f"{upstream.origin.replace('http', 'HTTP')}/mcp", issuer=issuer.issuer)
    plan = await planner.plan(NOTES, settings, None)
    assert plan.key.resource == upstream.url


async def test_a_discovery_without_an_end_is_given_up(
    planner: Planner, upstream: FakeMcpServer, issuer: FakeAuthorizationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "DISCOVERY_DEADLINE", 0.1)
    issuer.gates["metadata"] = asyncio.Event()
    with pytest.raises(AuthorizationServerUnavailable, match="server notes did not end"):
        await planner.plan(NOTES, server(upstream.url), READ)


async def test_offline_access_is_added_until_the_server_refuses_it(
    planner: Planner, upstream: FakeMcpServer, issuer: FakeAuthorizationServer
) -> None:
    issuer.metadata_changes = {"scopes_supported": ["read", OFFLINE_ACCESS]}
    first = await planner.plan(NOTES, server(upstream.url), READ)
    assert first.scopes == ("read", OFFLINE_ACCESS)
    planner.leave_out_offline_access(first)
    second = await planner.plan(NOTES, server(upstream.url), READ)
    assert second.scopes == ("read",)
    # A refusal of other scopes is no reason: there is nothing left to leave out.
    planner.leave_out_offline_access(second)
    assert (await planner.plan(NOTES, server(upstream.url, "other"), READ)).scopes == ("read", OFFLINE_ACCESS)


async def test_a_preview_registers_nothing_and_plans_the_same(
    planner: Planner, upstream: FakeMcpServer, issuer: FakeAuthorizationServer
) -> None:
    preview = await planner.preview(NOTES, server(upstream.url), READ)
    assert (preview.registration.client_id, issuer.registrations) == ("", 0)
    plan = await planner.plan(NOTES, server(upstream.url), READ)
    assert (preview.key, preview.scopes) == (plan.key, plan.scopes)
    assert issuer.registrations == 1


async def test_a_preview_for_another_device_needs_a_server_that_offers_it(planner: Planner, servers: Servers) -> None:
    async with ExtensionServer.running() as issuer:
        upstream = await servers.mcp_server(issuer)
        settings = server(upstream.url, grant=GrantType.DEVICE_CODE)
        assert (await planner.preview(NOTES, settings, READ)).device_endpoint.startswith(issuer.issuer)
        issuer.metadata_changes = {"device_authorization_endpoint": ABSENT}
        with pytest.raises(AuthorizationError, match="device_authorization_endpoint"):
            await planner.preview(NOTES, settings, READ)
        assert issuer.device_requests == 0


async def test_a_preview_without_a_user_requests_no_token(
    planner: Planner, upstream: FakeMcpServer, issuer: FakeAuthorizationServer
) -> None:
    plan = await planner.preview(NOTES, unattended(issuer, upstream.url), READ)
    assert (plan.registration.client_id, issuer.token_requests()) == ("agent", 0)


@pytest.mark.parametrize("changes", [{"token_endpoint": ABSENT}, {"issuer": "https://elsewhere.example"}])
async def test_a_plan_fails_with_the_documents_that_it_rests_on(
    planner: Planner, upstream: FakeMcpServer, issuer: FakeAuthorizationServer, changes: dict[str, Any]
) -> None:
    issuer.metadata_changes = changes
    with pytest.raises(AuthorizationError, match="is refused"):
        await planner.plan(NOTES, server(upstream.url), READ)
    assert issuer.registrations == 0
