"""What happens to the store before it is used: keys, a look without writing, creation, migration; no event loop."""

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.errors import DecryptionError, StoreRejected, StoreUnavailable
from mcp_auth_proxy.store import files, schema
from mcp_auth_proxy.store.cipher import Cipher, Key, generate_key_file, load_key
from mcp_auth_proxy.store.sqlite_errors import is_damage, translated, unavailable

BUSY_SECONDS = 5.0
"""How long SQLite waits for a lock of another process."""

_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100
_OLDEST_SQLITE = (3, 35, 0)  # RETURNING
_CHECK = "mcp-auth-proxy store"
_KEY_ROWS = "key:"


def obtain_keys(
    settings: StoreSettings, environ: Mapping[str, str] = os.environ
) -> tuple[tuple[Key, ...], Path | None]:
    """The store keys, and the key file if one was made for them.

    A key file is made only where it is the default one and no store exists that it would have to open.
    Raises StoreRefused, StoreUnavailable.
    """
    made: Path | None = None
    default = Path(settings.keys[0].name)
    if settings.default_key and not default.exists():
        if settings.path.exists():
            raise StoreRejected(
                f"The store {settings.path} exists, but its key file {default} is missing. Put the key file back, "
                "or move the store away to begin anew: without the key nothing in it can be read."
            )
        with _writing(default):
            files.make_folder(default.parent)
            made = default if generate_key_file(default) else None
    return tuple(load_key(source, environ) for source in settings.keys), made


def prepare(path: Path, cipher: Cipher) -> None:
    """Makes the store, or sees that it is ours, opens under our keys and has the present schema.

    A store that is refused is not written to, not even by a log file. Raises StoreRefused, StoreUnavailable.
    """
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise StoreRejected(f"SQLite 3.35 or newer is needed; this Python has {sqlite3.sqlite_version}.")
    if path.exists():
        inspect(path, cipher)
    else:
        _create(path, cipher)
    _update(path, cipher)


def wal_files(path: Path) -> tuple[Path, Path]:
    """The two files that SQLite keeps beside a store in use."""
    return path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


def inspect(path: Path, cipher: Cipher) -> None:
    """Raises StoreRefused unless this is a store of ours, whole, not newer than we are, under one of our keys."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
    except OSError as error:
        raise StoreUnavailable(f"The store {path} can't be read ({error.strerror}).") from None
    if len(head) < _HEADER_BYTES or not head.startswith(_MAGIC):
        raise StoreRejected(
            f"{path} is not a store: it is no SQLite database, or it was cut off. It was left as it is; "
            "put a backup there, or move it away to begin anew."
        )
    log = wal_files(path)[0]
    # Without a log file the database file alone is the whole truth, and "immutable" lets SQLite leave
    # no trace. With one the file alone may be half way through a checkpoint, so the log must be read too.
    quiet = not log.exists()
    try:
        _inspect(path, cipher, quiet=quiet)
    except sqlite3.DatabaseError as error:
        if not (quiet and log.exists()):
            raise _judged(path, error) from None
        try:
            _inspect(path, cipher, quiet=False)
        except sqlite3.DatabaseError as again:
            raise _judged(path, again) from None


def _judged(path: Path, error: sqlite3.DatabaseError) -> StoreRejected | StoreUnavailable:
    passing = None if is_damage(error) else unavailable(path, error)
    return passing or StoreRejected(
        f"The store {path} is damaged or cut off. It was left as it is; put a backup in its place."
    )


def _inspect(path: Path, cipher: Cipher, *, quiet: bool) -> None:
    uri = f"{path.as_uri()}?mode=ro{'&immutable=1' if quiet else ''}"
    with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as connection:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != schema.APPLICATION_ID:
            raise StoreRejected(
                f"{path} is a database of another program. It was left as it is; give store.url a file."
            )
        if version > len(schema.MIGRATIONS):
            raise StoreRejected(
                f"The store {path} was written by a newer version of mcp-auth-proxy (schema {version}, "
                f"this one knows {len(schema.MIGRATIONS)}). Run that version, or use another store."
            )
        _check_keys(path, cipher, _key_checks(connection))


def _key_checks(connection: sqlite3.Connection) -> dict[str, bytes]:
    rows = connection.execute("SELECT name, value FROM meta").fetchall()
    return {name.removeprefix(_KEY_ROWS): value for name, value in rows if name.startswith(_KEY_ROWS)}


def _check_keys(path: Path, cipher: Cipher, checks: Mapping[str, bytes]) -> None:
    known = [key_id for key_id in cipher.key_ids if key_id in checks]
    try:
        opened = [cipher.open(checks[key_id], table="meta", row=_KEY_ROWS + key_id, column="value") for key_id in known]
    except DecryptionError:
        opened = []
    if not opened or any(text != _CHECK for text in opened):
        raise StoreRejected(
            f"Wrong key: the store {path} was sealed under key {', '.join(sorted(checks)) or '(none)'}, and store.keys "
            f"gives {', '.join(cipher.key_ids)}. Nothing was written; give the right key, or move the store away."
        )


def _create(path: Path, cipher: Cipher) -> None:
    for companion in wal_files(path):
        if companion.exists():
            raise StoreRejected(
                f"The store {path} is missing, but {companion} is there: a new store would be mixed up with it. "
                "Put the store back, or move that file away to begin anew."
            )
    with _writing(path), translated(path):
        files.make_folder(path.parent)
        draft = files.temporary_path(path)
        files.create(draft)
        try:
            # isolation_level None: we begin and end transactions ourselves.
            with closing(sqlite3.connect(draft, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                schema.migrate(connection)
                _add_key_checks(connection, cipher)
            files.link_into_place(draft, path)
        finally:
            for leftover in (draft, *wal_files(draft)):
                leftover.unlink(missing_ok=True)
    inspect(path, cipher)


def _update(path: Path, cipher: Cipher) -> None:
    with _writing(path), translated(path):
        for file in (path, *wal_files(path)):
            files.restrict_mode(file)
        uri = f"{path.as_uri()}?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version < len(schema.MIGRATIONS):
                schema.migrate(connection)
            if set(cipher.key_ids) - set(_key_checks(connection)):
                _add_key_checks(connection, cipher)


def _add_key_checks(connection: sqlite3.Connection, cipher: Cipher) -> None:
    for key_id in cipher.key_ids:
        name = _KEY_ROWS + key_id
        value = cipher.seal(_CHECK, table="meta", row=name, column="value", key_id=key_id)
        connection.execute("INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO NOTHING", (name, value))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"{path} can't be made or written ({error.strerror}).") from None
