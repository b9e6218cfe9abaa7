"""The state of each grant: the table that commands, pages and the API share, and the same rules in SQL."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.broker.states import EXPIRED, GrantStatus, Health, grant_status, word
from mcp_auth_proxy.models import Account, Grant, GrantType
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.grant_summaries import GrantFilter, GrantState, GrantSummaries
from mcp_auth_proxy.store.grants import Grants
from store.builders import NOW, grant, store_settings

LATER = NOW + 3600
FRESH = GrantStatus(GrantState.ACTIVE, Health.FRESH)
DEGRADED = GrantStatus(GrantState.DEGRADED, Health.DEGRADED)


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

TABLE = [
    # grant, now, failure → state, health, reason, word
    (GRANT, NOW, None, FRESH, "connected"),
    (UNATTENDED, NOW, None, FRESH, "connected"),
    (without_end(GRANT), LATER, None, FRESH, "connected"),
    (UNDER_WAY, NOW, None, GrantStatus(GrantState.ACTIVE, Health.REFRESHING), "connected"),
    (UNDER_WAY, LATER, None, GrantStatus(GrantState.ACTIVE, Health.REFRESHING), "connected"),
    (GRANT, NOW, "it is down", GrantStatus(GrantState.ACTIVE, Health.RETRYING, "it is down"), "retrying"),
    (GRANT, LATER, "it is down", GrantStatus(GrantState.ACTIVE, Health.RETRYING, "it is down"), "retrying"),
    (without_refresh_token(GRANT), NOW, None, DEGRADED, "degraded"),
    (without_end(without_refresh_token(GRANT)), LATER, None, DEGRADED, "degraded"),
    (GRANT, LATER, None, GrantStatus(GrantState.EXPIRED, Health.EXPIRED), "expired"),
    (UNATTENDED, LATER, None, GrantStatus(GrantState.EXPIRED, Health.EXPIRED), "expired"),
    (without_refresh_token(GRANT), LATER, None, GrantStatus(GrantState.ENDED, Health.ENDED, EXPIRED), "ended"),
    (OVER, NOW + 2, None, GrantStatus(GrantState.ENDED, Health.ENDED, "invalid_grant"), "ended"),
    (OVER, NOW + 2, "it is down", GrantStatus(GrantState.ENDED, Health.ENDED, "invalid_grant"), "ended"),
]


@pytest.mark.parametrize(("given", "now", "failure", "status", "shown"), TABLE)
def test_each_situation_has_its_state_and_word(
    given: Grant, now: float, failure: str | None, status: GrantStatus, shown: str
) -> None:
    assert grant_status(given, now=now, failure=failure) == status
    assert word(status) == shown


def test_a_connection_without_a_usable_grant_shows_what_its_user_does() -> None:
    over = GrantStatus(GrantState.ENDED, Health.ENDED)
    assert word(None) == "needs consent"
    assert word(None, authorizing=True) == word(over, authorizing=True) == "authorizing"
    assert word(FRESH, authorizing=True) == "connected"
    assert word(FRESH, unreachable=True) == word(None, unreachable=True) == "unreachable"


async def test_the_conditions_in_sql_find_what_the_rules_say(engine: Engine) -> None:
    grants, summaries = Grants(engine), GrantSummaries(engine)
    retried = set()
    for number, (given, now, failure, _, _) in enumerate(TABLE):
        # All are looked at at the same moment: what is to be dead by then gets its token earlier.
        shift = 0 if now < LATER or given.tokens.expires_at is None else -LATER
        tokens = replace(given.tokens, expires_at=given.tokens.expires_at and given.tokens.expires_at + shift)
        account = Account("local", f"server-{number}")
        stored = await grants.add(replace(given, tokens=tokens, key=replace(given.key, account=account)))
        if given.refresh_begun_at is not None:
            assert await grants.begin_refresh(stored.id, version=1, owner="a:1:b", now=NOW)
        if given.ended_at is not None:
            assert await grants.end(stored.id, version=1, reason=given.ended_reason, now=NOW)
        if failure is not None:
            retried.add(stored.id)
    expected = {f"server-{number}": row[3].state for number, row in enumerate(TABLE)}
    for state in GrantState:
        wanted = GrantFilter(state=state, retried=retried)
        found, after = await summaries.page(wanted, after=0, count=100, now=NOW + 10)
        names = {summary.key.account.server for summary in found}
        assert names == {name for name, each in expected.items() if each is state}
        assert after is None
        for summary in found:
            failure = "it is down" if summary.id in retried else None
            assert grant_status(summary, now=NOW + 10, failure=failure).state is state
