"""A deadline that a stopped process does not miss what has arrived for."""

import asyncio
import socket
import time

import pytest

from mcp_auth_proxy.net.deadline import patient_timeout


async def test_what_does_not_end_in_time_is_cancelled() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        async with patient_timeout(0.05):
            await asyncio.Event().wait()
    assert 0.05 <= time.monotonic() - started < 5


async def test_what_arrived_while_the_process_stood_still_is_read_first() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader, writer = await asyncio.open_connection(sock=ours)
        async with patient_timeout(0.05):
            reading = asyncio.create_task(reader.readexactly(4))
            await asyncio.sleep(0)
            theirs.sendall(b"late")
            # As after SIGSTOP: all timers are due when the event loop goes on.
            time.sleep(0.3)
            assert await reading == b"late"
        writer.close()
        await writer.wait_closed()


async def test_a_cancellation_is_no_timeout() -> None:
    async def wait() -> None:
        async with patient_timeout(60):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
