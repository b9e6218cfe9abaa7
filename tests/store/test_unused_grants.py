"""Which grants are due although nobody uses them: found by the store, without reading their secrets."""

from dataclasses import replace

import pytest

from mcp_auth_proxy.models import Account, Grant, GrantType, Principal, PrincipalStatus, RenewalHealth
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.principals import Principals
from mcp_auth_proxy.store.unused_grants import _NEXT, _PAGE, UnusedGrants
from store.builders import NOW, grant

DAY = 86_400.0
WEEK = 7 * DAY


async def add(engine: Engine, number: int, *, principal: str = "local", **changes: object) -> Grant:
    """Store a grant that was refreshed at NOW. ``changes`` are those of its tokens, or ``health``, ``grant_type``."""
    made = grant(name=str(number))
    kept = {name: changes.pop(name) for name in ("health", "grant_type") if name in changes}
    made = replace(
        made,
        key=replace(made.key, account=Account(principal, "linear", f"a{number}")),
        tokens=replace(made.tokens, **changes),  # type: ignore[arg-type]
    )
    return await Grants(engine).add(replace(made, **kept))  # type: ignore[arg-type]


async def due(engine: Engine, at: float, *, keep_alive: float = WEEK) -> list[int]:
    found = await UnusedGrants(engine).due(keep_alive=keep_alive, now=at, after=0, count=100)
    return [each.id for each in found]


async def test_a_grant_is_due_after_the_time_or_up_to_a_tenth_earlier(engine: Engine) -> None:
    ids = [(await add(engine, number)).id for number in range(20)]
    assert await due(engine, NOW + 0.89 * WEEK) == []
    assert await due(engine, NOW + WEEK) == ids
    some = await due(engine, NOW + 0.991 * WEEK)
    assert 0 < len(some) < 20, "not all at once"
    assert await UnusedGrants(engine).next_due(keep_alive=WEEK, now=NOW) == pytest.approx(NOW + 0.98 * WEEK)


async def test_a_refresh_token_that_lapses_earlier_is_due_after_a_third_of_its_time(engine: Engine) -> None:
    short = await add(engine, 1, refresh_expires_at=NOW + 3 * DAY)
    await add(engine, 2, refresh_expires_at=NOW + 365 * DAY)
    assert await due(engine, NOW + DAY) == [short.id]
    next_due = await UnusedGrants(engine).next_due(keep_alive=WEEK, now=NOW)
    assert next_due is not None
    assert NOW + 0.9 * DAY <= next_due <= NOW + DAY


async def test_what_must_not_or_need_not_be_refreshed_is_left_alone(engine: Engine) -> None:
    refused = RenewalHealth(refused_at=NOW, failure="invalid_grant")
    failing = RenewalHealth(failing_since=NOW, failure="down", next_try_at=NOW + 2 * WEEK)
    await add(engine, 1, refresh_token=None)
    await add(engine, 2, health=refused)
    waiting = await add(engine, 3, health=failing)
    await add(engine, 4, grant_type=GrantType.CLIENT_CREDENTIALS)
    ended = await add(engine, 5)
    assert await Grants(engine).end(ended.id, version=1, reason="over", now=NOW)
    await add(engine, 6, principal="prn_off")
    usable = await add(engine, 7, principal="prn_on")
    for name, status in (("prn_off", PrincipalStatus.DISABLED), ("prn_on", PrincipalStatus.ACTIVE)):
        await Principals(engine).add(Principal(id=name, name=name, status=status), [])
    assert await due(engine, NOW + WEEK) == [usable.id]
    assert await due(engine, NOW + 2 * WEEK) == [waiting.id, usable.id]


async def test_pages_continue_after_the_last_id(engine: Engine) -> None:
    ids = [(await add(engine, number)).id for number in range(5)]
    unused = UnusedGrants(engine)
    first = await unused.due(keep_alive=WEEK, now=NOW + WEEK, after=0, count=2)
    rest = await unused.due(keep_alive=WEEK, now=NOW + WEEK, after=first[-1].id, count=100)
    assert [each.id for each in (*first, *rest)] == ids


async def test_what_nobody_has_mended_is_found(engine: Engine) -> None:
    rejected = RenewalHealth(failing_since=NOW, failure="x", next_try_at=NOW + 3, rejected_since=NOW)
    wanted = await add(engine, 1, health=rejected)
    await add(engine, 2)
    unused = UnusedGrants(engine)
    assert await unused.unmended(before=NOW - 1, now=NOW + DAY, after=0, count=9) == []
    assert await unused.unmended(before=NOW, now=NOW + DAY, after=0, count=9) == [wanted.id]
    assert await unused.unmended(before=NOW, now=NOW, after=0, count=9) == [], "it is tried again later"


@pytest.mark.sqlite
@pytest.mark.parametrize("sql", [_PAGE, _NEXT], ids=["due", "next"])
async def test_no_row_is_read_to_see_that_it_is_not_due(engine: Engine, sql: str) -> None:
    values = {"keep_alive": WEEK, "now": NOW, "after": 0, "count": 50}
    used = {name: value for name, value in values.items() if f":{name}" in sql}
    plan = [row["detail"] for row in await engine.fetch_all(f"EXPLAIN QUERY PLAN {sql}", used)]
    assert "grants_by_refresh" in plan[0]
    assert not any("TEMP B-TREE" in line for line in plan)
