"""Which columns of which tables are sealed, and with which keys: SQL for every engine.

A sealed value names its key in bytes 2 to 5 (``cipher``), so this needs no key.
"""

from collections.abc import Iterable, Mapping

from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.sealed_rows import SEAL

SEALED_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "shared_secrets": (SEAL, "value"),
    "grants": (SEAL, "client_secret", "access_token", "refresh_token", "dpop_key"),
    "registrations": (SEAL, "client_secret"),
    "client_bindings": (SEAL,),
    "flows": (SEAL, "client_secret", "device", "dpop_key"),
    "attempts": (SEAL, "code_verifier"),
    "confirmations": (SEAL,),
    "principals": (SEAL,),
    "identities": (SEAL,),
    "api_keys": (SEAL,),
    "sessions": (SEAL,),
    "servers": (SEAL, "settings"),
    "oauth_clients": (SEAL, "client_secret"),
    "events": (SEAL,),
    "catalogs": (SEAL, "content"),
    "mcp_sessions": (SEAL, "state"),
    "connection_notes": (SEAL,),
}
"""The columns that hold sealed values, by table. The first tables have few rows, or rows that are read first."""


_KEY_ID_BYTES = 4


def key_column(column: str) -> str:
    """Return the SQL of the key id, in bytes, of a sealed column."""
    return f"substr({column}, 2, 4)"


def is_sealed_with(table: str, names: Iterable[str]) -> str:
    """Return SQL that finds one row of a table whose seal is of one of the keys that the parameters ``names`` are."""
    keys = ", ".join(f":{name}" for name in names)
    return f"SELECT 1 AS found FROM {table} WHERE {key_column(SEAL)} IN ({keys}) LIMIT 1"  # noqa: S608


def seal_keys(table: str) -> str:
    """Return SQL that lists the ids of the keys that the rows of a table are sealed with."""
    return f"SELECT DISTINCT {key_column(SEAL)} AS key_id FROM {table} WHERE {SEAL} IS NOT NULL"  # noqa: S608


def key_params(key_ids: Iterable[str]) -> dict[str, bytes]:
    """Return parameters for the ids of keys, by name."""
    return {f"key_{number}": bytes.fromhex(key_id) for number, key_id in enumerate(dict.fromkeys(key_ids))}


async def rows_by_key(engine: Engine) -> dict[str, int]:
    """Return how many rows have anything that is sealed with a key, by the id of the key. Raises StoreUnavailable."""
    found: dict[str, int] = {}
    for table, columns in SEALED_COLUMNS.items():
        parts = (f"SELECT uid, {key_column(name)} AS key_id FROM {table} WHERE {name} IS NOT NULL" for name in columns)  # noqa: S608
        # UNION without ALL: a row counts once for each key.
        sql = f"SELECT key_id, count(*) AS count FROM ({' UNION '.join(parts)}) AS sealed GROUP BY key_id"  # noqa: S608
        for row in await engine.fetch_all(sql):
            # Something else may have written the row.
            if isinstance(row["key_id"], bytes) and len(row["key_id"]) == _KEY_ID_BYTES:
                key_id = row["key_id"].hex()
                found[key_id] = found.get(key_id, 0) + int(row["count"])
    return found
