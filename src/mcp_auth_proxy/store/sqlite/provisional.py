"""A store that a command makes for something that may fail, and that is gone again if it has failed."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.errors import StoreError
from mcp_auth_proxy.store import lease
from mcp_auth_proxy.store.sqlite import untouched
from mcp_auth_proxy.store.sqlite.paths import wal_files
from mcp_auth_proxy.store.sqlite.serving import served_addresses

# Client credentials stay bound to the first authorization server that got them, whatever it answered.
_WORTH_KEEPING = "SELECT EXISTS (SELECT 1 FROM grants) OR EXISTS (SELECT 1 FROM client_bindings)"


@contextmanager
def provisional(settings: StoreSettings) -> Iterator[None]:
    """Remove the store and its key file if the block makes them and then raises. It has to close the store.

    A store that was there before is left alone, and so is a new one that holds a grant or that another process serves.
    """
    if settings.path.exists():
        yield
        return
    key = Path(settings.keys[0].name)
    new_key = settings.default_key and not key.exists()
    try:
        yield
    except BaseException:  # also if cancelled, by Ctrl-C
        if settings.path.exists() and not _is_needed(settings.path):
            for file in (settings.path, *wal_files(settings.path)):
                file.unlink(missing_ok=True)
            lease.remove_files(settings.path.resolve())
            if new_key:
                key.unlink(missing_ok=True)
        raise


def _is_needed(path: Path) -> bool:
    if served_addresses(path.resolve()):
        return True
    try:
        (needed,) = untouched.read(path, lambda it: it.execute(_WORTH_KEEPING).fetchone(), timeout=5.0)
    except (sqlite3.Error, OSError, StoreError):
        return True
    return bool(needed)
