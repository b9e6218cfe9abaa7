"""Named leases: which process does something that must happen once on one store, and whether it is still alive.

A lease is a row of ``meta``. To claim one is a single upsert, which also locks the row until the transaction ends: so
two processes that claim in the same instant come one after the other, on a server with row locks too.
"""

import asyncio
import json
import math

from mcp_auth_proxy.store.engine import Engine, Transaction
from mcp_auth_proxy.store.lease import KEPT_SECONDS, Owners

FREE = b""
"""The value of a lease that nobody holds: its row is only locked."""

_PREFIX = "lease:"
# The value stays as it is; what the upsert returns is who holds the lease.
_LOCK = """
    INSERT INTO meta (name, value) VALUES (:name, :value) ON CONFLICT (name) DO UPDATE SET value = meta.value
    RETURNING value
"""
_TAKE = "UPDATE meta SET value = :value WHERE name = :name"
_RELEASE = "DELETE FROM meta WHERE name = :name AND (value = :value OR value = :free)"
_FIND = "SELECT value FROM meta WHERE name = :name"
_ALL = "SELECT name, value FROM meta WHERE substr(name, 1, :length) = :prefix"


async def lock(transaction: Transaction, name: str) -> None:
    """Let nobody else claim or lock a lease until the transaction ends. Who holds it does not change."""
    await transaction.execute(_LOCK, {"name": _PREFIX + name, "value": FREE})


async def claim(transaction: Transaction, owners: Owners, name: str, *, owner: str, now: float, longest: float) -> bool:
    """Claim a lease within a transaction; see ``Leases.claim``."""
    owners.appear()
    values = {"name": _PREFIX + name, "value": _value(owner, now)}
    rows = await transaction.execute(_LOCK, values)
    held = rows[0]["value"] if rows else FREE
    if held != values["value"]:
        if _holder(held) != owner and _is_held(held, owners, now, longest):
            return False
        await transaction.execute(_TAKE, values)
    owners.took(name)
    return True


class Leases:
    """The leases in the store. Every method raises StoreUnavailable if the store can't be used now.

    ``owner`` comes from ``owners.new``, ``now`` is Unix seconds, ``longest`` the seconds after which a lease is free
    though its owner may be alive. That of a process that is certainly dead is free at once.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.owners = engine.owners

    async def claim(self, name: str, *, owner: str, now: float, longest: float) -> bool:
        """Claim a lease. Return False if another owner holds it."""
        async with self._engine.transaction() as transaction:
            return await claim(transaction, self.owners, name, owner=owner, now=now, longest=longest)

    async def is_held(self, name: str, *, now: float, longest: float) -> bool:
        """Return whether somebody holds a lease. Nothing is written."""
        row = await self._engine.fetch_one(_FIND, {"name": _PREFIX + name})
        return row is not None and _is_held(row["value"], self.owners, now, longest)

    async def release(self, name: str, *, owner: str, now: float) -> None:
        """Give back a lease that was claimed by this owner at ``now``; if another has taken over, nothing changes."""
        async with self._engine.transaction() as transaction:
            values = {"name": _PREFIX + name, "value": _value(owner, now), "free": FREE}
            await transaction.execute(_RELEASE, values)
        self.owners.gave_back(name)

    async def purge(self, now: float) -> None:
        """Delete the leases that nobody gave back, and the files of dead processes."""
        await asyncio.to_thread(self.owners.clean_up)
        async with self._engine.transaction() as transaction:
            for row in await transaction.execute(_ALL, {"length": len(_PREFIX), "prefix": _PREFIX}):
                begun_at = _begun_at(row["value"])
                if begun_at is None or abs(now - begun_at) > KEPT_SECONDS:
                    await transaction.execute("DELETE FROM meta WHERE name = :name", {"name": row["name"]})


def _value(owner: str, now: float) -> bytes:
    return json.dumps([owner, now]).encode()


def _read(value: object) -> tuple[str, float] | None:
    """Return owner and time of a lease; None if nobody holds it, or if something else has written it."""
    try:
        owner, begun_at = json.loads(value if isinstance(value, bytes) else b"")
        found = str(owner), float(begun_at)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    return found if math.isfinite(found[1]) else None


def _holder(value: object) -> str:
    found = _read(value)
    return found[0] if found is not None else ""


def _begun_at(value: object) -> float | None:
    found = _read(value)
    return found[1] if found is not None else None


def _is_held(value: object, owners: Owners, now: float, longest: float) -> bool:
    found = _read(value)
    return found is not None and owners.is_held(*found, now, longest=longest)
