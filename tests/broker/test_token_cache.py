"""The token cache on a real store, with a clock of its own and a scripted token endpoint."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fakes.proxy import until
from mcp_auth_proxy.broker import token_cache
from mcp_auth_proxy.broker.backoff import FIRST, Backoff, of_issuer
from mcp_auth_proxy.broker.client_registration import ClientRegistrar
from mcp_auth_proxy.broker.connection_notes import ConnectionJournal
from mcp_auth_proxy.broker.refresh_rate import RefreshRate
from mcp_auth_proxy.broker.renewal import Renewer
from mcp_auth_proxy.broker.renewal_lease import TAKEOVER_AHEAD
from mcp_auth_proxy.broker.token_cache import CachedToken, TokenCache
from mcp_auth_proxy.broker.token_requests import TokenClient
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, AuthorizationServerUnavailable, StoreUnavailable, TokenRefused
from mcp_auth_proxy.models import Account, Grant, RenewalHealth, TokenSet
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.lease import LONGEST, Owners
from mcp_auth_proxy.store.refresh_slots import RefreshSlots
from mcp_auth_proxy.store.registrations import Registrations
from store.builders import NOW, dead_owner, grant, store_settings, tokens

ACCOUNT = Account("local", "linear")
HOUR = 3600.0
BUSY = AuthorizationServerUnavailable("slow down", server_retry_after=60.0)


class Clock:
    now: float = NOW + 10

    def __call__(self) -> float:
        return self.now


class Endpoint(TokenClient):
    """A scripted token endpoint: answers with ``outcome`` once ``gate`` is set, and counts."""

    def __init__(self) -> None:
        self.outcome: TokenSet | Exception = tokens("2")
        self.gate = asyncio.Event()
        self.gate.set()
        self.refreshes = 0
        self.asked: list[str] = []
        """The names of the accounts, in order."""

    async def refresh(self, server: ServerSettings, grant: Grant) -> TokenSet:
        self.refreshes += 1
        self.asked.append(grant.key.account.name)
        await self.gate.wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class WatchedGrants(Grants):
    """Counts reads, and holds one between the store and the reader until ``gate`` is set."""

    def __init__(self, database: Engine, clock: Clock) -> None:
        super().__init__(database)
        self.clock = clock
        self.reads = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.release_takes = 0.0
        """Seconds that ``release_refresh`` takes, by the clock of the test."""
        self.failure: StoreUnavailable | None = None
        """Raised instead of a read."""
        self.begin_failures = 0
        """How many of the next begins fail."""
        self.on_failure: Callable[[], None] | None = None
        """Called once a failed renewal is noted."""

    async def current(self, account: Account) -> Grant | None:
        self.reads += 1
        if self.failure is not None:
            raise self.failure
        found = await super().current(account)
        await self.gate.wait()
        return found

    async def begin_refresh(
        self, grant_id: int, *, version: int, owner: str, now: float, needed: bool = True, settled: bool = True
    ) -> bool:
        if self.begin_failures:
            self.begin_failures -= 1
            raise StoreUnavailable("It is out of reach.")
        return await super().begin_refresh(
            grant_id, version=version, owner=owner, now=now, needed=needed, settled=settled
        )

    async def release_refresh(self, grant_id: int, *, version: int, owner: str) -> None:
        await super().release_refresh(grant_id, version=version, owner=owner)
        self.clock.now += self.release_takes

    async def note_failure(
        self, grant_id: int, *, version: int, owner: str, health: RenewalHealth, keep: bool = False
    ) -> bool:
        noted = await super().note_failure(grant_id, version=version, owner=owner, health=health, keep=keep)
        if self.on_failure is not None:
            self.on_failure()
        return noted


class Setup:
    def __init__(self, database: Engine) -> None:
        self.clock = Clock()
        self.grants = WatchedGrants(database, self.clock)
        self.backoff = Backoff(clock=self.clock)
        self.endpoint = Endpoint()
        self.servers = {"linear": ServerSettings(name="linear", url="https://linear.example/mcp")}
        registrar = ClientRegistrar(
            fetcher=Fetcher(), registrations=Registrations(database), public_url="http://127.0.0.1", clock=self.clock
        )
        self.renewer = Renewer(
            token_client=self.endpoint,
            registrar=registrar,
            grants=self.grants,
            backoff=self.backoff,
            outages=OutageLog(),
            journal=ConnectionJournal(clock=self.clock),
            rate=RefreshRate(slots=RefreshSlots(database), clock=self.clock),
            clock=self.clock,
        )
        self.cache = TokenCache(servers=self.servers, grants=self.grants, renewer=self.renewer, clock=self.clock)

    async def text(self) -> str:
        token = await self.cache.token(ACCOUNT)
        return "" if token is None else token.header.decode()

    async def in_the_background(self) -> None:
        """Wait, bounded, for the renewal in the background."""

        def is_over() -> bool:
            cached = self.cache.get(ACCOUNT)
            return not (self.cache.is_renewing(ACCOUNT) or (cached is not None and cached.queued))

        await until(is_over)


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    database = await open_store(store_settings(tmp_path))
    setup = Setup(database)
    yield setup
    setup.endpoint.gate.set()
    setup.grants.gate.set()
    await setup.renewer.rate.aclose()
    await setup.cache.aclose()
    await database.close()


# Loading


async def test_a_grant_is_read_once_for_everyone_who_asks_at_once(setup: Setup) -> None:
    await setup.grants.add(grant())
    assert await asyncio.gather(*(setup.text() for _ in range(20))) == ["Bearer canary-access-1"] * 20
    assert await setup.text() == "Bearer canary-access-1"
    assert setup.grants.reads == 1


async def test_a_missing_grant_is_remembered_until_the_store_may_have_changed(setup: Setup) -> None:
    assert (await setup.text(), await setup.text(), setup.grants.reads) == ("", "", 1)
    await setup.grants.add(grant())
    assert await setup.text() == ""
    setup.cache.clear_negative()
    assert await setup.text() == "Bearer canary-access-1"


async def test_only_so_many_accounts_without_a_grant_are_remembered(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "MAX_WITHOUT_GRANT", 3)
    for number in range(8):
        account = Account("local", "linear", f"a{number}")
        assert await setup.cache.token(account) is None
        assert setup.cache.token_nowait(account) == (True, None)
    known = [setup.cache.token_nowait(Account("local", "linear", f"a{number}"))[0] for number in range(8)]
    assert known == [False] * 6 + [True] * 2


async def test_a_grant_stored_while_the_store_is_read_is_not_missed(setup: Setup) -> None:
    setup.grants.gate.clear()
    reading = asyncio.create_task(setup.text())
    await until(lambda: setup.grants.reads == 1)
    await setup.grants.add(grant())
    setup.cache.clear_negative()
    setup.grants.gate.set()
    assert await reading == "Bearer canary-access-1"


async def test_a_token_evicted_while_it_is_loaded_is_not_brought_back(setup: Setup) -> None:
    await setup.grants.add(grant())
    setup.grants.gate.clear()
    reading = asyncio.create_task(setup.text())
    await until(lambda: setup.grants.reads == 1)
    await setup.grants.delete(ACCOUNT)
    setup.cache.evict(ACCOUNT)
    setup.grants.gate.set()
    assert await reading == ""
    assert setup.cache.get(ACCOUNT) is None


async def test_a_grant_for_another_server_than_configured_is_not_used(setup: Setup) -> None:  # T49
    await setup.grants.add(grant())
    setup.servers["linear"] = replace(setup.servers["linear"], url="https://other.example/mcp")
    assert await setup.text() == ""


async def test_each_new_token_has_a_higher_generation_and_the_same_grant_has_one(setup: Setup) -> None:
    stored = await setup.grants.add(grant())
    first = setup.cache.put(ACCOUNT, stored)
    assert setup.cache.put(ACCOUNT, stored) is first
    same = setup.cache.put(ACCOUNT, replace(stored, version=2))
    assert same.token.generation == first.token.generation, "the token has not changed"
    second = setup.cache.put(ACCOUNT, replace(stored, version=3, tokens=tokens("2")))
    assert second.token.generation > first.token.generation
    assert setup.cache.accounts() == {ACCOUNT}


# Renewal


async def test_a_token_that_is_due_is_used_while_it_is_renewed_once(setup: Setup) -> None:
    await setup.grants.add(grant())
    await setup.text()
    setup.endpoint.gate.clear()
    setup.clock.now = NOW + 0.95 * HOUR
    assert setup.cache.token_nowait(ACCOUNT)[0] is False
    for _ in range(10):
        assert await setup.text() == "Bearer canary-access-1"
    await until(lambda: setup.endpoint.refreshes == 1)
    setup.endpoint.outcome = tokens("2", setup.clock.now)
    setup.endpoint.gate.set()
    await setup.in_the_background()
    assert await setup.text() == "Bearer canary-access-2"
    assert (setup.endpoint.refreshes, setup.cache.token_nowait(ACCOUNT)[0]) == (1, True)


async def test_a_token_that_is_due_when_it_is_loaded_is_renewed_after_its_first_use(setup: Setup) -> None:
    await setup.grants.add(grant())
    setup.clock.now = NOW + 0.95 * HOUR
    setup.endpoint.outcome = tokens("2", setup.clock.now)
    assert await setup.text() == "Bearer canary-access-1"
    await until(lambda: setup.endpoint.refreshes == 1)
    await setup.in_the_background()
    assert await setup.text() == "Bearer canary-access-2"


async def test_a_renewal_that_failed_is_tried_again_if_that_of_another_grant_has_ended_the_pause(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "RETRY_DELAY", 0.05)
    stored = await setup.grants.add(grant())
    setup.endpoint.outcome = AuthorizationServerUnavailable("busy")
    setup.grants.on_failure = lambda: setup.backoff.succeeded(of_issuer("linear", stored.key.issuer))
    setup.clock.now = NOW + 0.95 * HOUR
    assert await setup.text() == "Bearer canary-access-1"
    await until(lambda: setup.endpoint.refreshes == 1)
    setup.endpoint.outcome = tokens("2", setup.clock.now)
    await until(lambda: setup.endpoint.refreshes == 2)
    await setup.in_the_background()
    assert await setup.text() == "Bearer canary-access-2"


async def test_requests_wait_while_an_expired_token_is_renewed_once(setup: Setup) -> None:
    await setup.grants.add(grant())
    setup.clock.now = NOW + 2 * HOUR
    setup.endpoint.outcome = tokens("2", setup.clock.now)
    assert await asyncio.gather(*(setup.text() for _ in range(20))) == ["Bearer canary-access-2"] * 20
    assert setup.endpoint.refreshes == 1


async def test_an_expired_token_that_can_not_be_renewed_is_used_anyway(setup: Setup) -> None:
    await setup.grants.add(replace(grant(), tokens=replace(tokens(), refresh_token=None)))
    setup.clock.now = NOW + 2 * HOUR
    assert await setup.text() == "Bearer canary-access-1"
    assert setup.endpoint.refreshes == 0


async def test_a_renewal_that_starts_as_its_server_changes_sends_nothing(setup: Setup) -> None:  # T49
    await setup.grants.add(grant())
    cached = await setup.cache.load(ACCOUNT)
    assert cached is not None
    renewing = asyncio.ensure_future(setup.cache.renew(ACCOUNT, cached))
    await asyncio.sleep(0)  # the renewal is a task now, which has not run yet
    assert setup.cache.is_renewing(ACCOUNT)
    setup.servers["linear"] = ServerSettings(name="linear", url="https://other.example/mcp")
    setup.cache.servers_changed({"linear"})
    with pytest.raises(AuthorizationError, match="reconfigured"):
        await renewing
    assert setup.endpoint.refreshes == 0


async def test_an_ended_grant_leaves_no_token(setup: Setup) -> None:
    await setup.grants.add(grant())
    setup.clock.now = NOW + 2 * HOUR
    setup.endpoint.outcome = TokenRefused("invalid_grant", "no")
    assert await setup.text() == ""
    assert (setup.cache.get(ACCOUNT), setup.cache.token_nowait(ACCOUNT)) == (None, (True, None))


async def test_after_a_failure_no_request_renews_before_the_server_wants_it(setup: Setup) -> None:  # F1
    """Requests come in every turn of the event loop, also in the one in which the failed renewal ends.

    The renewal takes so long to end that a pause of its first length would be over.
    """
    stored = await setup.grants.add(grant())
    await setup.text()
    setup.endpoint.outcome = BUSY
    setup.grants.release_takes = 2 * FIRST
    setup.clock.now = NOW + 0.95 * HOUR

    async def request() -> None:
        assert await setup.text() == "Bearer canary-access-1"
        await asyncio.sleep(0)

    async with asyncio.timeout(10):
        while setup.renewer.retry_at(stored) is None or setup.cache.is_renewing(ACCOUNT):
            await request()
    for _ in range(100):
        await request()
    await setup.in_the_background()
    assert setup.endpoint.refreshes == 1
    assert setup.cache.token_nowait(ACCOUNT)[0] is True


async def test_a_backoff_outlives_the_cached_token(setup: Setup) -> None:
    stored = await setup.grants.add(grant())
    setup.endpoint.outcome = BUSY
    setup.clock.now = NOW + 0.95 * HOUR
    cached = setup.cache.put(ACCOUNT, stored)
    with pytest.raises(AuthorizationServerUnavailable):
        await setup.cache.renew(ACCOUNT, cached)
    setup.cache.evict(ACCOUNT)
    setup.clock.now += 6
    assert await setup.text() == "Bearer canary-access-1"
    assert setup.cache.token_nowait(ACCOUNT)[0] is True
    setup.clock.now += 90
    assert setup.cache.token_nowait(ACCOUNT)[0] is False


async def test_a_request_with_an_expired_token_waits_as_long_as_the_server_asks(setup: Setup) -> None:  # T86
    await setup.grants.add(grant())
    setup.clock.now = NOW + 2 * HOUR
    setup.endpoint.outcome = BUSY
    for left in (60, 31, 2):
        with pytest.raises(AuthorizationServerUnavailable) as raised:
            await setup.text()
        assert raised.value.retry_after == pytest.approx(left, abs=0.1)
        assert setup.endpoint.refreshes == 1
        setup.clock.now += 29
    setup.endpoint.outcome = tokens("2", setup.clock.now)
    assert await setup.text() == "Bearer canary-access-2"


async def test_a_renewal_that_a_crash_interrupted_is_started_again(setup: Setup) -> None:
    stored = await setup.grants.add(grant())
    await setup.grants.begin_refresh(stored.id, version=1, owner="elsewhere:1:x", now=NOW - HOUR)
    await setup.cache.resume_interrupted()
    await until(lambda: setup.endpoint.refreshes == 1)
    await setup.in_the_background()
    assert await setup.text() == "Bearer canary-access-2"


async def begun_by_another(setup: Setup, owner: str = "elsewhere:1:x", *, due: bool = False) -> CachedToken:
    """Return the token of a grant that another process has begun to renew; ``due``: it is time for it."""
    stored = await setup.grants.add(grant())
    cached = setup.cache.put(ACCOUNT, stored)
    if due:
        setup.clock.now = cached.renew_at
    assert await setup.grants.begin_refresh(stored.id, version=1, owner=owner, now=setup.clock.now)
    return cached


async def test_the_renewal_of_a_process_that_died_is_started_again_once(setup: Setup) -> None:
    process = Owners(setup.grants.owners.beside)
    process.appear()
    process.took("its renewal")
    await begun_by_another(setup, process.new())
    assert await setup.cache.resume_interrupted()
    assert setup.endpoint.refreshes == 0
    process.close()
    setup.endpoint.outcome = BUSY
    setup.endpoint.gate.clear()
    assert not await setup.cache.resume_interrupted()
    await until(lambda: setup.endpoint.refreshes == 1)
    # By now this process has begun it.
    assert await setup.cache.resume_interrupted()
    setup.endpoint.gate.set()
    await setup.in_the_background()
    assert setup.endpoint.refreshes == 1


async def test_a_renewal_of_a_dead_process_is_started_again_though_the_store_fails_meanwhile(setup: Setup) -> None:
    stored = await setup.grants.add(grant())
    owner = dead_owner(setup.grants.owners)
    assert await setup.grants.begin_refresh(stored.id, version=1, owner=owner, now=setup.clock.now)
    setup.grants.failure = StoreUnavailable("It is out of reach.")
    with pytest.raises(StoreUnavailable):
        await setup.cache.resume_interrupted()
    setup.grants.failure = None
    await setup.cache.resume_interrupted()
    await until(lambda: setup.endpoint.refreshes == 1)
    await setup.in_the_background()
    assert await setup.text() == "Bearer canary-access-2"


async def test_a_takeover_that_the_store_did_not_allow_is_tried_again_soon(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only when this process would have renewed the token: its server does not accept the old one for long."""
    monkeypatch.setattr(token_cache, "RETRY_DELAY", 0.01)
    cached = await begun_by_another(setup, dead_owner(setup.grants.owners))
    assert cached.renew_at > setup.clock.now + HOUR / 2
    setup.grants.begin_failures = 1
    await setup.cache.resume_interrupted()
    await until(lambda: setup.endpoint.refreshes == 1)
    await setup.in_the_background()
    assert (setup.grants.begin_failures, await setup.text()) == (0, "Bearer canary-access-2")


async def test_a_renewal_of_a_dead_process_that_has_to_wait_is_tried_again(setup: Setup) -> None:
    cached = await begun_by_another(setup, dead_owner(setup.grants.owners))
    setup.endpoint.outcome = BUSY
    with pytest.raises(AuthorizationServerUnavailable):
        await setup.cache.renew(ACCOUNT, cached)
    owner = dead_owner(setup.grants.owners)
    assert await setup.grants.begin_refresh(cached.grant.id, version=1, owner=owner, now=setup.clock.now)
    for _ in range(3):
        assert not await setup.cache.resume_interrupted()
        await setup.in_the_background()
    # It is due when the pause of its server is over, not only when the token is.
    assert cached.used
    assert 60 <= cached.renew_at - setup.clock.now <= 1.2 * 60
    assert setup.endpoint.refreshes == 1


async def test_grants_of_unknown_servers_are_left_alone(setup: Setup) -> None:
    await begun_by_another(setup, dead_owner(setup.grants.owners))
    setup.servers.clear()
    assert not await setup.cache.resume_interrupted()
    assert setup.endpoint.refreshes == 0


async def test_a_token_that_works_is_not_renewed_while_another_process_may_come_back(setup: Setup) -> None:
    cached = await begun_by_another(setup, due=True)
    setup.clock.now += LONGEST + 1
    assert await setup.text() == "Bearer canary-access-1"
    await until(lambda: cached.renew_at == NOW + HOUR - TAKEOVER_AHEAD)
    await setup.in_the_background()
    assert setup.endpoint.refreshes == 0
    setup.clock.now = NOW + HOUR - 1
    assert await setup.text() == "Bearer canary-access-1"
    await until(lambda: setup.endpoint.refreshes == 1)
    await setup.in_the_background()
    assert await setup.text() == "Bearer canary-access-2"


async def test_a_request_that_needs_a_new_token_makes_a_renewal_in_the_background_urgent(setup: Setup) -> None:
    cached = await begun_by_another(setup, due=True)
    assert await setup.text() == "Bearer canary-access-1"
    await until(lambda: setup.cache.is_renewing(ACCOUNT))
    refused = asyncio.create_task(setup.cache.renew(ACCOUNT, cached))
    await asyncio.sleep(0)
    setup.clock.now += LONGEST + 1
    assert await refused
    assert await setup.text() == "Bearer canary-access-2"


async def test_a_request_does_not_wait_for_ever(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "LONGEST_WAIT", 0.1)
    cached = await begun_by_another(setup)
    with pytest.raises(AuthorizationServerUnavailable, match="takes longer") as raised:
        await setup.cache.renew(ACCOUNT, cached)
    assert raised.value.retry_after == 2
    assert setup.cache.is_renewing(ACCOUNT)
    setup.clock.now += LONGEST + 1
    await setup.in_the_background()
    assert await setup.text() == "Bearer canary-access-2"


async def test_closing_waits_for_a_renewal_in_progress(setup: Setup) -> None:
    stored = await setup.grants.add(grant())
    setup.endpoint.gate.clear()
    renewing = asyncio.create_task(setup.cache.renew(ACCOUNT, setup.cache.put(ACCOUNT, stored)))
    await until(lambda: setup.endpoint.refreshes == 1)
    closing = asyncio.create_task(setup.cache.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    setup.endpoint.gate.set()
    await closing
    renewed = await renewing
    assert renewed is not None
    assert renewed.grant.tokens.access_token == "canary-access-2"


# Many tokens that expire together


async def in_use(setup: Setup, names: list[str]) -> None:
    """Store a grant for each account, the later ones a second younger, and use them."""
    for number, name in enumerate(names):
        given = grant(at=NOW + number)
        given = replace(given, key=replace(given.key, account=Account("local", "linear", name)))
        await setup.grants.add(given)
        await setup.cache.token(Account("local", "linear", name))


async def test_tokens_that_are_too_many_for_their_margin_are_renewed_earlier_and_in_order(setup: Setup) -> None:
    await in_use(setup, [f"a{number}" for number in range(60)])
    setup.renewer.rate.set_rate(0.1)
    setup.clock.now = NOW + HOUR - 60 / 0.1 * 1.25 - 60
    await setup.cache.renew_early()
    await asyncio.sleep(0.05)
    assert setup.endpoint.asked == []
    setup.clock.now += 90
    await setup.cache.renew_early()
    await until(lambda: setup.endpoint.asked)
    setup.renewer.rate.set_rate(1000)
    await until(lambda: len(setup.endpoint.asked) >= 10)
    assert setup.endpoint.asked[:10] == [f"a{number}" for number in range(10)]
    assert await setup.cache.token(Account("local", "linear", "a59")) is not None


async def test_neither_unused_tokens_nor_those_in_the_first_half_of_their_life_are_renewed_early(setup: Setup) -> None:
    names = [f"a{number}" for number in range(10)]
    await in_use(setup, names)
    setup.renewer.rate.set_rate(0.001)
    setup.clock.now = NOW + HOUR / 2 - 1
    await setup.cache.renew_early()
    for name in names:
        cached = setup.cache.get(Account("local", "linear", name))
        assert cached is not None
        cached.used, cached.used_at = False, 0.0
    setup.clock.now = NOW + HOUR / 2 + 20
    await setup.cache.renew_early()
    await asyncio.sleep(0.05)
    assert setup.endpoint.asked == []


async def test_many_tokens_are_looked_at_by_themselves(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "LOOK_AHEAD", 0.01)
    setup.renewer.rate.set_rate(0.1)
    await in_use(setup, ["a", "b"])
    setup.clock.now = NOW + HOUR - 250
    setup.cache.evict(Account("local", "linear", "a"))
    await asyncio.sleep(0.05)
    assert setup.endpoint.asked == []
    for name in "cdefghijklmnopqrstuvwxyz":
        await in_use(setup, [name])
    await until(lambda: setup.endpoint.asked)
