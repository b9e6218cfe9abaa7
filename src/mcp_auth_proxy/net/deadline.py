"""A deadline that is fair to a process which was stopped: what has arrived meanwhile is read first."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

PATIENCE = 0.2
"""Seconds after the deadline in which the event loop reads what has arrived."""


@asynccontextmanager
async def patient_timeout(seconds: float) -> AsyncIterator[None]:
    """Cancel the block soon after ``seconds``, and raise TimeoutError in its place.

    A process that goes on after SIGSTOP, or after its machine has slept, finds its timers due before it has read the
    response that has been in the socket for long. With ``asyncio.timeout`` that response would be lost, and with it
    the refresh token in it.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        timer = loop.call_later(seconds, lambda: limit.reschedule(loop.time() + PATIENCE))
        try:
            yield
        finally:
            timer.cancel()
