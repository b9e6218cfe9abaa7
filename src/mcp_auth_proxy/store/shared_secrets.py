"""Random values that all processes on one store share, such as the key that session ids are signed with."""

import secrets

from mcp_auth_proxy.store.engine import Engine, Row
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, decode_rows, new_uid

SESSION_IDS = "session-ids"
"""The key of ``proxy.session_ids``."""

SIZE = 32
"""Bytes of a value."""

_TABLE = "shared_secrets"
_FIND = "SELECT * FROM shared_secrets WHERE name = :name"
_ADD = """
    INSERT INTO shared_secrets (uid, name, value, seal) VALUES (:uid, :name, :value, :seal)
    ON CONFLICT (name) DO NOTHING
"""
_REPLACE = "UPDATE shared_secrets SET uid = :uid, value = :value, seal = :seal WHERE name = :name"


class SharedSecrets:
    """The shared secrets in the store. Every method raises StoreUnavailable if the store can't be used now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def get(self, name: str) -> bytes:
        """Return the secret of this name, the same for every process; it is made if there is none."""
        asked: Columns = {"name": name}
        found = await self._read(await self._engine.fetch_all(_FIND, asked), asked)
        if found is not None:
            return found
        value, row = self._new(name)
        async with self._engine.transaction() as transaction:
            await transaction.execute(_ADD, row)
            # Another process may have made it since.
            found = await self._read(await transaction.execute(_FIND, asked), asked)
            if found is not None:
                return found
            # What somebody has changed counts as missing.
            await transaction.execute(_REPLACE, row)
            return value

    async def _read(self, rows: list[Row], asked: Columns) -> bytes | None:
        def read(row: Row, cipher: RowCipher) -> bytes:
            return bytes.fromhex(cipher.open("value", row["value"]))

        return next(iter(await decode_rows(self._engine, _TABLE, rows, asked, read)), None)

    def _new(self, name: str) -> tuple[bytes, Columns]:
        """Return a new value, and the row for it."""
        value, uid = secrets.token_bytes(SIZE), new_uid()
        cipher = RowCipher(self._engine.cipher, _TABLE, uid)
        columns: Columns = {"name": name, "value": cipher.seal("value", value.hex())}
        return value, {"uid": uid, **columns, SEAL: cipher.seal_row(columns)}
