"""Migrate a store that exists: after a copy was made beside it, and in a moment in which no refresh is running.

A process of the previous version may be using the store. What its refresh brings could not be stored after the
migration, and with it a grant would be lost whose server issues each refresh token once.
"""

import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from mcp_auth_proxy.store.cipher import Cipher
from mcp_auth_proxy.store.lease import ABANDONED, LONGEST, Owners
from mcp_auth_proxy.store.sqlite import schema
from mcp_auth_proxy.store.sqlite.backup import make_backup

PAUSE = 0.02
"""Seconds between two looks whether a refresh is running. Meanwhile its process can store what it brings."""

# These columns are in every schema.
_BEGUN = "SELECT refresh_owner, refresh_begun_at FROM grants WHERE refresh_begun_at IS NOT NULL AND ended_at IS NULL"
logger = logging.getLogger(__name__)


class _RefreshRunning(Exception):
    """Signal within this module: another process is refreshing a grant."""


def upgrade(path: Path, connection: sqlite3.Connection, cipher: Cipher, *, check: Callable[[int], None]) -> None:
    """Migrate the store of a connection, unless another process has done it meanwhile.

    ``check`` is called with its schema, when nobody else can write any more. Refreshes that run are awaited, but no
    longer than a lease lasts. Raises sqlite3.Error, StoreUnavailable and what ``check`` raises.
    """
    newest, waits_until = len(schema.MIGRATIONS), time.monotonic() + LONGEST

    def prepare(version: int) -> None:
        check(version)
        if time.monotonic() < waits_until and _is_refreshing(path, connection):
            raise _RefreshRunning
        backup = make_backup(path, version)
        logger.info("store: migrating from schema %d to %d; a copy was kept: %s", version, newest, backup)

    waits = False
    while True:
        try:
            return schema.migrate(connection, cipher, before=prepare)
        except _RefreshRunning:
            if not waits:
                logger.info("store: another process is renewing a grant; the migration waits for it")
            waits = True
            time.sleep(PAUSE)


def _is_refreshing(path: Path, connection: sqlite3.Connection) -> bool:
    now, owners = time.time(), Owners(path.resolve())
    # Somebody else's program may have put anything into these columns.
    return any(
        isinstance(begun_at, float) and not str(owner).endswith(ABANDONED) and owners.is_held(str(owner), begun_at, now)
        for owner, begun_at in connection.execute(_BEGUN).fetchall()
    )
