"""The broker's verbs: tokens, challenges, callbacks, and what the commands ask of it."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from broker.scene import NOTES, BrokerScene, broker_scene, server, unattended
from fakes.authorization_server import FakeAuthorizationServer
from fakes.exchange import ABSENT, Answer
from fakes.fixtures import Servers
from fakes.mcp_server import FakeMcpServer
from mcp_auth_proxy.broker import ChallengeHistory, ConnectionState, PendingAuthorization, Revocation
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, CallbackRefused
from mcp_auth_proxy.models import LOCAL, AccessToken, Account, FlowStatus

# Challenges


async def test_a_first_401_starts_an_authorization_and_the_consent_brings_a_good_token(it: BrokerScene) -> None:
    assert it.broker.token_nowait(NOTES) == (False, None)
    assert await it.broker.token(NOTES) is None
    assert it.broker.token_nowait(NOTES) == (True, None)
    pending = await it.pending()
    assert it.broker.token_nowait(NOTES) == (False, None)
    assert it.broker.pending(NOTES) is pending
    assert it.announced == [(pending.flow, pending.link)]
    waiting = [asyncio.create_task(pending.wait(5)) for _ in range(3)]
    flow = await it.broker.complete(*await it.callback(pending))
    assert flow.id == pending.flow.id
    token = await it.broker.token(NOTES)
    assert token is not None
    assert [await task for task in waiting] == [token] * 3
    assert it.broker.token_nowait(NOTES) == (True, token)
    assert it.broker.pending(NOTES) is None
    assert (await it.ask(token))[0] == 200


async def test_requests_that_are_challenged_at_once_share_one_authorization(
    it: BrokerScene, issuer: FakeAuthorizationServer
) -> None:
    outcomes = await asyncio.gather(*(it.challenged() for _ in range(10)))
    assert len({id(outcome) for outcome in outcomes}) == 1
    assert (issuer.registrations, len(it.announced)) == (1, 1)


async def test_a_401_to_an_older_token_is_answered_with_the_newer_one(
    it: BrokerScene, issuer: FakeAuthorizationServer
) -> None:
    old = await it.connect()
    issuer.end_access_tokens()
    new = await it.challenged(old)
    assert isinstance(new, AccessToken)
    assert new.generation > old.generation
    assert await it.challenged(old) is new
    assert (issuer.refreshes, (await it.ask(new))[0]) == (1, 200)


async def test_a_403_for_another_reason_belongs_to_the_client(it: BrokerScene) -> None:
    token = await it.connect()
    outcome = await it.broker.challenged(NOTES, status=403, challenge=[], used=token, history=ChallengeHistory())
    assert outcome is None


async def test_a_step_up_keeps_the_scopes_that_were_granted(it: BrokerScene, upstream: FakeMcpServer) -> None:
    upstream.scopes = ("read",)
    token = await it.connect()
    upstream.scopes = ("write",)
    status, challenge = await it.ask(token)
    pending = await it.broker.challenged(
        NOTES, status=status, challenge=challenge, used=token, history=ChallengeHistory()
    )
    assert status == 403
    assert isinstance(pending, PendingAuthorization)
    assert {"read", "write"} <= set(pending.flow.scopes)


async def test_one_request_gives_up_on_a_server_that_refuses_every_token(
    it: BrokerScene, issuer: FakeAuthorizationServer, upstream: FakeMcpServer
) -> None:
    token: AccessToken = await it.connect()
    upstream.endless_401 = True
    history = ChallengeHistory()
    for _ in range(2):
        renewed = await it.challenged(token, history=history)
        assert isinstance(renewed, AccessToken)
        token = renewed
    assert isinstance(await it.challenged(token, history=history), PendingAuthorization)
    with pytest.raises(AuthorizationError, match=r"has just issued .*servers\.notes\.oauth\.resource"):
        await it.challenged(token, history=history)
    assert issuer.refreshes == 2


async def test_without_a_user_the_token_is_obtained_within_the_request(
    issuer: FakeAuthorizationServer, upstream: FakeMcpServer, tmp_path: Path
) -> None:
    async with broker_scene(tmp_path, unattended(issuer, upstream.url)) as it:
        token = await it.challenged()
        assert isinstance(token, AccessToken)
        assert (await it.ask(token))[0] == 200
        assert it.announced == []


async def test_another_run_resumes_the_flow_that_waits(it: BrokerScene, tmp_path: Path) -> None:
    pending = await it.pending()
    async with broker_scene(tmp_path, *it.servers.values()) as another:
        resumed = await another.pending()
        assert (resumed.flow.id, resumed.link) == (pending.flow.id, pending.link)
        assert another.announced == []
        # The first one learns of the consent from the store.
        await another.broker.complete(*await another.callback(resumed))
        assert await pending.wait(5) is not None


async def test_a_link_that_is_about_to_expire_is_replaced_and_the_old_one_still_counts(it: BrokerScene) -> None:
    pending = await it.pending()
    callback = await it.callback(pending)
    assert await it.broker.fresh_link(pending) is pending
    it.clock.ahead += 590
    assert it.broker.pending(NOTES) is None
    fresh = await it.broker.fresh_link(pending)
    assert fresh.flow.id != pending.flow.id
    assert await it.broker.fresh_link(pending) is fresh
    await it.broker.complete(*callback)
    assert await fresh.wait(0) is await pending.wait(0) is not None


# Callbacks


async def test_a_refused_callback_fails_the_flow_for_everyone_who_waits(
    it: BrokerScene, issuer: FakeAuthorizationServer
) -> None:
    issuer.authorize_error = ("access_denied", "not today")
    pending = await it.pending()
    with pytest.raises(AuthorizationDenied, match="access_denied"):
        await it.broker.complete(*await it.callback(pending))
    with pytest.raises(AuthorizationDenied, match="access_denied"):
        await pending.wait(0)
    with pytest.raises(CallbackRefused):
        await it.broker.open_link("notes", pending.flow.id)
    assert it.broker.pending(NOTES) is None


async def test_a_callback_whose_flow_was_cancelled_meanwhile_stores_nothing_and_revokes(
    it: BrokerScene, issuer: FakeAuthorizationServer
) -> None:
    pending = await it.pending()
    callback = await it.callback(pending)
    issuer.gates["token"] = gate = asyncio.Event()
    completing = asyncio.create_task(it.broker.complete(*callback))
    await issuer.log.wait_for(lambda received: received.endpoint == "token")
    await it.flows.cancel(NOTES)
    gate.set()
    with pytest.raises(AuthorizationDenied, match="cancelled"):
        await completing
    assert await it.grants.all() == []
    assert issuer.revocations == 1


# authorize


async def test_authorize_returns_a_stored_token_without_asking_anyone(
    it: BrokerScene, issuer: FakeAuthorizationServer
) -> None:
    token = await it.connect()
    before = len(issuer.requests)
    assert await it.broker.authorize(NOTES, status=401, challenge=[]) is token
    assert len(issuer.requests) == before


@pytest.mark.parametrize("status", [200, 403, 404])
async def test_authorize_does_nothing_if_the_server_asks_for_no_authorization(it: BrokerScene, status: int) -> None:
    assert await it.broker.authorize(NOTES, status=status, challenge=[]) is None
    assert it.announced == []


async def test_authorize_starts_an_authorization_or_joins_the_one_that_waits(it: BrokerScene) -> None:
    status, challenge = await it.ask()
    pending = await it.broker.authorize(NOTES, status=status, challenge=challenge)
    assert isinstance(pending, PendingAuthorization)
    assert await it.broker.authorize(NOTES, status=status, challenge=challenge) is pending


# disconnect


async def test_disconnect_deletes_and_revokes_and_the_next_request_starts_over(
    it: BrokerScene, issuer: FakeAuthorizationServer
) -> None:
    await it.connect()
    result = await it.broker.disconnect(NOTES)
    (grant,) = result.grants
    assert (result.account, result.client_forgotten) == (NOTES, False)
    assert (grant.issuer, grant.revocation, grant.reason) == (issuer.issuer, Revocation.REVOKED, "")
    assert issuer.revocations == 1
    assert await it.broker.token(NOTES) is None
    assert await it.grants.all() == []
    await it.connect()
    assert issuer.registrations == 1
    assert (await it.broker.disconnect(NOTES, forget_client=True)).client_forgotten
    await it.connect()
    assert issuer.registrations == 2


async def test_disconnect_says_what_could_not_be_revoked_and_deletes_it_all_the_same(
    it: BrokerScene, issuer: FakeAuthorizationServer
) -> None:
    await it.connect()
    issuer.answers["revoke"] = Answer.html(status=500)
    (grant,) = (await it.broker.disconnect(NOTES)).grants
    assert grant.revocation is Revocation.FAILED
    assert "answered 500" in grant.reason
    assert await it.grants.all() == []


async def test_disconnect_where_no_revocation_is_offered(it: BrokerScene, issuer: FakeAuthorizationServer) -> None:
    issuer.metadata_changes = {"revocation_endpoint": ABSENT}
    await it.connect()
    (grant,) = (await it.broker.disconnect(NOTES)).grants
    assert (grant.revocation, grant.reason, issuer.revocations) == (Revocation.NOT_OFFERED, "", 0)


async def test_disconnect_of_what_is_not_connected_lists_nothing(it: BrokerScene) -> None:
    assert (await it.broker.disconnect(NOTES)).grants == ()
    await it.connect()
    (stored,) = await it.grants.all()
    await it.grants.end(stored.id, version=stored.version, reason="invalid_grant", now=it.clock())
    assert (await it.broker.disconnect(NOTES)).grants == ()
    assert await it.grants.all() == []


async def test_disconnect_ends_the_authorization_that_waits(it: BrokerScene) -> None:
    pending = await it.pending()
    await it.broker.disconnect(NOTES)
    with pytest.raises(AuthorizationDenied, match="cancelled"):
        await pending.wait(0)
    flow = await it.flows.get(pending.flow.id)
    assert flow is not None
    assert flow.status is FlowStatus.FAILED


async def test_a_renewal_in_progress_does_not_bring_a_disconnected_token_back(
    it: BrokerScene, issuer: FakeAuthorizationServer
) -> None:
    token = await it.connect()
    issuer.end_access_tokens()
    issuer.gates["token"] = gate = asyncio.Event()
    renewing = asyncio.create_task(it.challenged(token))
    await issuer.log.wait_for(lambda received: received.form.get("grant_type") == "refresh_token")
    await it.broker.disconnect(NOTES)
    gate.set()
    assert isinstance(await renewing, PendingAuthorization)
    assert await it.broker.token(NOTES) is None


# connections


async def test_connections_follow_a_grant_from_consent_to_its_end(
    it: BrokerScene, issuer: FakeAuthorizationServer
) -> None:
    async def only() -> tuple[ConnectionState, str]:
        (connection,) = await it.broker.connections()
        assert connection.account == NOTES
        return connection.state, connection.word

    assert await only() == (ConnectionState.NOT_CONNECTED, "needs consent")
    pending = await it.pending()
    assert await only() == (ConnectionState.NOT_CONNECTED, "authorizing")
    await it.broker.complete(*await it.callback(pending))
    assert await only() == (ConnectionState.CONNECTED, "connected")
    (connection,) = await it.broker.connections()
    (grant,) = await it.grants.all()
    assert (connection.issuer, connection.granted_at) == (issuer.issuer, grant.granted_at)
    assert (connection.token_expires_at, connection.renews_itself) == (grant.tokens.expires_at, True)
    assert not [secret for secret in issuer.secrets() if secret in repr(connection)]
    await it.grants.end(grant.id, version=grant.version, reason="invalid_grant", now=it.clock())
    assert await only() == (ConnectionState.ENDED, "ended")
    (connection,) = await it.broker.connections()
    assert connection.reason == "invalid_grant"


async def test_every_server_has_a_connection_in_the_order_of_the_configuration(
    servers: Servers, issuer: FakeAuthorizationServer, tmp_path: Path
) -> None:
    urls = {name: (await servers.mcp_server(issuer)).url for name in ("b", "a", "c")}
    async with broker_scene(tmp_path, *(server(url, name) for name, url in urls.items())) as it:
        await it.connect(Account(LOCAL, "a"))
        found = await it.broker.connections()
        assert [(c.account.server, c.word) for c in found] == [
            ("b", "needs consent"),
            ("a", "connected"),
            ("c", "needs consent"),
        ]


async def test_a_grant_for_what_is_configured_no_longer_is_no_connection(it: BrokerScene) -> None:
    await it.connect()
    before = it.servers["notes"]
    it.servers["notes"] = replace(before, url=f"{before.url}?key=canary-in-url", oauth=before.oauth)
    (connection,) = await it.broker.connections()
    assert connection.state is ConnectionState.CONNECTED
    assert "canary" not in connection.url
    it.servers["notes"] = replace(before, url="https://elsewhere.example/mcp")
    (connection,) = await it.broker.connections()
    assert (connection.state, connection.issuer) == (ConnectionState.NOT_CONNECTED, "")
