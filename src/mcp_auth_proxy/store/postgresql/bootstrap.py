"""Prepare the store before it is used: inspect the database, create or migrate the tables, check the keys."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from mcp_auth_proxy.config.settings import PostgresqlUrl
from mcp_auth_proxy.errors import KeyRejected, StoreRejected, StoreUnavailable
from mcp_auth_proxy.store import key_checks
from mcp_auth_proxy.store.cipher import VERSION, Cipher
from mcp_auth_proxy.store.lease import LONGEST, Owners
from mcp_auth_proxy.store.postgresql import schema
from mcp_auth_proxy.store.postgresql.connection import Connection
from mcp_auth_proxy.store.sealed_tables import SEALED_COLUMNS, is_sealed_with, key_params, seal_keys

# What is read after the lock was got must be what the one before has committed, whatever the server's default is.
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
LOCK = "SELECT pg_advisory_xact_lock(1296126001, {schema}::integer)"
"""Lets one transaction write to a store at a time, as SQLite does; the first number spells MAP1."""

_OLDEST_SERVER = 120000
_MIGRATION_TIMEOUT = 300
"""Seconds that a process waits for another one, which migrates."""

_FIND = """
    SELECT current_schema() AS name, current_schema()::regnamespace::oid::bigint AS id,
        current_setting('server_encoding') AS encoding, current_setting('server_version_num')::bigint AS server,
        has_schema_privilege(current_schema(), 'CREATE') AS may_create,
        EXISTS (
            SELECT 1 FROM pg_class WHERE relname = :mark AND relnamespace = current_schema()::regnamespace
        ) AS is_ours
"""
# Views and tables of extensions, such as pg_stat_statements, are nobody's data.
_OTHERS = """
    SELECT c.relname::text AS name FROM pg_class AS c
    WHERE c.relnamespace = :schema::bigint::oid AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT EXISTS (
        SELECT 1 FROM pg_depend AS d
        WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
    )
    ORDER BY 1 LIMIT 1
"""
_BEGUN = "SELECT refresh_owner, refresh_begun_at FROM grants WHERE refresh_begun_at IS NOT NULL AND ended_at IS NULL"
_CHECKS = "SELECT name, value FROM meta WHERE substr(name, 1, :length) = :prefix"
PAUSE = 0.05
"""Seconds between two looks whether a refresh is running. Meanwhile its process can store what it brings."""

Clock = Callable[[], float]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in its database a store is."""

    name: str
    id: int
    """The number of the PostgreSQL schema that has the tables."""

    @property
    def lock(self) -> str:
        """The statement by which a transaction waits until it alone may write."""
        # An oid has 32 bits without a sign, the number of a lock has one.
        return LOCK.format(schema=self.id - 2**32 if self.id >= 2**31 else self.id)

    @property
    def channel(self) -> str:
        """The channel of notifications that something was written."""
        return f"mcp_auth_proxy_{self.id}"


async def prepare(connection: Connection, url: PostgresqlUrl, cipher: Cipher, owners: Owners, now: Clock) -> Place:
    """Create the tables, or check that they are ours and open with our keys; migrate them if their schema is older.

    Refreshes that run are awaited before a migration, but no longer than a lease lasts: a process of the previous
    version could not store what they bring. Nothing is written to a database that is rejected. Raises StoreRejected,
    StoreUnavailable.
    """
    place, is_ours = await _find(connection, url)
    if is_ours:
        found = await _inspect(connection, url, cipher)
        if found == schema.NEWEST and not await _missing_checks(connection, cipher):
            return place
    waits_until, has_told = time.monotonic() + LONGEST, False
    while not await _written(connection, url, cipher, place, lambda: time.monotonic() < waits_until, owners, now):
        if not has_told:
            logger.info("store: another process is renewing a grant; the migration waits for it")
        has_told = True
        await asyncio.sleep(PAUSE)
    return place


async def _written(
    connection: Connection,
    url: PostgresqlUrl,
    cipher: Cipher,
    place: Place,
    may_wait: Callable[[], bool],
    owners: Owners,
    now: Clock,
) -> bool:
    """Create or migrate the tables in one transaction. Return False if a refresh must be awaited first."""
    await connection.command(
        f"{BEGIN}; SET LOCAL lock_timeout = '{_MIGRATION_TIMEOUT}s'; SET LOCAL statement_timeout = 0"
    )
    try:
        await connection.command(place.lock, timeout=_MIGRATION_TIMEOUT)
        # Again: another process may have created or migrated them while we waited.
        place, is_ours = await _find(connection, url)
        found = await _inspect(connection, url, cipher) if is_ours else None
        if found is None:
            if await _others(connection, place):
                raise _foreign(url, place)
        elif found < schema.NEWEST and may_wait() and await _is_refreshing(connection, owners, now):
            await connection.command("ROLLBACK")
            return False
        await _write(connection, cipher, found)
        await connection.command("COMMIT", timeout=_MIGRATION_TIMEOUT)
    except BaseException:  # also on Ctrl-C: a migration happens as a whole or not at all
        if connection.in_transaction:
            await connection.command("ROLLBACK")
        raise
    return True


async def _is_refreshing(connection: Connection, owners: Owners, now: Clock) -> bool:
    rows = (await connection.run(_BEGUN)).rows
    return any(owners.is_held(row["refresh_owner"], row["refresh_begun_at"], now()) for row in rows)


async def inspect(connection: Connection, url: PostgresqlUrl, cipher: Cipher) -> Place:
    """Check that a store is ours, of this version's schema, and has one of our keys. Nothing is written.

    Raises StoreRejected, and StoreUnavailable if it must be created or migrated first.
    """
    place, is_ours = await _find(connection, url)
    if not is_ours:
        others = await _others(connection, place)
        # Another process may have created it just now.
        place, is_ours = await _find(connection, url)
        if others and not is_ours:
            raise _foreign(url, place)
    if not is_ours:
        raise StoreUnavailable(f"There is no store in {url} yet. Start the proxy once to create it.")
    found = await _inspect(connection, url, cipher)
    if found < schema.NEWEST:
        raise StoreUnavailable(
            f"The store {url} has schema {found}, and this version reads schema {schema.NEWEST}. "
            "Start the proxy once to migrate it."
        )
    return place


async def _find(connection: Connection, url: PostgresqlUrl) -> tuple[Place, bool]:
    row = (await connection.run(_FIND, {"mark": schema.MARK})).rows[0]
    if row["name"] is None:
        raise StoreRejected(
            f"The store {url} can't be used: no schema of search_path exists there. Create it (CREATE SCHEMA …), or "
            "set another search_path for the role."
        )
    if row["server"] < _OLDEST_SERVER:
        raise StoreRejected(f"The store {url} can't be used: PostgreSQL 12 or newer is needed.")
    if row["encoding"] != "UTF8":
        raise StoreRejected(
            f"The database of the store {url} has the encoding {row['encoding']}. Create one with ENCODING 'UTF8'."
        )
    if not row["is_ours"] and not row["may_create"]:
        raise StoreRejected(
            f"The store {url} can't be created: the role may not create tables in the schema {row['name']}. Let its "
            f"owner run GRANT CREATE, USAGE ON SCHEMA {row['name']} TO the role, or make the role the owner."
        )
    return Place(row["name"], row["id"]), row["is_ours"]


async def _others(connection: Connection, place: Place) -> bool:
    return bool((await connection.run(_OTHERS, {"schema": place.id})).rows)


def _foreign(url: PostgresqlUrl, place: Place) -> StoreRejected:
    return StoreRejected(
        f"The database {url} has tables of another program in the schema {place.name}. It was left as it is. Use "
        "an empty database, or a schema of its own (set search_path for the role)."
    )


async def _inspect(connection: Connection, url: PostgresqlUrl, cipher: Cipher) -> int:
    rows = (await connection.run(schema.VERSION)).rows
    found = rows[0]["version"] if len(rows) == 1 else 0
    if found < schema.FIRST_SCHEMA:
        raise StoreRejected(
            f"The store {url} was changed by something else: its schema is not known. Restore a backup."
        )
    if found > schema.NEWEST:
        raise StoreRejected(
            f"The store {url} was written by a newer version of mcp-auth-proxy: it has schema {found}, and this "
            f"version knows schemas up to {schema.NEWEST}. Run that version, or restore the backup (pg_dump) from "
            "before the migration."
        )
    checks = await _checks(connection)
    if not set(cipher.key_ids) & set(checks):
        raise KeyRejected(
            f"Wrong key: the store {url} was sealed with key {', '.join(sorted(checks)) or '(none)'}, but store.keys "
            f"has {', '.join(cipher.key_ids)}. Nothing was written. Set the right key, or use another database."
        )
    if not key_checks.open_with(cipher, checks, version=VERSION):
        raise StoreRejected(
            f"The store {url} was changed by something else than mcp-auth-proxy: its key check does not open. It was "
            "left as it is. Restore a backup, or use another database."
        )
    await _require_rows_that_open(connection, url, cipher)
    return int(found)


async def _require_rows_that_open(connection: Connection, url: PostgresqlUrl, cipher: Cipher) -> None:
    """Raise KeyRejected if there are rows, and all of them are sealed with other keys than the cipher has."""
    params = key_params(cipher.key_ids)
    found: set[str] = set()
    for table in SEALED_COLUMNS:
        if (await connection.run(is_sealed_with(table, params), params)).rows:
            return
        rows = (await connection.run(seal_keys(table))).rows
        found |= {row["key_id"].hex() for row in rows if isinstance(row["key_id"], bytes)}
        # Another process may have written its first row between the two looks.
        if found & set(cipher.key_ids):
            return
    if found:
        raise KeyRejected(
            f"Wrong key: every row of the store {url} was sealed with key {', '.join(sorted(found))}, but store.keys "
            f"has {', '.join(cipher.key_ids)}. Nothing was written. Set the right key, or use another database."
        )


async def _checks(connection: Connection) -> dict[str, bytes]:
    values = {"length": len(key_checks.KEY_ROWS), "prefix": key_checks.KEY_ROWS}
    rows = (await connection.run(_CHECKS, values)).rows
    return key_checks.by_key((row["name"], row["value"]) for row in rows)


async def _missing_checks(connection: Connection, cipher: Cipher) -> set[str]:
    return set(cipher.key_ids) - set(await _checks(connection))


async def _write(connection: Connection, cipher: Cipher, found: int | None) -> None:
    if found != schema.NEWEST:
        if found is not None:
            logger.info("store: migrating from schema %d to %d", found, schema.NEWEST)
        for statement in schema.statements(found):
            await connection.command(statement, timeout=_MIGRATION_TIMEOUT)
    for row in key_checks.check_rows(cipher):
        await connection.run(key_checks.ADD, row)
