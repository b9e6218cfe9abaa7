"""The state of each grant: the table that commands, pages and the API share, and the same rules in SQL."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.broker.states import EXPIRED, NOT_RENEWABLE, GrantStatus, Health, grant_status, word
from mcp_auth_proxy.models import Account, Grant, GrantType, RenewalHealth
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.grant_summaries import GrantFilter, GrantState, GrantSummaries
from mcp_auth_proxy.store.grants import Grants
from store.builders import NOW, grant, store_settings

LATER = NOW + 3600
FRESH = GrantStatus(GrantState.ACTIVE, Health.FRESH, since=NOW)
DEGRADED = GrantStatus(GrantState.DEGRADED, Health.DEGRADED, NOT_RENEWABLE, NOW)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = await open_store(store_settings(tmp_path))
    yield engine
    await engine.close()


def without_refresh_token(given: Grant) -> Grant:
    return replace(given, tokens=replace(given.tokens, refresh_token=None))


def without_end(given: Grant) -> Grant:
    return replace(given, tokens=replace(given.tokens, expires_at=None))


GRANT = grant()
UNATTENDED = replace(without_refresh_token(GRANT), grant_type=GrantType.CLIENT_CREDENTIALS)
OVER = replace(GRANT, ended_at=NOW + 1, ended_reason="invalid_grant")
UNDER_WAY = replace(GRANT, refresh_begun_at=NOW + 1, refresh_owner="a:1:b")
REFRESHING = GrantStatus(GrantState.ACTIVE, Health.REFRESHING, since=NOW + 1)
FAILING = RenewalHealth(failing_since=NOW + 2, failure="it is down", next_try_at=NOW + 9)
RETRYING = GrantStatus(GrantState.ACTIVE, Health.RETRYING, "it is down", NOW + 2, NOW + 9)
REJECTED = replace(FAILING, rejected_since=NOW + 3)
REFUSED = RenewalHealth(refused_at=NOW + 3, failure="invalid_grant")
ENDS = GRANT.tokens.expires_at
GONE = GrantStatus(GrantState.ENDED, Health.ENDED, "invalid_grant", NOW + 1)
EXPIRED_NOW = GrantStatus(GrantState.EXPIRED, Health.EXPIRED, since=ENDS)

TABLE = [
    # grant, now → state, health, reason, since, next try; word
    (GRANT, NOW, FRESH, "connected"),
    (UNATTENDED, NOW, FRESH, "connected"),
    (without_end(GRANT), LATER, FRESH, "connected"),
    (UNDER_WAY, NOW, REFRESHING, "connected"),
    (UNDER_WAY, LATER, REFRESHING, "connected"),
    (replace(GRANT, health=FAILING), NOW, RETRYING, "retrying"),
    (replace(GRANT, health=FAILING), LATER, replace(RETRYING, next_try=None), "retrying"),
    (
        replace(GRANT, health=REJECTED),
        NOW,
        GrantStatus(GrantState.DEGRADED, Health.DEGRADED, "it is down", NOW + 3, NOW + 9, is_retried=True),
        "degraded",
    ),
    (replace(GRANT, health=REJECTED), LATER, replace(RETRYING, next_try=None), "retrying"),
    (without_refresh_token(GRANT), NOW, DEGRADED, "degraded"),
    (without_end(without_refresh_token(GRANT)), LATER, DEGRADED, "degraded"),
    (
        replace(GRANT, health=REFUSED),
        NOW,
        GrantStatus(GrantState.DEGRADED, Health.DEGRADED, "invalid_grant", NOW + 3, ENDS),
        "degraded",
    ),
    (
        replace(without_end(GRANT), health=replace(REFUSED, failing_since=NOW + 4)),
        LATER,
        GrantStatus(GrantState.DEGRADED, Health.DEGRADED, "invalid_grant", NOW + 3),
        "degraded",
    ),
    (replace(GRANT, health=REFUSED), LATER, replace(EXPIRED_NOW, reason="invalid_grant"), "expired"),
    (replace(GRANT, health=replace(FAILING, refused_at=NOW)), LATER, replace(RETRYING, next_try=None), "retrying"),
    (GRANT, LATER, EXPIRED_NOW, "expired"),
    (UNATTENDED, LATER, EXPIRED_NOW, "expired"),
    (without_refresh_token(GRANT), LATER, GrantStatus(GrantState.ENDED, Health.ENDED, EXPIRED, ENDS), "ended"),
    (OVER, NOW + 2, GONE, "ended"),
    (replace(OVER, health=FAILING), NOW + 2, GONE, "ended"),
]


@pytest.mark.parametrize(("given", "now", "status", "shown"), TABLE)
def test_each_situation_has_its_state_and_word(given: Grant, now: float, status: GrantStatus, shown: str) -> None:
    assert grant_status(given, now=now) == status
    assert word(status) == shown


def test_a_connection_without_a_usable_grant_shows_what_its_user_does() -> None:
    over = GrantStatus(GrantState.ENDED, Health.ENDED)
    assert word(None) == "needs consent"
    assert word(None, authorizing=True) == word(over, authorizing=True) == "authorizing"
    assert word(FRESH, authorizing=True) == "connected"
    assert word(FRESH, unreachable=True) == word(None, unreachable=True) == "unreachable"


async def test_the_conditions_in_sql_find_what_the_rules_say(engine: Engine) -> None:
    grants, summaries = Grants(engine), GrantSummaries(engine)
    for number, (given, now, _, _) in enumerate(TABLE):
        # All are looked at at the same moment: what is to be dead by then gets its token earlier.
        shift = 0 if now < LATER or given.tokens.expires_at is None else -LATER
        tokens = replace(given.tokens, expires_at=given.tokens.expires_at and given.tokens.expires_at + shift)
        account = Account("local", f"server-{number}")
        stored = await grants.add(replace(given, tokens=tokens, key=replace(given.key, account=account)))
        if given.refresh_begun_at is not None:
            assert await grants.begin_refresh(stored.id, version=1, owner="a:1:b", now=NOW)
        if given.ended_at is not None:
            assert await grants.end(stored.id, version=1, reason=given.ended_reason, now=NOW)
    expected = {f"server-{number}": row[2].state for number, row in enumerate(TABLE)}
    for state in GrantState:
        found, after = await summaries.page(GrantFilter(state=state), after=0, count=100, now=NOW + 10)
        names = {summary.key.account.server for summary in found}
        assert names == {name for name, each in expected.items() if each is state}
        assert after is None
        assert all(grant_status(summary, now=NOW + 10).state is state for summary in found)
