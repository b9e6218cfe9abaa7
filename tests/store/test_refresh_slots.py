"""The schedule of refreshes that processes share: never more than the rate in a second, and no burst after another."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.refresh_slots import KEPT_SECONDS, LONGEST_PAUSE, MAX_AHEAD, Pace, RefreshSlots, Schedule
from store.builders import NOW, store_settings

ISSUER = "https://issuer.example"
TEN = Pace.of(10)


@pytest.fixture
def slots(engine: Engine) -> RefreshSlots:
    return RefreshSlots(engine)


async def names(engine: Engine) -> list[str]:
    rows = await engine.fetch_all("SELECT name FROM meta WHERE name LIKE 'refresh_rate:%'")
    return [row["name"] for row in rows]


def most_in_a_second(times: list[float]) -> int:
    return max(sum(start <= at < start + 1 for at in times) for start in times)


async def test_after_a_quiet_second_a_burst_goes_at_once_and_the_rest_evenly(slots: RefreshSlots) -> None:
    found = await slots.reserve(ISSUER, TEN, now=NOW, count=25, ahead=MAX_AHEAD, spaced=False)
    assert found.times[:10] == [NOW] * 10
    assert found.times[10] == pytest.approx(NOW + 1.1)
    assert found.times[24] == pytest.approx(NOW + 1.1 + 14 * 0.11)
    assert most_in_a_second(found.times) == 10


async def test_the_background_has_no_burst(slots: RefreshSlots) -> None:
    found = await slots.reserve(ISSUER, TEN, now=NOW, count=25, ahead=0.5, spaced=True)
    assert found.times == pytest.approx([NOW + 0.11 * number for number in range(5)])
    assert found.next_at == pytest.approx(NOW + 0.55)


async def test_issuers_have_schedules_of_their_own_without_their_names(slots: RefreshSlots, engine: Engine) -> None:
    for issuer in (ISSUER, f"{ISSUER}/2"):
        assert (await slots.reserve(issuer, TEN, now=NOW, count=10, ahead=0, spaced=False)).times == [NOW] * 10
    assert len(found := await names(engine)) == 2
    assert not any("issuer.example" in name for name in found)


async def test_nothing_is_written_if_nothing_can_be_reserved(tmp_path: Path) -> None:
    ours, theirs = [await open_store(store_settings(tmp_path)) for _ in range(2)]
    slots = RefreshSlots(ours)
    await slots.reserve(ISSUER, TEN, now=NOW, count=10, ahead=0, spaced=False)
    await theirs.changed()
    found = await slots.reserve(ISSUER, TEN, now=NOW, count=10, ahead=0.5, spaced=False)
    assert not found.times
    assert found.next_at == pytest.approx(NOW + 1.1)
    assert not await theirs.changed()
    await ours.close()
    await theirs.close()


async def test_processes_that_reserve_at_once_share_the_rate(tmp_path: Path) -> None:
    stores = [await open_store(store_settings(tmp_path)) for _ in range(4)]
    asked = [
        RefreshSlots(each).reserve(ISSUER, TEN, now=NOW, count=3, ahead=MAX_AHEAD, spaced=False)
        for each in stores
        for _ in "abc"
    ]
    times = sorted(at for found in await asyncio.gather(*asked) for at in found.times)
    assert (len(times), most_in_a_second(times)) == (36, 10)
    for each in stores:
        await each.close()


@given(
    st.sampled_from([0.1, 0.5, 1.0, 2.0, 10.0, 200.0]),
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 60), st.sampled_from([0.0, 0.2, 0.5]), st.booleans())),
)
def test_never_are_there_more_than_the_rate_in_a_second(
    rate: float, asked: list[tuple[float, int, float, bool]]
) -> None:
    schedule, now, times = Schedule(), NOW, list[float]()
    for later, count, ahead, spaced in asked:
        now += later
        schedule, reserved = schedule.reserve(Pace.of(rate), now, count=count, ahead=ahead, spaced=spaced)
        assert all(now <= at <= now + ahead for at in reserved.times)
        assert reserved.next_at > now + ahead or len(reserved.times) == count
        times += reserved.times
    assert times == sorted(times)
    burst, window = Pace.of(rate)
    assert all(late - early >= window - 1e-3 for early, late in zip(times, times[burst:], strict=False))
    assert window >= max(1.0, 1.0 / rate)


async def test_a_pause_holds_for_every_process_and_ends(tmp_path: Path) -> None:
    ours, theirs = [await open_store(store_settings(tmp_path)) for _ in range(2)]
    await RefreshSlots(ours).pause(ISSUER, until=NOW + 20, now=NOW)
    await RefreshSlots(ours).pause(ISSUER, until=NOW + 10, now=NOW)
    found = await RefreshSlots(theirs).reserve(ISSUER, TEN, now=NOW, count=1, ahead=0.5, spaced=False)
    assert (found.times, found.next_at, found.paused_until) == ([], NOW + 20, NOW + 20)
    found = await RefreshSlots(theirs).reserve(ISSUER, TEN, now=NOW + 20, count=1, ahead=0.5, spaced=False)
    assert (found.times, found.paused_until) == ([NOW + 20], 0.0)
    await ours.close()
    await theirs.close()


@pytest.mark.parametrize("pace", [TEN, Pace.of(0.1)])
async def test_times_of_a_clock_that_was_set_back_do_not_count(slots: RefreshSlots, pace: Pace) -> None:
    await slots.reserve(ISSUER, pace, now=NOW, count=10, ahead=0, spaced=False)
    await slots.pause(ISSUER, until=NOW + LONGEST_PAUSE, now=NOW)
    found = await slots.reserve(ISSUER, pace, now=NOW - 60, count=1, ahead=0, spaced=False)
    assert found.times == [NOW - 60]


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"nonsense",
        b"[]",
        b"[" * 5000,
        "text",
        b'{"times": 1}',
        b'{"times": ["x"], "paused_until": 0}',
        b'{"times": [NaN, 1e999], "paused_until": NaN}',
        b'{"times": [%d], "paused_until": 0}' % 10**400,
    ],
)
async def test_a_row_that_something_else_has_written_is_begun_anew(  # T91
    slots: RefreshSlots, engine: Engine, value: object
) -> None:
    await slots.reserve(ISSUER, TEN, now=NOW, count=1, ahead=0, spaced=False)
    async with engine.transaction() as transaction:
        await transaction.execute("UPDATE meta SET value = :value WHERE name LIKE 'refresh_rate:%'", {"value": value})
    found = await slots.reserve(ISSUER, TEN, now=NOW, count=1, ahead=0, spaced=False)
    assert found.times == [NOW]


async def test_what_is_not_used_any_more_is_purged(slots: RefreshSlots, engine: Engine) -> None:
    await slots.reserve(ISSUER, TEN, now=NOW, count=1, ahead=0, spaced=False)
    await slots.purge(NOW + KEPT_SECONDS)
    assert len(await names(engine)) == 1
    await slots.purge(NOW + KEPT_SECONDS + 1)
    assert await names(engine) == []
