"""The encrypted store: grants, registrations and flows, with their secrets sealed.

``open_store`` returns an ``Engine`` (engine.py), which runs SQL in transactions; ``sqlite/`` and ``postgresql/`` have
the two that exist, with schema and migrations. ``grants.py``, ``registrations.py`` and ``flows.py`` read and write the
frozen values of ``models`` through it, ``principals.py`` and ``api_keys.py`` those of callers. ``codec.py`` turns
values into rows, ``cipher.py`` seals the secrets in them, ``serving.py`` tells other processes that this one serves, by
files beside the store (``local_files.py``), ``lease.py`` decides whether another one still holds a refresh,
``leases.py`` has leases by name, ``files.py`` creates private files.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.sqlite.engine import SqliteEngine
from mcp_auth_proxy.store.sqlite.provisional import provisional

__all__ = ["Engine", "open_store", "open_store_read_only", "provisional_store", "store_exists"]


def _ignore(line: str) -> None:
    pass


async def open_store(
    settings: StoreSettings,
    *,
    announce: Callable[[str], None] = _ignore,
    patience: float = 0.0,
    environ: Mapping[str, str] = os.environ,
) -> Engine:
    """Open the store for reading and writing; create it if it does not exist, migrate it if its schema is older.

    ``announce`` is called with one line if a new key file was made; ``patience``: seconds for which a database server
    that can't be reached is tried again. ``close`` of the result must be awaited. Raises StoreRejected (nothing was
    written) and StoreUnavailable.
    """
    if settings.postgresql is not None:
        # Imported only for such a store: the driver costs 20 ms and some megabytes.
        from mcp_auth_proxy.store.postgresql.engine import PostgresqlEngine  # noqa: PLC0415

        return await PostgresqlEngine.open(settings, patience=patience, environ=environ)
    return await SqliteEngine.open(settings, announce=announce, environ=environ)


async def open_store_read_only(settings: StoreSettings, *, environ: Mapping[str, str] = os.environ) -> Engine:
    """Open a store that exists, as it is now, without writing anything: it is neither created nor migrated.

    A store with an older schema is read all the same. Later changes are not seen, so this is for commands, not for a
    running proxy. ``close`` of the result must be awaited. Raises StoreRejected and StoreUnavailable.
    """
    if settings.postgresql is not None:
        from mcp_auth_proxy.store.postgresql.engine import PostgresqlEngine  # noqa: PLC0415

        return await PostgresqlEngine.open(settings, read_only=True, environ=environ)
    return await SqliteEngine.open_read_only(settings, environ=environ)


def store_exists(settings: StoreSettings) -> bool:
    """Return whether there is a store to open. A PostgreSQL database counts as one, also if it is still empty."""
    return settings.postgresql is not None or settings.path.exists()


def provisional_store(settings: StoreSettings) -> AbstractContextManager[None]:
    """Remove a store and a key file that the block makes if it raises; see ``sqlite/provisional.py``.

    In a PostgreSQL database everything stays.
    """
    return provisional(settings) if settings.postgresql is None else nullcontext()
