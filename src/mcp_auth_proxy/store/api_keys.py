"""The API keys: their hashes, whose they are, and what they may be used for."""

import json
from collections.abc import Iterable

from mcp_auth_proxy.models import ApiKey, Scope
from mcp_auth_proxy.store.engine import Engine, Row, Transaction
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, SealedTable, decode_rows, new_uid

_TABLE = "api_keys"
_ALL = "SELECT * FROM api_keys ORDER BY created_at, id"
_BY_ID = "SELECT * FROM api_keys WHERE id = :id"
_BY_PRINCIPAL = "SELECT * FROM api_keys WHERE principal = :principal ORDER BY created_at, id"
_ADD = """
    INSERT INTO api_keys (uid, id, principal, name, key_hash, scopes, created_at, expires_at, last_used_at, seal)
    VALUES (:uid, :id, :principal, :name, :key_hash, :scopes, :created_at, :expires_at, NULL, :seal)
"""
_DELETE = "DELETE FROM api_keys WHERE id = :id RETURNING id"
_USED = """
    UPDATE api_keys SET last_used_at = :at WHERE id = :id AND (last_used_at IS NULL OR last_used_at < :at)
"""


class ApiKeys:
    """The API keys in the store. Every method raises StoreUnavailable if the store can't be used now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def add(self, key: ApiKey) -> None:
        """Store a new key."""
        async with self._engine.transaction() as transaction:
            await self._add(transaction, key)

    async def add_within(self, transaction: Transaction, key: ApiKey) -> None:
        """Store a key within a transaction, unless there is one with its id."""
        if not await transaction.execute(_BY_ID, {"id": key.id}):
            await self._add(transaction, key)

    async def _add(self, transaction: Transaction, key: ApiKey) -> None:
        uid, columns = new_uid(), _columns(key)
        seal = RowCipher(self._engine.cipher, _TABLE, uid).seal_row(columns)
        await transaction.execute(_ADD, {"uid": uid, **columns, SEAL: seal})

    async def get(self, key_id: str) -> ApiKey | None:
        """Return the key with an id, or None."""
        asked = {"id": key_id}
        found = await self._decode(await self._engine.fetch_all(_BY_ID, asked), asked)
        return found[0] if found else None

    async def all(self) -> list[ApiKey]:
        """Return all keys, the oldest first."""
        return await self._decode(await self._engine.fetch_all(_ALL), {})

    async def of_principal(self, principal_id: str) -> list[ApiKey]:
        """Return the keys of a principal, the oldest first."""
        asked = {"principal": principal_id}
        return await self._decode(await self._engine.fetch_all(_BY_PRINCIPAL, asked), asked)

    def table(self) -> SealedTable[ApiKey]:
        """Return a reader of all keys. ``last_used_at`` of what it returns may be old."""
        return SealedTable(self._engine, _TABLE, _read)

    async def delete(self, key_id: str) -> bool:
        """Delete a key. Return False if there is none with this id."""
        async with self._engine.transaction() as transaction:
            return bool(await transaction.execute(_DELETE, {"id": key_id}))

    async def used(self, key_ids: Iterable[str], *, at: float) -> None:
        """Remember that keys were used ``at`` a time, unless a later one is stored."""
        async with self._engine.transaction() as transaction:
            for key_id in key_ids:
                await transaction.execute(_USED, {"id": key_id, "at": at})

    async def _decode(self, rows: list[Row], asked: dict[str, str]) -> list[ApiKey]:
        return await decode_rows(self._engine, _TABLE, rows, asked, _read)


def _columns(key: ApiKey) -> Columns:
    return {
        "id": key.id,
        "principal": key.principal,
        "name": key.name,
        "key_hash": key.key_hash,
        "scopes": json.dumps(sorted(key.scopes)),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
    }


def _read(row: Row, _: RowCipher) -> ApiKey:
    return ApiKey(
        id=row["id"],
        principal=row["principal"],
        name=row["name"],
        key_hash=row["key_hash"],
        scopes=frozenset(Scope(scope) for scope in json.loads(row["scopes"])),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        last_used_at=row["last_used_at"],
    )
