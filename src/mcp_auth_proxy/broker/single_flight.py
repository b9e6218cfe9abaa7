"""Runs one piece of work per key, however many ask for it at once."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class SingleFlight(Generic[K, T]):
    """The work belongs to nobody who waits for it: a waiter that is cancelled does not take it down."""

    def __init__(self) -> None:
        self._running: dict[K, asyncio.Task[T]] = {}

    async def run(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what ``work`` returns, or raise what it raises, starting it only if it is not under way."""
        return await asyncio.shield(self.start(key, work))

    def start(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Start ``work`` unless it is under way; return the task that does it."""
        task = self._running.get(key)
        # One that is done may still be there: others get a turn between its end and the callback.
        if task is None or task.done():
            task = asyncio.create_task(work())
            self._running[key] = task
            task.add_done_callback(lambda done: self._finished(key, done))
        return task

    def _finished(self, key: K, task: asyncio.Task[T]) -> None:
        if self._running.get(key) is task:
            del self._running[key]
        if not task.cancelled():
            # Marks the exception as seen: with nobody waiting, asyncio would report it a second time.
            task.exception()

    async def aclose(self) -> None:
        """Cancel all that is under way and wait for it to end."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def settle(self, timeout: float) -> None:
        """Wait until nothing is under way, at most ``timeout`` seconds."""
        if self._running:
            await asyncio.wait(list(self._running.values()), timeout=timeout)

    def __contains__(self, key: K) -> bool:
        task = self._running.get(key)
        return task is not None and not task.done()
