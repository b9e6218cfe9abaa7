"""One piece of work per key, however many callers there are and even if they are cancelled."""

import asyncio
import gc

import pytest

from mcp_auth_proxy.broker.single_flight import SingleFlight


class Work:
    """Counts its runs; ends when ``end`` is called."""

    def __init__(self) -> None:
        self.runs = 0
        self.cancelled = 0
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def __call__(self) -> int:
        self.runs += 1
        try:
            return await asyncio.shield(self._end)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def end(self, outcome: int | Exception = 1) -> None:
        if isinstance(outcome, Exception):
            self._end.set_exception(outcome)
        else:
            self._end.set_result(outcome)


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_thousand_callers_share_one_run() -> None:  # F3
    flight: SingleFlight[str, int] = SingleFlight()
    work = Work()
    callers = [asyncio.create_task(flight.run("key", work)) for _ in range(1000)]
    await turns()
    work.end(7)
    assert await asyncio.gather(*callers) == [7] * 1000
    assert work.runs == 1
    assert "key" not in flight


async def test_keys_do_not_wait_for_each_other() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    slow, quick = Work(), Work()
    waiting = asyncio.create_task(flight.run("slow", slow))
    quick.end(2)
    assert await flight.run("quick", quick) == 2
    assert not waiting.done()
    slow.end(1)
    assert await waiting == 1


async def test_every_caller_gets_the_failure_and_the_next_one_starts_again() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    work = Work()
    callers = [asyncio.create_task(flight.run("key", work)) for _ in range(3)]
    await turns()
    work.end(ValueError("no"))
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["no"] * 3
    again = Work()
    again.end(2)
    assert await flight.run("key", again) == 2


async def test_a_cancelled_caller_does_not_cancel_the_work() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    work = Work()
    leaver, stayer = (asyncio.create_task(flight.run("key", work)) for _ in range(2))
    await turns()
    leaver.cancel()
    await turns()
    assert leaver.cancelled()
    work.end(3)
    assert await stayer == 3
    assert (work.runs, work.cancelled) == (1, 0)


async def test_the_work_continues_if_every_caller_is_cancelled() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    work = Work()
    leaver = asyncio.create_task(flight.run("key", work))
    await turns()
    leaver.cancel()
    await turns()
    assert "key" in flight
    newcomer = asyncio.create_task(flight.run("key", work))
    await turns()
    work.end(4)
    assert await newcomer == 4
    assert work.runs == 1


async def test_a_failure_that_nobody_waits_for_is_not_reported_by_asyncio() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    work = Work()
    leaver = asyncio.create_task(flight.run("key", work))
    await turns()
    leaver.cancel()
    await turns()
    work.end(ValueError("no"))
    await turns()
    del leaver, work
    gc.collect()
    await turns()
    assert reported == []
    assert "key" not in flight


async def test_work_that_has_just_ended_is_not_shared() -> None:
    """Between the end of a task and its callbacks, others get a turn: they must not be handed the old outcome."""
    flight: SingleFlight[str, int] = SingleFlight()
    begun = asyncio.Event()

    async def fail() -> int:
        # Wakes this test after the task has ended, and before the callbacks of its end.
        begun.set()
        raise ValueError("no")

    async def again() -> int:
        return 2

    first = flight.start("key", fail)
    await begun.wait()
    assert first.done()
    assert "key" not in flight
    assert await flight.run("key", again) == 2
    await turns()
    assert "key" not in flight


async def test_closing_cancels_running_work_and_waits_for_its_end() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    work = Work()
    caller = asyncio.create_task(flight.run("key", work))
    await turns()
    await flight.aclose()
    assert work.cancelled == 1
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert "key" not in flight
    await flight.aclose()


async def test_settling_waits_for_the_end_for_a_bounded_time() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    await flight.settle(timeout=10)
    work = Work()
    task = flight.start("key", work)
    await flight.settle(timeout=0.01)
    assert not task.done()
    asyncio.get_running_loop().call_soon(work.end, 5)
    await flight.settle(timeout=10)
    assert task.result() == 5
