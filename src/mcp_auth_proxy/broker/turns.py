"""Do something in one process at a time, among all that use one store; the others use what comes of it."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from mcp_auth_proxy.errors import StoreError
from mcp_auth_proxy.store.leases import Leases

T = TypeVar("T")

LOOK_INTERVAL = 0.1
"""Seconds between two looks at what another process makes of its turn."""


async def take_turn(
    leases: Leases,
    name: str,
    *,
    clock: Callable[[], float],
    longest: float,
    look: Callable[[], Awaitable[T | None]],
    work: Callable[[], Awaitable[T]],
) -> T:
    """Return what ``look`` finds, else what ``work`` makes while this process holds the lease ``name``.

    A turn ends after ``longest`` seconds at the latest, or with its process. So two may work at the same time after
    all: what they store must be decided there. Raises what ``look`` and ``work`` raise, and StoreError.
    """
    owner = leases.owners.new()
    while not await leases.claim(name, owner=owner, now=(claimed_at := clock()), longest=longest):
        while await leases.is_held(name, now=clock(), longest=longest):
            found = await look()
            if found is not None:
                return found
            await asyncio.sleep(LOOK_INTERVAL)
    try:
        found = await look()
        return found if found is not None else await work()
    finally:
        # If it can't be given back, it only lasts longer.
        with contextlib.suppress(StoreError):
            await leases.release(name, owner=owner, now=claimed_at)
