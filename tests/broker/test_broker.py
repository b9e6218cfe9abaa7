"""The broker's methods: tokens, challenges, callbacks, and those for the commands."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from broker.broker_setup import NOTES, BrokerSetup, broker_setup, server, unattended
from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.http_exchange import ABSENT, FakeResponse
from fakes.mcp_server import FakeMcpServer
from mcp_auth_proxy.broker import ChallengeHistory, ConnectionState, PendingAuthorization, Revocation, flows
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, CallbackRefused
from mcp_auth_proxy.models import LOCAL, AccessToken, Account, FlowStatus

# Challenges


async def test_a_first_401_starts_an_authorization_and_the_consent_brings_a_valid_token(setup: BrokerSetup) -> None:
    assert setup.broker.token_nowait(NOTES) == (False, None)
    assert await setup.broker.token(NOTES) is None
    assert setup.broker.token_nowait(NOTES) == (True, None)
    pending = await setup.pending()
    assert setup.broker.token_nowait(NOTES) == (False, None)
    assert setup.broker.pending(NOTES) is pending
    assert setup.announced == [(pending.flow, pending.link)]
    waiting = [asyncio.create_task(pending.wait(5)) for _ in range(3)]
    flow = await setup.broker.complete(*await setup.callback(pending))
    assert flow.id == pending.flow.id
    token = await setup.broker.token(NOTES)
    assert token is not None
    assert [await task for task in waiting] == [token] * 3
    assert setup.broker.token_nowait(NOTES) == (True, token)
    assert setup.broker.pending(NOTES) is None
    assert (await setup.ask(token))[0] == 200


async def test_requests_that_are_challenged_at_once_share_one_authorization(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    outcomes = await asyncio.gather(*(setup.challenged() for _ in range(10)))
    assert len({id(outcome) for outcome in outcomes}) == 1
    assert (issuer.registrations, len(setup.announced)) == (1, 1)


async def test_a_401_to_an_older_token_is_answered_with_the_newer_one(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    old = await setup.connect()
    issuer.end_access_tokens()
    new = await setup.challenged(old)
    assert isinstance(new, AccessToken)
    assert new.generation > old.generation
    assert await setup.challenged(old) is new
    assert (issuer.refreshes, (await setup.ask(new))[0]) == (1, 200)


async def test_a_403_for_another_reason_is_for_the_client(setup: BrokerSetup) -> None:
    token = await setup.connect()
    outcome = await setup.broker.challenged(
        NOTES, sent_to=setup.servers["notes"], status=403, challenge=[], used=token, history=ChallengeHistory()
    )
    assert outcome is None


async def test_a_step_up_keeps_the_scopes_that_were_granted(setup: BrokerSetup, upstream: FakeMcpServer) -> None:
    upstream.scopes = ("read",)
    token = await setup.connect()
    upstream.scopes = ("write",)
    status, challenge = await setup.ask(token)
    pending = await setup.broker.challenged(
        NOTES,
        sent_to=setup.servers["notes"],
        status=status,
        challenge=challenge,
        used=token,
        history=ChallengeHistory(),
    )
    assert status == 403
    assert isinstance(pending, PendingAuthorization)
    assert {"read", "write"} <= set(pending.flow.scopes)


async def test_one_request_gives_up_on_a_server_that_refuses_every_token(
    setup: BrokerSetup, issuer: FakeAuthorizationServer, upstream: FakeMcpServer
) -> None:
    token: AccessToken = await setup.connect()
    upstream.endless_401 = True
    history = ChallengeHistory()
    for _ in range(2):
        renewed = await setup.challenged(token, history=history)
        assert isinstance(renewed, AccessToken)
        token = renewed
    assert isinstance(await setup.challenged(token, history=history), PendingAuthorization)
    with pytest.raises(AuthorizationError, match=r"has just issued .*servers\.notes\.oauth\.resource"):
        await setup.challenged(token, history=history)
    assert issuer.refreshes == 2


async def test_without_a_user_the_token_is_obtained_within_the_request(
    issuer: FakeAuthorizationServer, upstream: FakeMcpServer, tmp_path: Path
) -> None:
    async with broker_setup(tmp_path, unattended(issuer, upstream.url)) as setup:
        token = await setup.challenged()
        assert isinstance(token, AccessToken)
        assert (await setup.ask(token))[0] == 200
        assert setup.announced == []


async def test_another_run_resumes_the_flow_that_waits(setup: BrokerSetup, tmp_path: Path) -> None:
    pending = await setup.pending()
    async with broker_setup(tmp_path, *setup.servers.values()) as another:
        resumed = await another.pending()
        assert (resumed.flow.id, resumed.link) == (pending.flow.id, pending.link)
        assert another.announced == []
        # The first one learns of the consent from the store.
        await another.broker.complete(*await another.callback(resumed))
        assert await pending.wait(5) is not None


async def test_the_expired_links_of_other_accounts_are_dropped(
    setup: BrokerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows, "MANY", 2)
    others = [NOTES._replace(name=name) for name in ("a", "b")]
    for account in others:
        await setup.pending(account)
    await setup.pending()
    assert all(setup.broker.pending(account) is not None for account in (*others, NOTES))
    setup.clock.ahead += flows.FLOW_LIFETIME + 1
    await setup.pending(NOTES._replace(name="c"))
    for account in others:
        assert setup.broker.token_nowait(account) == (True, None)


async def test_a_link_that_is_about_to_expire_is_replaced_and_the_old_one_still_counts(setup: BrokerSetup) -> None:
    pending = await setup.pending()
    callback = await setup.callback(pending)
    assert await setup.broker.fresh_link(pending) is pending
    setup.clock.ahead += 590
    assert setup.broker.pending(NOTES) is None
    fresh = await setup.broker.fresh_link(pending)
    assert fresh.flow.id != pending.flow.id
    assert await setup.broker.fresh_link(pending) is fresh
    await setup.broker.complete(*callback)
    assert await fresh.wait(0) is await pending.wait(0) is not None


# Callbacks


async def test_a_refused_callback_fails_the_flow_for_everyone_who_waits(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    issuer.authorize_error = ("access_denied", "not today")
    pending = await setup.pending()
    with pytest.raises(AuthorizationDenied, match="access_denied"):
        await setup.broker.complete(*await setup.callback(pending))
    with pytest.raises(AuthorizationDenied, match="access_denied"):
        await pending.wait(0)
    with pytest.raises(CallbackRefused):
        await setup.broker.open_link("notes", pending.flow.id)
    assert setup.broker.pending(NOTES) is None


async def test_a_callback_whose_flow_was_cancelled_meanwhile_stores_nothing_and_revokes(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    pending = await setup.pending()
    callback = await setup.callback(pending)
    issuer.gates["token"] = gate = asyncio.Event()
    completing = asyncio.create_task(setup.broker.complete(*callback))
    await issuer.log.wait_for(lambda received: received.endpoint == "token")
    await setup.flows.cancel(NOTES)
    gate.set()
    with pytest.raises(AuthorizationDenied, match="cancelled"):
        await completing
    assert await setup.grants.all() == []
    assert issuer.revocations == 1


# authorize


async def test_authorize_returns_a_stored_token_without_asking_anyone(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    token = await setup.connect()
    before = len(issuer.requests)
    assert await setup.broker.authorize(NOTES, status=401, challenge=[]) is token
    assert len(issuer.requests) == before


@pytest.mark.parametrize("status", [200, 403, 404])
async def test_authorize_does_nothing_if_the_server_asks_for_no_authorization(setup: BrokerSetup, status: int) -> None:
    assert await setup.broker.authorize(NOTES, status=status, challenge=[]) is None
    assert setup.announced == []


async def test_authorize_starts_an_authorization_or_joins_the_one_that_waits(setup: BrokerSetup) -> None:
    status, challenge = await setup.ask()
    pending = await setup.broker.authorize(NOTES, status=status, challenge=challenge)
    assert isinstance(pending, PendingAuthorization)
    assert await setup.broker.authorize(NOTES, status=status, challenge=challenge) is pending


# disconnect


async def test_disconnect_deletes_and_revokes_and_the_next_request_starts_over(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    await setup.connect()
    result = await setup.broker.disconnect(NOTES)
    (grant,) = result.grants
    assert (result.account, result.client_forgotten) == (NOTES, False)
    assert (grant.issuer, grant.revocation, grant.reason) == (issuer.issuer, Revocation.REVOKED, "")
    assert issuer.revocations == 1
    assert await setup.broker.token(NOTES) is None
    assert await setup.grants.all() == []
    await setup.connect()
    assert issuer.registrations == 1
    assert (await setup.broker.disconnect(NOTES, forget_client=True)).client_forgotten
    await setup.connect()
    assert issuer.registrations == 2


async def test_disconnect_says_what_could_not_be_revoked_and_deletes_it_all_the_same(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    await setup.connect()
    issuer.answers["revoke"] = FakeResponse.html(status=500)
    (grant,) = (await setup.broker.disconnect(NOTES)).grants
    assert grant.revocation is Revocation.FAILED
    assert "answered 500" in grant.reason
    assert await setup.grants.all() == []


async def test_disconnect_without_revocation_support_says_so(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    issuer.metadata_changes = {"revocation_endpoint": ABSENT}
    await setup.connect()
    (grant,) = (await setup.broker.disconnect(NOTES)).grants
    assert (grant.revocation, grant.reason, issuer.revocations) == (Revocation.NOT_OFFERED, "", 0)


async def test_disconnect_without_a_grant_lists_nothing(setup: BrokerSetup) -> None:
    assert (await setup.broker.disconnect(NOTES)).grants == ()
    await setup.connect()
    (stored,) = await setup.grants.all()
    await setup.grants.end(stored.id, version=stored.version, reason="invalid_grant", now=setup.clock())
    assert (await setup.broker.disconnect(NOTES)).grants == ()
    assert await setup.grants.all() == []


async def test_disconnect_ends_the_authorization_that_waits(setup: BrokerSetup) -> None:
    pending = await setup.pending()
    await setup.broker.disconnect(NOTES)
    with pytest.raises(AuthorizationDenied, match="cancelled"):
        await pending.wait(0)
    flow = await setup.flows.get(pending.flow.id)
    assert flow is not None
    assert flow.status is FlowStatus.FAILED


async def test_a_renewal_in_progress_does_not_bring_a_disconnected_token_back(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    token = await setup.connect()
    issuer.end_access_tokens()
    issuer.gates["token"] = gate = asyncio.Event()
    renewing = asyncio.create_task(setup.challenged(token))
    await issuer.log.wait_for(lambda received: received.form.get("grant_type") == "refresh_token")
    await setup.broker.disconnect(NOTES)
    gate.set()
    assert isinstance(await renewing, PendingAuthorization)
    assert await setup.broker.token(NOTES) is None


# connections


async def test_connections_follow_a_grant_from_consent_to_its_end(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    async def only() -> tuple[ConnectionState, str]:
        (connection,) = await setup.broker.connections()
        assert connection.account == NOTES
        return connection.state, connection.label

    assert await only() == (ConnectionState.NOT_CONNECTED, "needs consent")
    pending = await setup.pending()
    assert await only() == (ConnectionState.NOT_CONNECTED, "authorizing")
    await setup.broker.complete(*await setup.callback(pending))
    assert await only() == (ConnectionState.CONNECTED, "connected")
    (connection,) = await setup.broker.connections()
    (grant,) = await setup.grants.all()
    assert (connection.issuer, connection.granted_at) == (issuer.issuer, grant.granted_at)
    assert (connection.token_expires_at, connection.renews_itself) == (grant.tokens.expires_at, True)
    assert not [secret for secret in issuer.secrets() if secret in repr(connection)]
    await setup.grants.end(grant.id, version=grant.version, reason="invalid_grant", now=setup.clock())
    assert await only() == (ConnectionState.ENDED, "ended")
    (connection,) = await setup.broker.connections()
    assert connection.reason == "invalid_grant"


async def test_every_server_has_a_connection_in_the_order_of_the_configuration(
    servers: Servers, issuer: FakeAuthorizationServer, tmp_path: Path
) -> None:
    urls = {name: (await servers.mcp_server(issuer)).url for name in ("b", "a", "c")}
    async with broker_setup(tmp_path, *(server(url, name) for name, url in urls.items())) as setup:
        await setup.connect(Account(LOCAL, "a"))
        found = await setup.broker.connections()
        assert [(c.account.server, c.label) for c in found] == [
            ("b", "needs consent"),
            ("a", "connected"),
            ("c", "needs consent"),
        ]


async def test_a_grant_for_an_earlier_configuration_is_not_a_connection(setup: BrokerSetup) -> None:
    await setup.connect()
    before = setup.servers["notes"]
    setup.servers["notes"] = replace(before, url=f"{before.url}?key=canary-in-url", oauth=before.oauth)
    (connection,) = await setup.broker.connections()
    assert connection.state is ConnectionState.CONNECTED
    assert "canary" not in connection.url
    setup.servers["notes"] = replace(before, url="https://elsewhere.example/mcp")
    (connection,) = await setup.broker.connections()
    assert (connection.state, connection.issuer) == (ConnectionState.NOT_CONNECTED, "")
