"""What is paused after a failure, for how long, and whom it concerns."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.broker_setup import BrokerSetup, broker_setup, unattended
from fakes.authorization_server import FakeAuthorizationServer
from fakes.http_exchange import FakeResponse
from fakes.mcp_server import FakeMcpServer
from mcp_auth_proxy.broker.backoff import (
    FIRST,
    LONGEST,
    MAX_PAUSES,
    REMEMBERED,
    Backoff,
    Subject,
    of_account,
    of_issuer,
    of_server,
)
from mcp_auth_proxy.errors import (
    AuthorizationDenied,
    AuthorizationError,
    AuthorizationServerUnavailable,
    ConfigHint,
    TokenRefused,
)
from mcp_auth_proxy.models import AccessToken, Account

ONE = of_server("one")
ALICE, BOB = Account("alice", "notes"), Account("bob", "notes")


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def fail(backoff: Backoff, subject: Subject = ONE, *, asked: float = 0.0) -> float:
    """Let an attempt fail; return the seconds that its client is told to wait."""
    error = AuthorizationServerUnavailable("down", server_retry_after=asked)
    with pytest.raises(AuthorizationServerUnavailable), backoff.attempt(subject):
        raise error
    assert error.retry_after is not None
    return error.retry_after


def test_a_pause_doubles_up_to_five_minutes_and_a_success_resets_it() -> None:  # T86
    clock = Clock()
    backoff = Backoff(clock=clock)
    for _ in range(3):
        first = fail(backoff)
        assert FIRST <= first <= 2 * FIRST
        for number in range(1, 12):
            with pytest.raises(AuthorizationServerUnavailable, match="down"):
                backoff.check(ONE)
            clock.now += min(first * 2 ** (number - 1), LONGEST) + 0.001
            assert fail(backoff) == pytest.approx(min(first * 2**number, LONGEST), abs=0.01)
        backoff.succeeded(ONE)
        backoff.check(ONE)


def test_the_first_pause_is_random() -> None:
    assert len({fail(Backoff(clock=Clock())) for _ in range(20)}) > 1


def test_attempts_that_were_running_do_not_prolong_a_pause() -> None:  # T86
    backoff = Backoff(clock=Clock())
    told = fail(backoff)
    for asked in (0.0, 50.0, 0.0, 20.0):
        error = AuthorizationServerUnavailable("down", server_retry_after=asked)
        backoff.failed(ONE, error)
        told = max(told, asked)
        assert error.retry_after == pytest.approx(told)


@given(st.integers(-(10**9), 10**9), st.integers(0, 3600))
def test_a_clock_that_is_set_never_prolongs_a_pause(jump: int, asked: int) -> None:  # T86, F9
    clock = Clock()
    backoff = Backoff(clock=clock)
    told = fail(backoff, asked=asked)
    clock.now += jump
    assert backoff.is_paused(ONE) == (jump >= 0 and clock.now < 1_000_000.0 + told)


def test_failures_are_forgotten_after_a_while() -> None:  # T86
    clock = Clock()
    backoff = Backoff(clock=clock)
    for _ in range(5):
        clock.now += fail(backoff)
    assert backoff.has_failed(ONE)
    clock.now += REMEMBERED + 1
    assert not backoff.has_failed(ONE)
    assert fail(backoff) <= 2 * FIRST


def test_the_number_of_pauses_is_bounded() -> None:  # T86
    clock = Clock()
    backoff = Backoff(clock=clock)
    fail(backoff, asked=3600.0)
    for number in range(MAX_PAUSES + 50):
        clock.now += 0.001
        fail(backoff, of_issuer("two", f"https://{number}.example"))
    assert len(backoff.failures) == MAX_PAUSES
    assert backoff.is_paused(ONE)


def test_an_oauth_error_is_no_failure_of_its_issuer() -> None:  # T86
    backoff = Backoff(clock=Clock())
    with pytest.raises(TokenRefused), backoff.attempt(ONE):
        raise TokenRefused("invalid_grant", "no")
    backoff.check(ONE)


def test_discovery_is_tried_again_before_a_long_pause_of_an_issuer_ends() -> None:  # T86
    """The server may have moved to another issuer."""
    clock = Clock()
    backoff = Backoff(clock=clock)
    issuer = of_issuer("one", "https://as.example")
    told, discoveries = 0.0, 0
    while clock.now < 1_000_000.0 + 3600:
        try:
            with backoff.attempt(ONE):
                discoveries += 1
                with backoff.attempt(issuer):
                    raise AuthorizationServerUnavailable("busy", server_retry_after=3600.0)
        except AuthorizationError as error:
            assert error.retry_after is not None
            assert error.retry_after == pytest.approx(1_000_000.0 + 3600 - clock.now)
            told = error.retry_after
        clock.now += 1
    assert told <= 1
    assert 10 <= discoveries <= 25
    backoff.check(ONE, issuer)


async def test_an_account_that_is_refused_denies_nothing_to_others(  # T86
    issuer: FakeAuthorizationServer, upstream: FakeMcpServer, tmp_path: Path
) -> None:
    async with broker_setup(tmp_path, unattended(issuer, upstream.url)) as setup:
        issuer.answers["token"] = FakeResponse.json({"error": "invalid_grant"}, 400)
        with pytest.raises(AuthorizationDenied):
            await setup.challenged(account=ALICE)
        issuer.answers.clear()
        assert isinstance(await setup.challenged(account=BOB), AccessToken)
        with pytest.raises(AuthorizationError, match="invalid_grant"):
            await setup.challenged(account=ALICE)


async def test_an_issuer_that_is_down_is_left_alone_by_all_accounts(  # T86
    issuer: FakeAuthorizationServer, upstream: FakeMcpServer, tmp_path: Path
) -> None:
    other = unattended(issuer, upstream.url, "other")
    async with broker_setup(tmp_path, unattended(issuer, upstream.url), other) as setup:
        issuer.answers["token"] = FakeResponse.too_many("100")
        with pytest.raises(AuthorizationServerUnavailable):
            await setup.challenged(account=ALICE)
        with pytest.raises(AuthorizationServerUnavailable, match="100 s"):
            await setup.challenged(account=BOB)
        assert issuer.token_requests() == 1
        with pytest.raises(AuthorizationServerUnavailable):
            await setup.challenged(account=Account("alice", "other"))
        assert issuer.token_requests() == 2


async def test_a_renewal_that_is_limited_pauses_new_authorizations_too(  # T86
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    token = await setup.connect()
    issuer.answers["token"] = FakeResponse.too_many("100")
    issuer.end_access_tokens()
    with pytest.raises(AuthorizationServerUnavailable):
        await setup.challenged(token)
    with pytest.raises(AuthorizationServerUnavailable, match="100 s"):
        await setup.challenged(account=BOB)
    assert issuer.registrations == 1


async def test_a_private_host_that_is_allowed_later_is_tried_at_once(  # T86
    setup: BrokerSetup, upstream: FakeMcpServer, issuer: FakeAuthorizationServer
) -> None:
    upstream.metadata_changes = {"authorization_servers": ["https://10.0.0.1"]}
    with pytest.raises(AuthorizationError, match="allow_private"):
        await setup.pending()
    upstream.metadata_changes = {}
    setup.broker.set_allow_private(())
    with pytest.raises(AuthorizationError, match="allow_private"):
        await setup.pending()
    setup.broker.set_allow_private(("10.0.0.1",))
    await setup.connect()


def test_a_pause_of_an_account_is_its_own() -> None:
    assert of_account(ALICE) != of_account(BOB)
    assert of_account(ALICE) != of_server("notes")


def test_the_newest_failure_is_told_until_there_is_a_success() -> None:
    clock = Clock()
    backoff = Backoff(clock=clock)
    assert backoff.last_failure(ONE, of_account(ALICE)) is None
    fail(backoff)
    clock.now += 500
    error = AuthorizationError("later", hint=ConfigHint("oauth.issuer"))
    backoff.failed(of_account(ALICE), error)
    assert backoff.last_failure(ONE, of_account(ALICE)) == ("later", ConfigHint("oauth.issuer"))
    assert backoff.last_failure(ONE, of_account(BOB)) == ("down", None)
    backoff.succeeded(of_account(ALICE))
    assert backoff.last_failure(ONE, of_account(ALICE)) == ("down", None)
