"""Run one piece of work per key, however many callers ask for it at once."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterator
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class SingleFlight(Generic[K, T]):
    """Share running work among its callers. Cancelling one caller does not cancel the work."""

    def __init__(self) -> None:
        self._running: dict[K, asyncio.Task[T]] = {}

    async def run(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what ``work`` returns, or raise what it raises. Starts it only if it is not running already."""
        return await asyncio.shield(self.start(key, work))

    def start(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Start ``work`` unless it is running already; return the task that runs it."""
        task = self._running.get(key)
        # A task that is done may still be listed: other tasks can run between its end and the callback.
        if task is None or task.done():
            task = asyncio.create_task(work())
            self._running[key] = task
            task.add_done_callback(lambda done: self._finished(key, done))
        return task

    def _finished(self, key: K, task: asyncio.Task[T]) -> None:
        if self._running.get(key) is task:
            del self._running[key]
        if not task.cancelled():
            # Marks the exception as retrieved: if nobody waits, asyncio would log it.
            task.exception()

    async def aclose(self) -> None:
        """Cancel all running work and wait for it to end."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def settle(self, timeout: float) -> None:
        """Wait at most ``timeout`` seconds for all running work to end."""
        if self._running:
            await asyncio.wait(list(self._running.values()), timeout=timeout)

    def __iter__(self) -> Iterator[K]:
        """Return the keys of all running work."""
        return iter(tuple(self._running))

    def __contains__(self, key: K) -> bool:
        task = self._running.get(key)
        return task is not None and not task.done()
