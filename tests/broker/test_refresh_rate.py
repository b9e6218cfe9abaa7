"""Whose turn it is to refresh: requests first, then what expires first; at a rate, in all processes on one store."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from math import inf
from pathlib import Path

import pytest

from fakes.proxy import until
from mcp_auth_proxy.broker import refresh_rate
from mcp_auth_proxy.broker.refresh_rate import RefreshRate
from mcp_auth_proxy.errors import AuthorizationServerUnavailable, RefreshRateExceeded, StoreUnavailable
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.refresh_slots import Pace, RefreshSlots, Reserved
from store.builders import store_settings

ISSUER = "https://issuer.example"


class Turns:
    """Those that ask for turns, and when they had them."""

    def __init__(self, rate: RefreshRate) -> None:
        self.rate = rate
        self.had: list[tuple[str, float]] = []

    async def request(self, name: str, **options: object) -> None:
        await self.rate.turn(ISSUER, **options)  # type: ignore[arg-type]
        self.had.append((name, time.monotonic()))

    def begin(self, name: str, *, wanted: bool = True) -> Callable[[], bool]:
        def begin() -> bool:
            if wanted:
                self.had.append((name, time.monotonic()))
            return wanted

        return begin

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.had]

    @property
    def times(self) -> list[float]:
        return [at for _, at in self.had]


@asynccontextmanager
async def turns_on(engine: Engine, rate: float = 10) -> AsyncIterator[Turns]:
    turns = Turns(RefreshRate(slots=RefreshSlots(engine), clock=time.time, rate=rate))
    yield turns
    await turns.rate.aclose()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = await open_store(store_settings(tmp_path))
    yield engine
    await engine.close()


@pytest.fixture
async def turns(engine: Engine) -> AsyncIterator[Turns]:
    async with turns_on(engine) as turns:
        yield turns


def most_in_a_second(times: list[float]) -> int:
    return max(sum(start <= at < start + 1 for at in times) for start in times)


async def test_requests_have_their_turns_in_order_a_burst_first(turns: Turns) -> None:
    started = time.monotonic()
    await asyncio.gather(*(turns.request(str(number)) for number in range(15)))
    assert turns.names == [str(number) for number in range(15)]
    assert turns.times[9] - started < 0.9
    assert most_in_a_second(turns.times) == 10
    assert turns.times[-1] - started < 3


async def test_requests_go_first_and_then_what_expires_first(turns: Turns) -> None:
    now = time.time()
    await asyncio.gather(*(turns.request("") for _ in range(10)))
    turns.rate.later(ISSUER, now - 1, turns.begin("expired"))
    turns.rate.later(ISSUER, now + 99, turns.begin("later"))
    turns.rate.later(ISSUER, now + 98, turns.begin("not wanted", wanted=False))
    turns.rate.later(ISSUER, inf, turns.begin("never"))
    awaited = asyncio.create_task(turns.request("soon", background=True, expires_at=now + 50))
    await asyncio.gather(turns.request("first"), turns.request("second"))
    await until(lambda: len(turns.had) == 16)
    assert turns.names[10:] == ["first", "second", "soon", "later", "never", "expired"]
    assert most_in_a_second(turns.times) == 10
    await awaited


async def test_a_background_turn_that_a_request_waits_for_is_promoted(turns: Turns) -> None:
    await asyncio.gather(*(turns.request("") for _ in range(10)))
    background = [
        asyncio.create_task(turns.request(str(number), key=number, background=True, expires_at=2e9 + number))
        for number in range(5)
    ]
    await asyncio.sleep(0)
    turns.rate.promote(ISSUER, 4)
    turns.rate.promote(ISSUER, "unknown")
    turns.rate.promote("https://other.example", 3)
    await asyncio.gather(*background)
    assert turns.names[10:] == ["4", "0", "1", "2", "3"]


async def test_the_background_of_one_process_waits_for_the_requests_of_another(tmp_path: Path) -> None:
    stores = [await open_store(store_settings(tmp_path)) for _ in range(2)]
    async with turns_on(stores[0], 40) as ours, turns_on(stores[1], 40) as theirs:
        asking = [asyncio.create_task(ours.request("request")) for _ in range(80)]
        await until(lambda: len(ours.had) >= 40)
        for _ in range(20):
            theirs.rate.later(ISSUER, inf, theirs.begin("background"))
        await asyncio.gather(*asking)
        await until(lambda: len(theirs.had) == 20)
        # The last requests have reserved their times, so the background may come between them.
        assert sum(at < ours.times[-1] for at in theirs.times) <= 4
        assert most_in_a_second([*ours.times, *theirs.times]) <= 40
    for each in stores:
        await each.close()


async def test_processes_on_one_store_share_the_rate(tmp_path: Path) -> None:
    stores = [await open_store(store_settings(tmp_path)) for _ in range(3)]
    async with turns_on(stores[0]) as one, turns_on(stores[1]) as two, turns_on(stores[2]) as three:
        every = (one, two, three)
        await asyncio.gather(*(each.request("") for each in every for _ in range(8)))
        assert most_in_a_second([at for each in every for at in each.times]) <= 10
    for each in stores:
        await each.close()


async def test_issuers_do_not_wait_for_each_other(turns: Turns) -> None:
    started = time.monotonic()
    await asyncio.gather(*(turns.rate.turn(f"https://{number}.example") for number in range(30)))
    assert time.monotonic() - started < 1


async def test_a_request_waits_for_a_bounded_time_and_is_told_when_to_come_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh_rate, "LONGEST_WAIT", 0.2)
    async with turns_on(engine, 0.1) as turns:
        await turns.request("first")
        started = time.monotonic()
        with pytest.raises(
            RefreshRateExceeded, match=r"at most 0\.1 refreshes a second \(limits\.refresh_rate\)"
        ) as it:
            await turns.request("second")
        assert 0.15 < time.monotonic() - started < 5
        assert it.value.retry_after == 10
        assert turns.names == ["first"]


async def test_a_request_that_would_wait_too_long_does_not_wait(engine: Engine) -> None:
    async with turns_on(engine, 0.02) as turns:
        await turns.request("first")
        waiting = asyncio.create_task(turns.request("second"))
        await asyncio.sleep(0)
        started = time.monotonic()
        with pytest.raises(RefreshRateExceeded) as exceeded:
            await turns.request("third")
        assert time.monotonic() - started < 5
        assert (exceeded.value.retry_after or 0) >= 50
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_turn_that_was_not_needed_goes_to_the_next(engine: Engine) -> None:
    async with turns_on(engine, 0.1) as turns:
        waiting = [asyncio.create_task(turns.request(str(number))) for number in range(2)]
        await until(lambda: turns.names == ["0"])
        turns.rate.unused(ISSUER)
        turns.rate.unused("https://other.example")
        await asyncio.wait_for(asyncio.gather(*waiting), 5)
        assert turns.names == ["0", "1"]


async def test_what_comes_together_after_its_turn_is_sent_apart(turns: Turns) -> None:
    async def send(name: str) -> None:
        await turns.rate.sending(ISSUER)
        turns.had.append((name, time.monotonic()))

    waiting = [asyncio.create_task(send(str(number))) for number in range(25)]
    await until(lambda: len(turns.had) == 10)
    await turns.request("turn")
    # No turn is given while a second's worth of them waits.
    assert len(turns.had) > 15
    await asyncio.gather(*waiting)
    sent = [(name, at) for name, at in turns.had if name != "turn"]
    assert [name for name, _ in sent] == [str(number) for number in range(25)]
    assert most_in_a_second([at for _, at in sent]) == 10


async def test_what_was_sent_long_ago_is_forgotten(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    await turns.rate.sending(ISSUER)
    await turns.rate.purge()
    assert set(turns.rate._sendings) == {ISSUER}
    monkeypatch.setattr(refresh_rate, "SENDING_SLACK", -1)
    await turns.rate.purge()
    assert not turns.rate._sendings


async def test_who_does_not_wait_any_more_takes_no_turn(engine: Engine) -> None:
    async with turns_on(engine, 2) as turns:
        await asyncio.gather(turns.request(""), turns.request(""))
        waiting = [asyncio.create_task(turns.request(str(number))) for number in range(5)]
        await asyncio.sleep(0.01)
        for task in waiting[:4]:
            task.cancel()
        started = time.monotonic()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert turns.names == ["", "", "4"]
        assert time.monotonic() - started < 2


async def test_a_pause_that_a_server_asks_for_holds_for_every_process(tmp_path: Path) -> None:
    stores = [await open_store(store_settings(tmp_path)) for _ in range(2)]
    async with turns_on(stores[0]) as ours, turns_on(stores[1]) as theirs:
        started = time.monotonic()
        await ours.rate.pause(ISSUER, 0.5)
        theirs.rate.later(ISSUER, inf, theirs.begin("background"))
        await asyncio.gather(ours.request("ours"), theirs.request("theirs"))
        await until(lambda: len(theirs.had) == 2)
        assert min(*ours.times, *theirs.times) - started >= 0.45
        await ours.rate.pause(ISSUER, 100)
        with pytest.raises(RefreshRateExceeded) as exceeded:
            await theirs.request("theirs")
        assert 95 < (exceeded.value.retry_after or 0) <= 100
    for each in stores:
        await each.close()


async def test_a_pause_drops_what_was_reserved(engine: Engine) -> None:
    async with turns_on(engine, 20) as turns:
        waiting = [asyncio.create_task(turns.request("")) for _ in range(40)]
        await until(lambda: len(turns.had) >= 25)
        await turns.rate.pause(ISSUER, 100)
        had = len(turns.had)
        results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
        assert sum(isinstance(each, RefreshRateExceeded) for each in results) == 40 - had


async def test_a_pause_holds_at_once_though_the_store_is_slow(engine: Engine) -> None:
    async with turns_on(engine, 20) as turns:
        waiting = [asyncio.create_task(turns.request("")) for _ in range(40)]
        await until(lambda: len(turns.had) >= 20)
        async with engine.transaction():
            pausing = asyncio.create_task(turns.rate.pause(ISSUER, 100))
            await asyncio.sleep(0)
            with pytest.raises(RefreshRateExceeded, match=r"asked for a pause \(Retry-After\)") as exceeded:
                await turns.rate.sending(ISSUER)  # one that has had its turn
            had = len(turns.had)
            await asyncio.sleep(refresh_rate.AHEAD)  # what was reserved would have come by then
            assert len(turns.had) == had
        await pausing
        assert 95 < (exceeded.value.retry_after or 0) <= 100
        await turns.rate.purge()
        assert set(turns.rate._sendings) == {ISSUER}
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_another_rate_holds_for_those_that_wait_too(engine: Engine) -> None:
    async with turns_on(engine, 0.1) as turns:
        await turns.request("first")
        waiting = asyncio.create_task(turns.request("second"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        turns.rate.set_rate(10)
        await asyncio.wait_for(waiting, 5)


class FailingSlots(RefreshSlots):
    """A store that can't be used a number of times."""

    failures = 1

    async def reserve(self, issuer: str, pace: Pace, *, now: float, count: int, ahead: float, spaced: bool) -> Reserved:
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("The store can't be used now.")
        return await super().reserve(issuer, pace, now=now, count=count, ahead=ahead, spaced=spaced)

    async def pause(self, issuer: str, *, until: float, now: float) -> None:
        raise StoreUnavailable("The store can't be used now.")


async def test_a_store_that_fails_fails_requests_and_delays_the_background(engine: Engine) -> None:
    turns = Turns(RefreshRate(slots=FailingSlots(engine), clock=time.time))
    turns.rate.later(ISSUER, inf, turns.begin("background"))
    with pytest.raises(StoreUnavailable):
        await turns.request("request")
    await until(lambda: turns.names == ["background"])
    await turns.rate.pause(ISSUER, 10)
    await turns.rate.aclose()


async def test_at_the_end_nobody_waits(engine: Engine) -> None:
    turns = Turns(RefreshRate(slots=RefreshSlots(engine), clock=time.time, rate=0.1))
    await turns.request("first")
    waiting = [
        asyncio.create_task(turns.request("second")),
        asyncio.create_task(turns.request("third", background=True)),
    ]
    turns.rate.later(ISSUER, inf, turns.begin("fourth"))
    await asyncio.sleep(0.01)
    await turns.rate.aclose()
    with pytest.raises(AuthorizationServerUnavailable, match="shutting down"):
        await turns.request("fifth")
    turns.rate.later(ISSUER, inf, turns.begin("sixth"))
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, AuthorizationServerUnavailable)
    assert turns.names == ["first"]
