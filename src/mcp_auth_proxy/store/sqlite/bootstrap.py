"""Prepare the store before it is used: load keys, inspect, create or migrate the file. Synchronous."""

import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.errors import KeyRejected, StoreRejected, StoreUnavailable
from mcp_auth_proxy.store import files
from mcp_auth_proxy.store.cipher import (
    BEFORE_SEALED_ROWS,
    VERSION,
    Cipher,
    Key,
    generate_key_file,
    key_warnings,
    load_keys,
)
from mcp_auth_proxy.store.key_checks import open_with
from mcp_auth_proxy.store.sqlite import key_checks, schema, untouched
from mcp_auth_proxy.store.sqlite.backup import find_backup
from mcp_auth_proxy.store.sqlite.errors import is_damage, read_text, translated, unavailable
from mcp_auth_proxy.store.sqlite.paths import connection_uri, mount_obstacle, wal_files, write_obstacle
from mcp_auth_proxy.store.sqlite.upgrade import upgrade

BUSY_TIMEOUT = 5.0
"""Seconds that SQLite waits for a lock of another process."""

_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100
_OLDEST_SQLITE = (3, 35, 0)  # RETURNING
logger = logging.getLogger(__name__)


def obtain_keys(
    settings: StoreSettings, environ: Mapping[str, str] = os.environ
) -> tuple[tuple[Key, ...], Path | None]:
    """Return the store keys, and the path of the key file if one was created.

    A key file is created only if it is the default one and there is no store yet that it would have to open.
    Raises StoreRejected, StoreUnavailable.
    """
    created: Path | None = None
    default = Path(settings.keys[0].name)
    if settings.default_key and not default.exists():
        if settings.path.exists():
            raise _missing_key(settings)
        with _writing(default):
            files.make_folder(default.parent)
            created = default if generate_key_file(default) else None
    for warning in key_warnings(settings):
        logger.warning("%s", warning)
    return load_keys(settings, environ), created


def existing_keys(settings: StoreSettings, environ: Mapping[str, str] = os.environ) -> tuple[Key, ...]:
    """Return the keys of a store that exists; none is made. Raises KeyRejected."""
    if settings.default_key and settings.path.exists() and not Path(settings.keys[0].name).exists():
        raise _missing_key(settings)
    return load_keys(settings, environ)


def _missing_key(settings: StoreSettings) -> KeyRejected:
    return KeyRejected(
        f"The store {settings.path} exists, but its key file {settings.keys[0].name} is missing. Without the key "
        "nothing in the store can be read: put the key file back, or move the store away to start with a new one."
    )


def prepare(path: Path, cipher: Cipher) -> None:
    """Create the store, or check that it is ours and opens with our keys; migrate it if its schema is older.

    Nothing is written to a store that is rejected, not even a log file. Raises StoreRejected, StoreUnavailable.
    """
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise StoreRejected(f"SQLite 3.35 or newer is needed; this Python has {sqlite3.sqlite_version}.")
    if path.exists():
        inspect(path, cipher)
        if (obstacle := mount_obstacle(path)) is not None:
            raise StoreUnavailable(obstacle)
    else:
        _create(path, cipher)
    _update(path, cipher)


def inspect(path: Path, cipher: Cipher) -> int:
    """Check that a store is ours, undamaged, not newer than this program, and has one of our keys.

    Return its schema. Nothing is written. Raises StoreRejected, StoreUnavailable.
    """
    _check_head(path)
    with _reading(path):
        return untouched.read(path, lambda connection: _check(path, connection, cipher), timeout=BUSY_TIMEOUT)


def read_copy(path: Path, cipher: Cipher) -> sqlite3.Connection:
    """Return a copy of the store in memory, as it is committed now, which any thread may use and none may write.

    A copy of an older schema is migrated. The store is checked as by ``inspect``, and stays as it is: nothing is
    written, and no file made, beside it. Raises StoreRejected, StoreUnavailable.
    """

    def copy(connection: sqlite3.Connection) -> sqlite3.Connection:
        _check(path, connection, cipher)
        connection.backup(memory)
        return memory

    _check_head(path)
    # isolation_level=None: transactions are begun and ended by our own statements.
    memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    try:
        memory.text_factory = read_text
        with _reading(path):
            untouched.read(path, copy, timeout=BUSY_TIMEOUT)
        with translated(path):
            schema.migrate(memory, cipher)
            memory.execute("PRAGMA query_only = ON")
    except BaseException:  # also on Ctrl-C
        memory.close()
        raise
    return memory


def connect(path: Path) -> sqlite3.Connection:
    """Open a store that exists for reading and writing. Raises sqlite3.Error."""
    uri = connection_uri(path, "rw")
    # isolation_level=None: transactions are begun and ended by our own statements.
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT, isolation_level=None)
    try:
        connection.text_factory = read_text
        with untouched.INDEX_LOCK:
            # The first read opens the index of the log.
            connection.execute("PRAGMA user_version").fetchone()
    except BaseException:  # also on Ctrl-C
        connection.close()
        raise
    return connection


def _check_head(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(head) < _HEADER_BYTES or not head.startswith(_MAGIC):
        raise StoreRejected(
            f"{path} is not a store: it is not an SQLite database, or it was cut off. It was left as it is. "
            "Put a backup there, or move it away to start with a new store."
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise _explain(path, error) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> StoreUnavailable:
    return StoreUnavailable(
        f"The store {path} can't be read ({error.strerror}). Check the permissions of the file and its folder."
    )


def _explain(path: Path, error: sqlite3.DatabaseError) -> StoreRejected | StoreUnavailable:
    temporary = None if is_damage(error) else unavailable(path, error)
    return temporary or StoreRejected(
        f"The store {path} is damaged or cut off. It was left as it is. Put a backup in its place."
    )


def _check(path: Path, connection: sqlite3.Connection, cipher: Cipher) -> int:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    version: int
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != schema.APPLICATION_ID:
        raise StoreRejected(
            f"{path} is a database of another program. It was left as it is. Set store.url to another file."
        )
    if version > len(schema.MIGRATIONS):
        raise _newer(path, version)
    _check_keys(path, cipher, key_checks.read_all(connection), version)
    if version >= schema.SEALED_ROWS:
        key_checks.check_rows_open(connection, path, cipher)
    return version


def _newer(path: Path, version: int) -> StoreRejected:
    known = len(schema.MIGRATIONS)
    backup = find_backup(path, known)
    remedy = "Run that version, or restore a backup from before the migration: no copy is beside the store."
    if backup is not None:
        remedy = (
            f"Run that version, or go back to the copy {backup} from before the migration: move the store and its "
            "-wal and -shm files away and copy it there. What was stored after the migration is not in it."
        )
    return StoreRejected(
        f"The store {path} was written by a newer version of mcp-auth-proxy: it has schema {version}, and this version "
        f"knows schemas up to {known}. {remedy}"
    )


def _check_keys(path: Path, cipher: Cipher, checks: Mapping[str, bytes], found_schema: int) -> None:
    if not set(cipher.key_ids) & set(checks):
        raise KeyRejected(
            f"Wrong key: the store {path} was sealed with key {', '.join(sorted(checks)) or '(none)'}, but store.keys "
            f"has {', '.join(cipher.key_ids)}. Nothing was written. Set the right key, or move the store away."
        )
    version = VERSION if found_schema >= schema.SEALED_ROWS else BEFORE_SEALED_ROWS
    if not open_with(cipher, checks, version=version):
        raise StoreRejected(
            f"The store {path} was changed by something else than mcp-auth-proxy: its key check is not one of schema "
            f"{found_schema}. It was left as it is. Put a backup in its place, or move it away to start with a new one."
        )


def _create(path: Path, cipher: Cipher) -> None:
    for leftover in wal_files(path):
        if leftover.exists():
            raise StoreRejected(
                f"The store {path} is missing, but {leftover} exists, and a new store would be mixed up with it. "
                "Put the store back, or move that file away to start with a new store."
            )
    with _writing(path), translated(path):
        files.make_folder(path.parent)
        draft = files.temporary_path(path)
        files.create(draft)
        try:
            # isolation_level=None: transactions are begun and ended by our own statements.
            with closing(sqlite3.connect(draft, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                schema.migrate(connection, cipher)
            files.link_into_place(draft, path)
        finally:
            for leftover in (draft, *wal_files(draft)):
                leftover.unlink(missing_ok=True)
    inspect(path, cipher)


def _update(path: Path, cipher: Cipher) -> None:
    def check(version: int) -> None:
        # Again: the schema may have been changed since the store was inspected.
        _check_keys(path, cipher, key_checks.read_all(connection), version)

    with _writing(path), translated(path):
        for file in (path, *wal_files(path)):
            files.restrict_mode(file)
        with closing(connect(path)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version < len(schema.MIGRATIONS):
                upgrade(path, connection, cipher, check=check)
            if set(cipher.key_ids) - set(key_checks.read_all(connection)):
                key_checks.add(connection, cipher)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        obstacle = write_obstacle(path)
        why = f" {obstacle}" if obstacle is not None else ""
        raise StoreUnavailable(f"{path} can't be created or written ({error.strerror}).{why}") from None
