"""The keys of an open store: which of them rows need, and other keys for a process that runs."""

import asyncio
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.errors import KeyRejected
from mcp_auth_proxy.store.cipher import Cipher, load_keys
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.key_checks import ADD, KEY_ROWS, check_rows
from mcp_auth_proxy.store.sealed_tables import rows_by_key

_CHECKS = "SELECT name FROM meta WHERE substr(name, 1, :length) = :prefix"


@dataclass(frozen=True, slots=True)
class KeyUse:
    """A key, where it comes from, and how many rows need it."""

    id: str
    source: KeySource | None
    """None: rows are sealed with it, but it is not in ``store.keys``."""
    rows: int
    droppable: bool
    """Whether nothing is lost if it is removed from ``store.keys``."""


def key_uses(settings: StoreSettings, key_ids: Sequence[str], rows: Mapping[str, int]) -> list[KeyUse]:
    """Return the configured keys in their order, then those that only rows name.

    ``key_ids`` are those of ``settings.keys``, ``rows`` is as ``rows_by_key`` says.
    """
    found: list[KeyUse] = []
    for source, key_id in zip(settings.keys, key_ids, strict=True):
        # A key that is there twice can lose one of its places.
        droppable = bool(found) and (not rows.get(key_id) or key_id in {use.id for use in found})
        found.append(KeyUse(key_id, source, rows.get(key_id, 0), droppable))
    return found + [KeyUse(key_id, None, rows[key_id], False) for key_id in sorted(rows) if key_id not in key_ids]


async def renew_keys(engine: Engine, settings: StoreSettings, environ: Mapping[str, str] = os.environ) -> bool:
    """Load the keys again, and use them from now on. Return False if they are the same as before.

    Raises StoreError, and changes nothing, if they can't be loaded, if they do not open the store, or if a row still
    needs a key that is not among them any more.
    """
    cipher = Cipher(await asyncio.to_thread(load_keys, settings, environ))
    before = engine.cipher.key_ids
    if cipher.key_ids == before:
        return False
    removed = set(before) - set(cipher.key_ids)
    if removed:
        _check_removal(cipher, removed, await rows_by_key(engine))
    if missing := set(cipher.key_ids) - await checked_keys(engine):
        async with engine.transaction() as transaction:
            for row in check_rows(cipher):
                if str(row["name"]).removeprefix(KEY_ROWS) in missing:
                    await transaction.execute(ADD, row)
    engine.cipher = cipher
    return True


def _check_removal(cipher: Cipher, removed: set[str], rows: Mapping[str, int]) -> None:
    if rows and not set(rows) & set(cipher.key_ids):
        raise KeyRejected(
            f"Wrong key: the rows of the store are sealed with key {', '.join(sorted(rows))}, but store.keys has "
            f"{', '.join(cipher.key_ids)}."
        )
    if needed := sorted(removed & set(rows)):
        raise KeyRejected(
            f"Key {', '.join(needed)} is not in store.keys any more, but {sum(rows[key_id] for key_id in needed)} rows "
            "are sealed with it. Put it back, behind the first key, and run `mcp-auth-proxy keys rotate` first."
        )


async def checked_keys(engine: Engine) -> set[str]:
    """Return the ids of the keys that a process has opened the store with. Raises StoreUnavailable."""
    rows = await engine.fetch_all(_CHECKS, {"length": len(KEY_ROWS), "prefix": KEY_ROWS})
    return {str(row["name"]).removeprefix(KEY_ROWS) for row in rows}


async def forget_checks(engine: Engine, *, keep: Collection[str]) -> None:
    """Delete the checks of all keys but those in ``keep``. Raises StoreUnavailable."""
    for key_id in await checked_keys(engine) - set(keep):
        async with engine.transaction() as transaction:
            await transaction.execute("DELETE FROM meta WHERE name = :name", {"name": KEY_ROWS + key_id})
