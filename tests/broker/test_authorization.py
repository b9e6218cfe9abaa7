"""Authorizations: what a refusal changes for the next one, and which stored flow is taken up again."""

from pathlib import Path

import pytest

from broker.broker_setup import NOTES, BrokerSetup, broker_setup, server, unattended
from fakes.authorization_server import FakeAuthorizationServer
from fakes.extension_server import ExtensionServer
from fakes.fixtures import Servers
from fakes.http_exchange import FakeResponse
from fakes.mcp_server import FakeMcpServer
from mcp_auth_proxy.broker import ChallengeHistory, PendingAuthorization
from mcp_auth_proxy.broker.backoff import FIRST
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError
from mcp_auth_proxy.models import GrantType
from mcp_auth_proxy.oauth.scopes import OFFLINE_ACCESS


async def refused(setup: BrokerSetup, match: str) -> None:
    """Let the authorization server refuse the authorization that waits, or a new one."""
    pending = await setup.pending()
    with pytest.raises(AuthorizationError, match=match):
        await setup.broker.complete(*await setup.callback(pending))
    with pytest.raises(AuthorizationDenied, match=match):
        await pending.wait(0)


async def test_scopes_that_were_refused_are_asked_for_without_offline_access(
    setup: BrokerSetup, issuer: FakeAuthorizationServer, upstream: FakeMcpServer
) -> None:
    upstream.scopes = ("read",)
    issuer.metadata_changes = {"scopes_supported": ["read", OFFLINE_ACCESS]}
    issuer.authorize_error = ("invalid_scope", "not for you")
    assert OFFLINE_ACCESS in (await setup.pending()).flow.scopes
    await refused(setup, "invalid_scope")
    issuer.authorize_error = None
    assert OFFLINE_ACCESS not in (await setup.pending()).flow.scopes
    assert await setup.connect() is not None


async def test_a_client_that_the_server_has_forgotten_is_registered_again_with_the_next_request(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    issuer.answers["token"] = FakeResponse.json({"error": "invalid_client"}, 401)
    await refused(setup, "invalid_client")
    issuer.answers.clear()
    assert await setup.connect() is not None
    assert issuer.registrations == 2


async def test_any_other_refusal_changes_nothing_for_the_next_one(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    issuer.authorize_error = ("access_denied", "not today")
    await refused(setup, "access_denied")
    issuer.authorize_error = None
    assert await setup.connect() is not None
    assert issuer.registrations == 1


async def test_a_refusal_where_nobody_is_asked_is_told_to_the_request(
    issuer: FakeAuthorizationServer, upstream: FakeMcpServer, tmp_path: Path
) -> None:
    issuer.answers["token"] = FakeResponse.json({"error": "unauthorized_client"}, 400)
    async with broker_setup(tmp_path, unattended(issuer, upstream.url)) as setup:
        with pytest.raises(AuthorizationDenied, match="unauthorized_client") as denied:
            await setup.challenged()
        assert denied.value.error == "unauthorized_client"
        assert setup.announced == []
        issuer.answers.clear()
        setup.clock.ahead += 2 * FIRST
        assert await setup.challenged() is not None


@pytest.mark.parametrize(("error", "registrations"), [("invalid_client", 2), ("unauthorized_client", 1)])
async def test_a_refused_device_authorization_is_told_to_the_request(
    servers: Servers, tmp_path: Path, error: str, registrations: int
) -> None:
    async with ExtensionServer.running() as issuer:
        upstream = await servers.mcp_server(issuer)
        issuer.answers["device_authorization"] = FakeResponse.json({"error": error}, 400)
        async with broker_setup(tmp_path, server(upstream.url, grant=GrantType.DEVICE_CODE)) as setup:
            with pytest.raises(AuthorizationDenied, match=error):
                await setup.challenged()
            issuer.answers.clear()
            setup.clock.ahead += 2 * FIRST
            assert isinstance(await setup.challenged(), PendingAuthorization)
            assert issuer.registrations == registrations


@pytest.mark.parametrize(("scopes", "resumed"), [(("read",), True), ((), True), (("read", "write"), False)])
async def test_a_stored_flow_is_taken_up_if_it_asks_for_enough(
    setup: BrokerSetup, upstream: FakeMcpServer, tmp_path: Path, scopes: tuple[str, ...], resumed: bool
) -> None:
    upstream.scopes = ("read",)
    pending = await setup.pending()
    upstream.scopes = scopes
    async with broker_setup(tmp_path, *setup.servers.values()) as another:
        later = await another.pending()
        assert (later.flow.id == pending.flow.id) is resumed
        assert len(another.announced) == (0 if resumed else 1)


async def test_a_stored_flow_whose_link_is_about_to_expire_is_not_taken_up(setup: BrokerSetup, tmp_path: Path) -> None:
    pending = await setup.pending()
    setup.clock.ahead += 545
    async with broker_setup(tmp_path, *setup.servers.values(), clock=setup.clock) as another:
        assert (await another.pending()).flow.id != pending.flow.id


async def test_a_stored_flow_with_another_redirect_uri_is_not_taken_up(setup: BrokerSetup, tmp_path: Path) -> None:
    pending = await setup.pending()
    async with broker_setup(tmp_path, *setup.servers.values(), public_url="http://127.0.0.1:9999") as another:
        fresh = await another.pending()
        assert fresh.flow.id != pending.flow.id
        assert fresh.link.startswith("http://127.0.0.1:9999/")


async def test_a_step_up_without_an_end_is_given_up(setup: BrokerSetup, upstream: FakeMcpServer) -> None:
    token = await setup.connect()
    upstream.endless_403 = "same"
    with pytest.raises(AuthorizationError, match="notes"):
        for _ in range(10):
            assert isinstance(await setup.challenged(token, history=ChallengeHistory()), PendingAuthorization)
            await setup.broker.complete(*await setup.callback(pending_of(setup)))
            renewed = await setup.broker.token(NOTES)
            assert renewed is not None
            token = renewed


def pending_of(setup: BrokerSetup) -> PendingAuthorization:
    pending = setup.broker.pending(NOTES)
    assert pending is not None
    return pending


async def test_a_user_is_waited_for_until_the_authorization_ends(setup: BrokerSetup) -> None:
    seen = [setup.broker.waits_for_user]
    await setup.pending()
    seen.append(setup.broker.waits_for_user)
    assert await setup.connect() is not None
    seen.append(setup.broker.waits_for_user)
    assert seen == [False, True, False]
