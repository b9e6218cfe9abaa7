"""When and how a grant is renewed, on a real store, with a fake clock and a scripted token endpoint."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.proxy import until
from mcp_auth_proxy.broker import renewal, renewal_lease
from mcp_auth_proxy.broker.backoff import FIRST, LONGEST, Backoff
from mcp_auth_proxy.broker.client_registration import ClientRegistrar
from mcp_auth_proxy.broker.connection_notes import ConnectionJournal, Happening
from mcp_auth_proxy.broker.refresh_rate import RefreshRate
from mcp_auth_proxy.broker.refusals import REJECTING_ERRORS
from mcp_auth_proxy.broker.renewal import MARGIN_MAX, SAVE_SECONDS, Demand, Renewer, renew_at, renewable
from mcp_auth_proxy.broker.renewal_lease import GrantEnded, HeldElsewhere
from mcp_auth_proxy.broker.token_requests import TokenClient
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import (
    AuthorizationServerUnavailable,
    DocumentRefused,
    RefreshRateExceeded,
    StoreUnavailable,
    TokenRefused,
)
from mcp_auth_proxy.models import HEALTHY, Account, Grant, GrantType, RenewalHealth, TokenSet
from mcp_auth_proxy.oauth.fetch import AddressPolicy, Fetcher
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.store import Engine, lease, open_store
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.lease import Owners
from mcp_auth_proxy.store.refresh_slots import RefreshSlots
from mcp_auth_proxy.store.registrations import Registrations
from store.builders import NOW, dead_owner, grant, store_settings, tokens

SERVER = ServerSettings(name="linear", url="https://linear.example/mcp")


class Clock:
    now: float = NOW + 10

    def __call__(self) -> float:
        return self.now


class Endpoint(TokenClient):
    """A scripted token endpoint: answers with ``outcome``, and records what it was asked."""

    def __init__(self) -> None:
        self.outcome: TokenSet | Exception = tokens("2", NOW + 10)
        self.asked: list[Grant] = []
        self.meanwhile: Callable[[], Awaitable[object]] | None = None

    async def refresh(self, server: ServerSettings, grant: Grant) -> TokenSet:
        self.asked.append(grant)
        if self.meanwhile is not None:
            await self.meanwhile()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Setup:
    def __init__(self, database: Engine, stored: Grant, grants: Grants) -> None:
        self.database = database
        self.grants = grants
        self.grant = stored
        self.clock = Clock()
        self.endpoint = Endpoint()
        self.registrations = Registrations(database)
        self.told: list[tuple[Happening, str]] = []
        """What journals were told, but for each failed attempt."""
        self.renewer = self.another_renewer()

    def another_renewer(self, grants: Grants | None = None, settled: Callable[[], bool] = lambda: True) -> Renewer:
        """A renewer as another process would have it: with an owner name of its own."""
        registrar = ClientRegistrar(
            fetcher=Fetcher(), registrations=self.registrations, public_url="http://127.0.0.1:8787", clock=self.clock
        )
        journal = ConnectionJournal(clock=self.clock)
        journal.listen(self.heard)
        return Renewer(
            token_client=self.endpoint,
            registrar=registrar,
            grants=grants or self.grants,
            backoff=Backoff(clock=self.clock),
            outages=OutageLog(),
            journal=journal,
            rate=RefreshRate(slots=RefreshSlots(self.database), clock=self.clock),
            clock=self.clock,
            settled=settled,
        )

    def heard(self, account: Account, happening: Happening, reason: str) -> None:
        if happening is not Happening.NOT_RENEWED:
            self.told.append((happening, reason))

    async def registered(self) -> bool:
        """Whether the store still has the client registration of the grant."""
        client = self.grant.registration
        return await self.registrations.find(client.server, client.issuer, client.redirect_uri) is not None

    def backoff(self) -> float | None:
        """The seconds from now until a background renewal may be tried again."""
        at = self.renewer.retry_at(self.grant)
        return None if at is None else at - self.clock.now

    async def renew(self, *, rejected: bool = False) -> Grant:
        return await self.renewer.renew(SERVER, self.grant, Demand(rejected=lambda: rejected))

    async def stored(self) -> Grant:
        found = await self.grants.get(self.grant.id)
        assert found is not None
        return found


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    database = await open_store(store_settings(tmp_path))
    grants = Grants(database)
    setup = Setup(database, await grants.add(grant()), grants)
    await setup.registrations.save(setup.grant.registration)
    yield setup
    await database.close()


# When


@given(st.floats(min_value=0, max_value=1e9))
def test_a_token_is_renewed_a_fifth_ahead_and_at_most_four_minutes(lifetime: float) -> None:
    due = renew_at(TokenSet(access_token="x", obtained_at=NOW, expires_at=NOW + lifetime))
    assert due is not None
    ahead = NOW + lifetime - due
    margin = min(lifetime * 0.2, MARGIN_MAX)
    assert margin * 0.999 - 1e-3 <= ahead <= margin * 1.2 + 1e-3
    assert due >= NOW - 1e-3


def test_the_time_of_renewal_is_jittered() -> None:
    assert len({renew_at(tokens()) for _ in range(20)}) > 1


def test_a_token_of_unknown_lifetime_is_not_renewed_ahead() -> None:
    assert renew_at(TokenSet(access_token="x", obtained_at=NOW)) is None


def test_a_token_that_is_expired_on_arrival_is_due_at_once() -> None:
    assert renew_at(TokenSet(access_token="x", obtained_at=NOW, expires_at=NOW - 100)) == NOW - 100


def test_a_grant_is_renewable_if_it_needs_no_user() -> None:
    without = replace(grant(), tokens=replace(tokens(), refresh_token=None))
    assert renewable(grant())
    assert not renewable(without)
    assert renewable(replace(without, grant_type=GrantType.CLIENT_CREDENTIALS))


# How


async def test_new_tokens_are_durable_when_they_are_returned(setup: Setup) -> None:
    renewed = await setup.renew()
    assert renewed.tokens.access_token == "canary-access-2"
    assert renewed.version == setup.grant.version + 1
    assert await setup.stored() == renewed
    assert renewed.refresh_begun_at is None


async def test_the_intent_is_stored_before_anything_is_sent(setup: Setup) -> None:
    seen: list[Grant] = []

    async def look() -> None:
        seen.append(await setup.stored())

    setup.endpoint.meanwhile = look
    await setup.renew()
    (during,) = seen
    assert during.refresh_begun_at == setup.clock.now
    assert setup.grants.owners.is_held(during.refresh_owner, setup.clock.now, setup.clock.now)
    assert during.tokens.access_token == "canary-access-1"


async def test_a_grant_that_was_renewed_meanwhile_is_returned_without_a_request(setup: Setup) -> None:
    newer = await setup.renew()
    assert await setup.renew() == newer
    assert len(setup.endpoint.asked) == 1


@pytest.mark.parametrize("how", ["ended", "deleted"])
async def test_a_grant_that_is_over_is_not_renewed(setup: Setup, how: str) -> None:
    if how == "ended":
        await setup.grants.end(setup.grant.id, version=setup.grant.version, reason="x", now=NOW)
    else:
        await setup.grants.delete(Account("local", "linear"))
    with pytest.raises(GrantEnded):
        await setup.renew()
    assert setup.endpoint.asked == []


async def test_invalid_grant_ends_it_with_the_reason(setup: Setup) -> None:  # F2
    setup.endpoint.outcome = TokenRefused("invalid_grant", "The authorization server refused: invalid_grant.")
    with pytest.raises(GrantEnded):
        await setup.renew(rejected=True)
    stored = await setup.stored()
    assert stored.ended_at == setup.clock.now
    assert "invalid_grant" in stored.ended_reason
    assert await setup.registered()
    assert setup.told == [(Happening.ENDED, stored.ended_reason)]


async def test_invalid_grant_for_a_token_that_works_is_believed_once_it_has_expired(setup: Setup) -> None:  # F2
    setup.endpoint.outcome = TokenRefused("invalid_grant", "The authorization server refused: invalid_grant.")
    degraded = await setup.renew()
    assert degraded.tokens == setup.grant.tokens
    assert degraded.health == RenewalHealth(refused_at=setup.clock.now, failure=str(setup.endpoint.outcome))
    assert (await setup.stored()).health == degraded.health
    assert [happening for happening, _ in setup.told] == [Happening.DEGRADED]
    # Neither this process, which may not know it yet, nor one that was started since asks again before.
    for renewer in (setup.renewer, setup.another_renewer()):
        for known in (setup.grant, degraded):
            assert await renewer.renew(SERVER, known) == degraded
    assert len(setup.endpoint.asked) == 1
    assert degraded.tokens.expires_at is not None
    setup.clock.now = degraded.tokens.expires_at
    with pytest.raises(GrantEnded):
        await setup.another_renewer().renew(SERVER, degraded)
    assert len(setup.endpoint.asked) == 2
    assert "invalid_grant" in (await setup.stored()).ended_reason


async def test_a_token_whose_end_is_unknown_is_used_until_a_401(setup: Setup) -> None:
    endless = replace(setup.grant.tokens, expires_at=None)
    stored = await setup.grants.add(replace(setup.grant, tokens=endless))
    setup.endpoint.outcome = TokenRefused("invalid_grant", "no")
    setup.clock.now += 10 * 365 * 86_400
    degraded = await setup.renewer.renew(SERVER, stored)
    assert degraded.health.refused_at == setup.clock.now
    with pytest.raises(GrantEnded):
        await setup.renewer.renew(SERVER, degraded, Demand(rejected=lambda: True))


async def test_a_401_while_the_renewal_is_under_way_is_believed(setup: Setup) -> None:
    rejected = False

    async def answers_401() -> None:
        nonlocal rejected
        rejected = True

    setup.endpoint.meanwhile = answers_401
    setup.endpoint.outcome = TokenRefused("invalid_grant", "no")
    with pytest.raises(GrantEnded):
        await setup.renewer.renew(SERVER, setup.grant, Demand(rejected=lambda: rejected))


async def test_a_degraded_grant_that_is_renewed_after_all_has_recovered(setup: Setup) -> None:
    setup.endpoint.outcome = TokenRefused("invalid_grant", "too early")
    degraded = await setup.renew()
    assert degraded.tokens.expires_at is not None
    setup.clock.now = degraded.tokens.expires_at
    setup.endpoint.outcome = tokens("2", setup.clock.now)
    renewed = await setup.another_renewer().renew(SERVER, degraded)
    assert renewed.health == HEALTHY
    assert [happening for happening, _ in setup.told] == [Happening.DEGRADED, Happening.RENEWED]
    assert (await setup.another_renewer().renew(SERVER, renewed)).version == renewed.version + 1
    assert len(setup.told) == 2, "a renewal that follows one tells nothing"


@pytest.mark.parametrize("error", sorted(REJECTING_ERRORS))
async def test_what_only_a_person_can_mend_is_tried_every_3_seconds_in_all_processes(setup: Setup, error: str) -> None:
    setup.endpoint.outcome = TokenRefused(error, f"The token endpoint refused: {error}.")
    began, another = setup.clock.now, setup.another_renewer()
    for _ in range(100):
        for renewer in (setup.renewer, another):
            with pytest.raises(AuthorizationServerUnavailable, match=f"{error}.*mcp-auth-proxy login linear") as raised:
                await renewer.renew(SERVER, setup.grant, Demand(rejected=lambda: True))
            assert raised.value.retry_after is not None
            assert 0 < raised.value.retry_after <= 3
        setup.clock.now += 0.1
    assert len(setup.endpoint.asked) == 4
    stored = await setup.stored()
    assert (stored.health.rejected_since, stored.health.failing_since, stored.ended_at) == (began, began, None)
    assert [happening for happening, _ in setup.told].count(Happening.DEGRADED) == 1
    setup.clock.now = began + 86_399
    with pytest.raises(AuthorizationServerUnavailable):
        await setup.renew()
    assert setup.backoff() == pytest.approx(300)
    setup.clock.now = began + 86_403
    with pytest.raises(GrantEnded):
        await setup.renew()
    assert error in (await setup.stored()).ended_reason


async def test_what_was_mended_has_recovered(setup: Setup) -> None:
    setup.endpoint.outcome = TokenRefused("unauthorized_client", "no")
    with pytest.raises(AuthorizationServerUnavailable):
        await setup.renew()
    setup.clock.now += 3
    setup.endpoint.outcome = tokens("2", setup.clock.now)
    assert (await setup.renew()).health == HEALTHY
    assert [happening for happening, _ in setup.told][-1] is Happening.RENEWED


async def test_invalid_client_ends_it_and_forgets_the_registration(setup: Setup) -> None:
    setup.endpoint.outcome = TokenRefused("invalid_client", "no such client")
    with pytest.raises(GrantEnded):
        await setup.renew(rejected=True)
    assert not await setup.registered()


async def test_a_refusal_after_a_crash_says_that_there_was_one(setup: Setup) -> None:  # F6
    dead = "elsewhere:1:x"
    assert await setup.grants.begin_refresh(setup.grant.id, version=1, owner=dead, now=NOW)
    setup.clock.now = NOW + lease.LONGEST + 1
    setup.endpoint.outcome = TokenRefused("invalid_grant", "no")
    with pytest.raises(GrantEnded):
        await setup.renew(rejected=True)
    assert "interrupted" in (await setup.stored()).ended_reason
    assert len(setup.endpoint.asked) == 1


def assert_jittered(wait: float, seconds: float) -> None:
    """Up to a fifth more than ``seconds``; a microsecond is lost in the sum with the Unix time."""
    assert seconds - 1e-5 <= wait <= 1.2 * seconds + 1e-5


PASSING = [
    AuthorizationServerUnavailable("down", 7.0),
    DocumentRefused("token response", "https://as.example/token", "it is HTML"),
    TokenRefused("temporarily_unavailable", "later"),
    TokenRefused("unsupported_grant_type", "odd"),
]


@pytest.mark.parametrize("failure", PASSING, ids=lambda failure: type(failure).__name__)
async def test_temporary_failures_end_no_grant(setup: Setup, failure: Exception) -> None:  # F1
    setup.endpoint.outcome = failure
    with pytest.raises(AuthorizationServerUnavailable) as raised:
        await setup.renew()
    assert raised.value.retry_after is not None
    assert raised.value.retry_after >= 1
    stored = await setup.stored()
    assert stored.ended_at is None
    assert stored.tokens == setup.grant.tokens
    assert stored.refresh_begun_at is None


async def test_a_refresh_whose_response_is_lost_stays_recorded(setup: Setup) -> None:
    setup.endpoint.outcome = AuthorizationServerUnavailable("timed out", maybe_processed=True)
    with pytest.raises(AuthorizationServerUnavailable):
        await setup.renew()
    assert (await setup.stored()).refresh_begun_at is not None
    setup.clock.now += 2 * FIRST
    setup.endpoint.outcome = tokens("2")
    assert (await setup.renew()).version == 2


async def test_after_a_failure_the_server_is_left_alone_for_a_while(setup: Setup) -> None:  # F1, T86
    setup.endpoint.outcome = AuthorizationServerUnavailable("down")
    assert setup.backoff() is None
    told = []
    for _ in range(12):
        with pytest.raises(AuthorizationServerUnavailable, match="down"):
            await setup.renew()
        before = len(setup.endpoint.asked)
        with pytest.raises(AuthorizationServerUnavailable, match="down") as raised:
            await setup.renew()
        assert len(setup.endpoint.asked) == before
        assert raised.value.retry_after is not None
        told.append(raised.value.retry_after)
        wait = setup.backoff()
        assert wait is not None
        assert_jittered(wait, told[-1])
        setup.clock.now += told[-1] + 0.1
    first = told[0]
    assert FIRST <= first <= 2 * FIRST
    assert told == pytest.approx([min(first * 2**number, LONGEST) for number in range(12)], abs=0.01)
    setup.endpoint.outcome = tokens("2")
    await setup.renew()
    assert setup.backoff() is None


@pytest.mark.parametrize(("asked", "pause"), [(17.0, 17.0), (0.5, None), (0.0, None), (3600.0, 3600.0)])
async def test_a_server_is_left_alone_for_as_long_as_it_asks(  # T86
    setup: Setup, asked: float, pause: float | None
) -> None:
    setup.endpoint.outcome = AuthorizationServerUnavailable("busy", retry_after=5.0, server_retry_after=asked)
    with pytest.raises(AuthorizationServerUnavailable) as raised:
        await setup.renew()
    wait, told = setup.backoff(), raised.value.retry_after
    assert wait is not None
    assert told is not None
    assert told == pytest.approx(pause) if pause else FIRST <= told <= 2 * FIRST
    assert_jittered(wait, told)


async def test_a_server_that_asks_for_less_than_the_backoff_does_not_shorten_it(setup: Setup) -> None:
    setup.endpoint.outcome = AuthorizationServerUnavailable("busy", server_retry_after=2.0)
    for _ in range(5):
        setup.clock.now += 2**5 * FIRST
        with pytest.raises(AuthorizationServerUnavailable):
            await setup.renew()
    wait = setup.backoff()
    assert wait is not None
    assert wait >= 16 * FIRST


async def test_a_renewal_whose_server_is_paused_before_it_is_sent_is_as_if_not_begun(setup: Setup) -> None:
    setup.endpoint.outcome = RefreshRateExceeded("paused", retry_after=2.0)
    with pytest.raises(RefreshRateExceeded):
        await setup.renew()
    stored = await setup.stored()
    assert (stored.refresh_begun_at, stored.health, setup.backoff()) == (None, HEALTHY, None)
    setup.endpoint.outcome = tokens("2")
    assert (await setup.renew()).version == 2


async def test_a_clock_that_is_set_back_does_not_prolong_the_backoff(setup: Setup) -> None:  # F9
    setup.endpoint.outcome = AuthorizationServerUnavailable("down")
    with pytest.raises(AuthorizationServerUnavailable):
        await setup.renew()
    setup.clock.now -= 3600
    setup.endpoint.outcome = tokens("2")
    assert (await setup.renew()).version == 2


# Several processes


class Watched(Grants):
    """Report when a second owner was refused the lease."""

    def __init__(self, database: Engine) -> None:
        super().__init__(database)
        self.turned_away = asyncio.Event()

    def may_begin_refresh(
        self, grant: Grant, *, owner: str, now: float, needed: bool = True, settled: bool = True
    ) -> bool:
        may = super().may_begin_refresh(grant, owner=owner, now=now, needed=needed, settled=settled)
        if not may:
            self.turned_away.set()
        return may


async def test_a_second_renewer_waits_for_the_first_and_sends_nothing(setup: Setup) -> None:
    grants = Watched(setup.database)
    second = setup.another_renewer(grants)
    waiting: list[asyncio.Task[Grant]] = []

    async def meanwhile() -> None:
        waiting.append(asyncio.create_task(second.renew(SERVER, setup.grant)))
        await asyncio.wait_for(grants.turned_away.wait(), 5)

    setup.endpoint.meanwhile = meanwhile
    renewed = await setup.renew()
    assert await waiting[0] == renewed
    assert len(setup.endpoint.asked) == 1


async def test_a_late_result_is_fenced_off(setup: Setup) -> None:  # F13
    """The first is stopped for so long that another takes over, whose result is the one to keep."""
    second = setup.another_renewer()

    async def taken_over() -> None:
        setup.endpoint.meanwhile = None
        setup.clock.now += lease.LONGEST + 1
        await second.renew(SERVER, setup.grant)
        setup.endpoint.outcome = tokens("late")

    setup.endpoint.meanwhile = taken_over
    renewed = await setup.renew()
    assert renewed.tokens.access_token == "canary-access-2"
    assert (await setup.stored()).tokens.access_token == "canary-access-2"


async def test_a_late_refusal_does_not_end_what_another_has_renewed(setup: Setup) -> None:  # F13
    second = setup.another_renewer()

    async def taken_over() -> None:
        setup.endpoint.meanwhile = None
        setup.clock.now += lease.LONGEST + 1
        await second.renew(SERVER, setup.grant)
        setup.endpoint.outcome = TokenRefused("invalid_grant", "used already")

    setup.endpoint.meanwhile = taken_over
    assert (await setup.renew()).tokens.access_token == "canary-access-2"
    assert (await setup.stored()).ended_at is None


async def begun_by_another(setup: Setup, owner: str = "elsewhere:1:x") -> None:
    assert await setup.grants.begin_refresh(setup.grant.id, version=1, owner=owner, now=setup.clock.now)


async def waits(
    setup: Setup, *, needed: Callable[[], bool] = lambda: True, settled: Callable[[], bool] = lambda: True
) -> asyncio.Task[Grant]:
    """Begin a renewal that has to wait for another process."""
    grants = Watched(setup.database)
    renewer = setup.another_renewer(grants, settled)
    task = asyncio.create_task(renewer.renew(SERVER, setup.grant, Demand(needed=needed)))
    await asyncio.wait_for(grants.turned_away.wait(), 5)
    return task


async def test_who_waits_takes_over_when_the_lease_ends(setup: Setup) -> None:  # F13
    await begun_by_another(setup)
    waiting = await waits(setup)
    assert setup.endpoint.asked == []
    setup.clock.now += lease.LONGEST + 1
    assert (await waiting).version == 2


async def test_who_waits_takes_over_when_the_other_process_dies(setup: Setup) -> None:  # F13
    process = Owners(setup.grants.owners.beside)
    process.appear()
    process.took("its renewal")
    await begun_by_another(setup, process.new())
    waiting = await waits(setup, needed=lambda: False)
    assert setup.endpoint.asked == []
    process.close()
    assert (await waiting).version == 2


async def test_who_waits_takes_over_when_the_other_process_gives_up(setup: Setup) -> None:
    await begun_by_another(setup)
    waiting = await waits(setup)
    await setup.grants.note_failure(setup.grant.id, version=1, owner="elsewhere:1:x", health=HEALTHY, keep=True)
    assert (await waiting).version == 2


async def test_a_process_that_may_come_back_is_waited_for_while_the_token_works(setup: Setup) -> None:
    """A server with reuse detection would end the grant if the old refresh token came after the new one."""
    await begun_by_another(setup)
    waiting = await waits(setup, needed=lambda: False)
    setup.clock.now += lease.LONGEST + 1
    with pytest.raises(HeldElsewhere):
        await waiting
    assert setup.endpoint.asked == []
    assert (await setup.renew()).version == 2


async def test_who_waits_takes_over_once_the_token_is_dead(setup: Setup) -> None:
    await begun_by_another(setup)
    dead = False
    waiting = await waits(setup, needed=lambda: dead)
    dead = True
    setup.clock.now += lease.LONGEST + 1
    assert (await waiting).version == 2


async def test_nobody_waits_for_ever(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal_lease, "LONGEST_WAIT", 0.0)
    await begun_by_another(setup)
    with pytest.raises(AuthorizationServerUnavailable, match="Another process is renewing") as raised:
        await (await waits(setup))
    assert raised.value.retry_after == 2


async def test_a_late_result_is_stored_if_who_took_over_has_none(setup: Setup) -> None:
    """The old refresh token is used up, and the new one is in the late result."""

    async def taken_over() -> None:
        setup.endpoint.meanwhile = None
        setup.clock.now += lease.LONGEST + 1
        await begun_by_another(setup)
        await setup.grants.release_refresh(setup.grant.id, version=1, owner="elsewhere:1:x")

    setup.endpoint.meanwhile = taken_over
    assert (await setup.renew()).tokens.access_token == "canary-access-2"
    assert (await setup.stored()).version == 2
    assert len(setup.endpoint.asked) == 1


async def test_a_renewal_ends_before_another_process_may_take_over(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert renewal_lease.ATTEMPT_SECONDS + SAVE_SECONDS < lease.LONGEST <= 25
    monkeypatch.setattr(renewal_lease, "ATTEMPT_SECONDS", 0.1)

    async def hangs() -> None:
        await asyncio.Event().wait()

    setup.endpoint.meanwhile = hangs
    with pytest.raises(AuthorizationServerUnavailable, match="did not answer within"):
        await setup.renew()
    found = await setup.stored()
    # It may have been processed, and another process may begin.
    assert found.refresh_begun_at is not None
    assert setup.another_renewer()._grants.may_begin_refresh(found, owner="o", now=setup.clock.now)


async def test_nothing_is_sent_after_the_time_of_a_renewal(setup: Setup) -> None:
    """The process was stopped between the intent and the request: another one may have sent it since."""
    sent: list[bool] = []

    async def stopped() -> None:
        setup.clock.now += renewal_lease.ATTEMPT_SECONDS
        try:
            await Fetcher().post(
                f"http://127.0.0.1:{port}/token",
                body=b"",
                content_type="text/plain",
                document="token response",
                policy=AddressPolicy(loopback=True),
            )
        except AuthorizationServerUnavailable as error:
            sent.append(error.maybe_processed)
            raise

    received: list[bytes] = []

    async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read())
        writer.close()

    async with await asyncio.start_server(receive, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        setup.endpoint.meanwhile = stopped
        with pytest.raises(AuthorizationServerUnavailable, match="nothing was sent"):
            await setup.renew()
        await until(lambda: received, "the end of the connection")
    assert (sent, received) == ([False], [b""])
    assert (await setup.stored()).refresh_begun_at is None


class Unwritable(Grants):
    """Keep no new tokens while ``fails``."""

    def __init__(self, database: Engine) -> None:
        super().__init__(database)
        self.fails = True
        self.attempts = 0
        self.kept = asyncio.Event()

    async def renewed(self, grant_id: int, *, version: int, owner: str, tokens: TokenSet) -> Grant | None:
        self.attempts += 1
        if self.fails:
            raise StoreUnavailable("It is out of reach.")
        stored = await super().renewed(grant_id, version=version, owner=owner, tokens=tokens)
        self.kept.set()
        return stored


async def test_tokens_that_can_not_be_stored_are_kept_until_they_can(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal, "SAVE_SECONDS", 0.1)
    grants = Unwritable(setup.database)
    renewer = setup.another_renewer(grants)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await renewer.renew(SERVER, setup.grant)
    # The second one sent nothing: the refresh token is used up.
    assert len(setup.endpoint.asked) == 1
    assert (await setup.stored()).tokens.access_token == "canary-access-1"
    grants.fails = False
    await asyncio.wait_for(grants.kept.wait(), 5)
    assert (await setup.stored()).tokens.access_token == "canary-access-2"
    assert await renewer.renew(SERVER, setup.grant) == await setup.stored()
    assert len(setup.endpoint.asked) == 1
    await renewer.aclose()


async def test_tokens_are_stored_as_soon_as_the_store_is_back_however_long_it_was_away(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each second counts: the process may be killed, or another one may take over."""
    monkeypatch.setattr(renewal, "UNSAVED_INTERVAL", 0.01)
    grants = Unwritable(setup.database)
    renewing = asyncio.create_task(setup.another_renewer(grants).renew(SERVER, setup.grant))
    await until(lambda: grants.attempts >= 20, "20 attempts", timeout=2)
    grants.fails = False
    assert (await renewing).tokens.access_token == "canary-access-2"


@pytest.mark.parametrize("seconds", [lease.LONGEST + 1, lease.BELIEVED_SECONDS + 1])
async def test_nobody_takes_over_right_after_an_outage_of_the_store(setup: Setup, seconds: float) -> None:
    """Whoever has new tokens could not store them, and does so as soon as the store is back."""
    waiting: list[asyncio.Task[Grant]] = []

    async def meanwhile() -> None:
        setup.endpoint.meanwhile = None
        setup.clock.now += seconds
        waiting.append(await waits(setup, settled=lambda: False))

    setup.endpoint.meanwhile = meanwhile
    assert (await setup.renew()).tokens.access_token == "canary-access-2"
    assert (await waiting[0]).version == 2
    assert len(setup.endpoint.asked) == 1


async def test_a_process_that_may_live_is_taken_over_once_the_store_was_back_for_a_while(setup: Setup) -> None:
    await begun_by_another(setup)
    settled = False
    setup.clock.now += lease.LONGEST + 1
    waiting = await waits(setup, settled=lambda: settled)
    assert setup.endpoint.asked == []
    settled = True
    assert (await waiting).version == 2


async def test_who_has_died_or_given_up_is_taken_over_right_after_an_outage_too(setup: Setup) -> None:
    """Nobody has new tokens, and the server accepts the refresh token that was used for some seconds only."""
    await begun_by_another(setup, dead_owner(setup.grants.owners))
    eager = setup.another_renewer(settled=lambda: False)
    assert (await eager.renew(SERVER, setup.grant)).version == 2
    assert await setup.grants.begin_refresh(setup.grant.id, version=2, owner="elsewhere:1:x", now=setup.clock.now)
    await setup.grants.note_failure(setup.grant.id, version=2, owner="elsewhere:1:x", health=HEALTHY, keep=True)
    setup.endpoint.outcome = tokens("3", NOW + 10)
    assert (await eager.renew(SERVER, await setup.stored())).version == 3


async def test_nothing_is_sent_if_the_store_is_not_writable(setup: Setup) -> None:  # F8
    await setup.database.close()
    with pytest.raises(StoreUnavailable):
        await setup.renew()
    assert setup.endpoint.asked == []
