"""The tables, as an ordered list of migrations; ``PRAGMA user_version`` counts those that were applied.

Every row but those of ``meta`` has a ``uid``: a random id that is chosen before the row is written and is part of the
associated data of its seals. Times are Unix seconds; scopes are one text, separated by spaces.

A new schema is a new entry of ``MIGRATIONS``; entries that were released never change. Each leaves behind a store in
``tests/store/stores`` (see ``tests/store/samples.py``).
"""

import sqlite3
from collections.abc import Callable

from mcp_auth_proxy.store.cipher import Cipher
from mcp_auth_proxy.store.sqlite.callers import CALLERS
from mcp_auth_proxy.store.sqlite.clients import CLIENTS
from mcp_auth_proxy.store.sqlite.health import HEALTH
from mcp_auth_proxy.store.sqlite.indexes import INDEXES
from mcp_auth_proxy.store.sqlite.sealing import seal_rows

APPLICATION_ID = 0x4D41_5031  # "MAP1"

_FIRST = (
    """
    CREATE TABLE meta (
        name TEXT PRIMARY KEY,
        value BLOB NOT NULL
    )
    """,
    # AUTOINCREMENT: the id of a deleted grant must never be used again. Otherwise a refresh that began before a logout
    # could write into the grant of the next login.
    """
    CREATE TABLE grants (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        uid TEXT NOT NULL UNIQUE,
        principal TEXT NOT NULL,
        server TEXT NOT NULL,
        resource TEXT NOT NULL,
        issuer TEXT NOT NULL,
        grant_type TEXT NOT NULL,
        client_id TEXT NOT NULL,
        client_auth TEXT NOT NULL,
        client_kind TEXT NOT NULL,
        client_secret BLOB,
        client_redirect_uri TEXT NOT NULL,
        client_secret_expires_at DOUBLE PRECISION,
        client_created_at DOUBLE PRECISION NOT NULL,
        authorization_endpoint TEXT NOT NULL,
        token_endpoint TEXT NOT NULL,
        revocation_endpoint TEXT,
        access_token BLOB NOT NULL,
        refresh_token BLOB,
        token_type TEXT NOT NULL,
        token_scopes TEXT NOT NULL,
        obtained_at DOUBLE PRECISION NOT NULL,
        expires_at DOUBLE PRECISION,
        scopes TEXT NOT NULL,
        granted_at DOUBLE PRECISION NOT NULL,
        version INTEGER NOT NULL,
        refresh_begun_at DOUBLE PRECISION,
        refresh_owner TEXT NOT NULL DEFAULT '',
        ended_at DOUBLE PRECISION,
        ended_reason TEXT NOT NULL DEFAULT '',
        UNIQUE (principal, server, resource, issuer)
    )
    """,
    """
    CREATE TABLE registrations (
        uid TEXT NOT NULL UNIQUE,
        server TEXT NOT NULL,
        issuer TEXT NOT NULL,
        client_id TEXT NOT NULL,
        client_auth TEXT NOT NULL,
        client_kind TEXT NOT NULL,
        client_secret BLOB,
        client_redirect_uri TEXT NOT NULL,
        client_secret_expires_at DOUBLE PRECISION,
        client_created_at DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (server, issuer, client_redirect_uri)
    )
    """,
    """
    CREATE TABLE client_bindings (
        server TEXT NOT NULL,
        client_id TEXT NOT NULL,
        issuer TEXT NOT NULL,
        PRIMARY KEY (server, client_id)
    )
    """,
    """
    CREATE TABLE flows (
        id TEXT PRIMARY KEY,
        uid TEXT NOT NULL UNIQUE,
        principal TEXT NOT NULL,
        server TEXT NOT NULL,
        resource TEXT NOT NULL,
        issuer TEXT NOT NULL,
        client_id TEXT NOT NULL,
        client_auth TEXT NOT NULL,
        client_kind TEXT NOT NULL,
        client_secret BLOB,
        client_redirect_uri TEXT NOT NULL,
        client_secret_expires_at DOUBLE PRECISION,
        client_created_at DOUBLE PRECISION NOT NULL,
        authorization_endpoint TEXT NOT NULL,
        token_endpoint TEXT NOT NULL,
        revocation_endpoint TEXT,
        scopes TEXT NOT NULL,
        redirect_uri TEXT NOT NULL,
        iss_supported BOOLEAN NOT NULL,
        extra_params TEXT NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        expires_at DOUBLE PRECISION NOT NULL,
        status TEXT NOT NULL,
        reason TEXT NOT NULL
    )
    """,
    "CREATE INDEX flows_by_server ON flows (principal, server, status)",
    """
    CREATE TABLE attempts (
        state_hash TEXT PRIMARY KEY,
        uid TEXT NOT NULL UNIQUE,
        flow_id TEXT NOT NULL REFERENCES flows (id) ON DELETE CASCADE,
        browser_hash TEXT NOT NULL,
        code_verifier BLOB NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        expires_at DOUBLE PRECISION NOT NULL
    )
    """,
    "CREATE INDEX attempts_by_flow ON attempts (flow_id, created_at)",
)

# Flows of users on another device: the sealed device code, and which process polls with it.
_DEVICE_FLOWS = (
    "ALTER TABLE flows ADD COLUMN device BLOB",
    "ALTER TABLE flows ADD COLUMN poll_owner TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE flows ADD COLUMN next_poll_at DOUBLE PRECISION NOT NULL DEFAULT 0",
)

# Tokens that are bound to a key (RFC 9449): the private key, sealed. A flow has it before its user is asked.
_DPOP_KEYS = (
    "ALTER TABLE grants ADD COLUMN dpop_key BLOB",
    "ALTER TABLE flows ADD COLUMN dpop_key BLOB",
)

# The origin that tokens may be sent to; with `resource: omit` nothing else says so.
_UPSTREAM_ORIGINS = (
    "ALTER TABLE grants ADD COLUMN upstream TEXT",
    "ALTER TABLE flows ADD COLUMN upstream TEXT",
)

# One principal may use a server with several accounts. SQLite can't change a UNIQUE or PRIMARY KEY constraint, so
# grants and registrations are rebuilt: https://www.sqlite.org/lang_altertable.html#otheralter
_ACCOUNTS = (
    """
    CREATE TABLE new_grants (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        uid TEXT NOT NULL UNIQUE,
        principal TEXT NOT NULL,
        account TEXT NOT NULL DEFAULT 'default',
        server TEXT NOT NULL,
        resource TEXT NOT NULL,
        issuer TEXT NOT NULL,
        upstream TEXT,
        grant_type TEXT NOT NULL,
        client_id TEXT NOT NULL,
        client_auth TEXT NOT NULL,
        client_kind TEXT NOT NULL,
        client_secret BLOB,
        client_redirect_uri TEXT NOT NULL,
        client_secret_expires_at DOUBLE PRECISION,
        client_created_at DOUBLE PRECISION NOT NULL,
        authorization_endpoint TEXT NOT NULL,
        token_endpoint TEXT NOT NULL,
        revocation_endpoint TEXT,
        access_token BLOB NOT NULL,
        refresh_token BLOB,
        token_type TEXT NOT NULL,
        token_scopes TEXT NOT NULL,
        obtained_at DOUBLE PRECISION NOT NULL,
        expires_at DOUBLE PRECISION,
        dpop_key BLOB,
        scopes TEXT NOT NULL,
        granted_at DOUBLE PRECISION NOT NULL,
        version INTEGER NOT NULL,
        refresh_begun_at DOUBLE PRECISION,
        refresh_owner TEXT NOT NULL DEFAULT '',
        ended_at DOUBLE PRECISION,
        ended_reason TEXT NOT NULL DEFAULT '',
        UNIQUE (principal, account, server, resource, issuer)
    )
    """,
    """
    INSERT INTO new_grants (
        id, uid, principal, server, resource, issuer, upstream, grant_type, client_id, client_auth, client_kind,
        client_secret, client_redirect_uri, client_secret_expires_at, client_created_at, authorization_endpoint,
        token_endpoint, revocation_endpoint, access_token, refresh_token, token_type, token_scopes, obtained_at,
        expires_at, dpop_key, scopes, granted_at, version, refresh_begun_at, refresh_owner, ended_at, ended_reason
    ) SELECT
        id, uid, principal, server, resource, issuer, upstream, grant_type, client_id, client_auth, client_kind,
        client_secret, client_redirect_uri, client_secret_expires_at, client_created_at, authorization_endpoint,
        token_endpoint, revocation_endpoint, access_token, refresh_token, token_type, token_scopes, obtained_at,
        expires_at, dpop_key, scopes, granted_at, version, refresh_begun_at, refresh_owner, ended_at, ended_reason
    FROM grants ORDER BY id
    """,
    # The sequence continues from where it was, which may be beyond the highest id that is left.
    "DELETE FROM sqlite_sequence WHERE name = 'new_grants'",
    "INSERT INTO sqlite_sequence (name, seq) SELECT 'new_grants', seq FROM sqlite_sequence WHERE name = 'grants'",
    "DROP TABLE grants",
    "ALTER TABLE new_grants RENAME TO grants",
    """
    CREATE TABLE new_registrations (
        uid TEXT NOT NULL UNIQUE,
        server TEXT NOT NULL,
        issuer TEXT NOT NULL,
        account TEXT NOT NULL DEFAULT 'default',
        client_id TEXT NOT NULL,
        client_auth TEXT NOT NULL,
        client_kind TEXT NOT NULL,
        client_secret BLOB,
        client_redirect_uri TEXT NOT NULL,
        client_secret_expires_at DOUBLE PRECISION,
        client_created_at DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (server, issuer, account, client_redirect_uri)
    )
    """,
    """
    INSERT INTO new_registrations (
        uid, server, issuer, client_id, client_auth, client_kind, client_secret, client_redirect_uri,
        client_secret_expires_at, client_created_at
    ) SELECT
        uid, server, issuer, client_id, client_auth, client_kind, client_secret, client_redirect_uri,
        client_secret_expires_at, client_created_at
    FROM registrations
    """,
    "DROP TABLE registrations",
    "ALTER TABLE new_registrations RENAME TO registrations",
    "ALTER TABLE flows ADD COLUMN account TEXT NOT NULL DEFAULT 'default'",
    "DROP INDEX flows_by_server",
    "CREATE INDEX flows_by_account ON flows (principal, account, server, status)",
)

# Rows are sealed as a whole; a path on the origin tells servers apart too; what users confirmed before their first
# redirect to a sign-in host is remembered.
_SEALED_ROWS = (
    "ALTER TABLE grants ADD COLUMN path TEXT",
    "ALTER TABLE grants ADD COLUMN seal BLOB",
    "ALTER TABLE flows ADD COLUMN path TEXT",
    "ALTER TABLE flows ADD COLUMN seal BLOB",
    "ALTER TABLE attempts ADD COLUMN seal BLOB",
    "ALTER TABLE registrations ADD COLUMN seal BLOB",
    """
    CREATE TABLE new_client_bindings (
        uid TEXT NOT NULL UNIQUE,
        server TEXT NOT NULL,
        client_id TEXT NOT NULL,
        issuer TEXT NOT NULL,
        seal BLOB,
        PRIMARY KEY (server, client_id)
    )
    """,
    """
    INSERT INTO new_client_bindings (uid, server, client_id, issuer)
    SELECT lower(hex(randomblob(16))), server, client_id, issuer FROM client_bindings
    """,
    "DROP TABLE client_bindings",
    "ALTER TABLE new_client_bindings RENAME TO client_bindings",
    """
    CREATE TABLE confirmations (
        uid TEXT NOT NULL UNIQUE,
        principal TEXT NOT NULL,
        account TEXT NOT NULL,
        server TEXT NOT NULL,
        upstream TEXT NOT NULL,
        issuer TEXT NOT NULL,
        sign_in_host TEXT NOT NULL,
        confirmed_at DOUBLE PRECISION NOT NULL,
        seal BLOB NOT NULL,
        PRIMARY KEY (principal, account, server, upstream, issuer, sign_in_host)
    )
    """,
    seal_rows,
)

Step = str | Callable[[sqlite3.Connection, Cipher], None]
"""One statement of a migration, or a function for what SQL can't do."""

SEALED_ROWS = 6
"""The first schema whose rows are sealed as a whole."""

MIGRATIONS: tuple[tuple[Step, ...], ...] = (
    _FIRST,
    _DEVICE_FLOWS,
    _DPOP_KEYS,
    _UPSTREAM_ORIGINS,
    _ACCOUNTS,
    _SEALED_ROWS,
    CALLERS,
    (*CLIENTS, *INDEXES),
    HEALTH,
)


def migrate(
    connection: sqlite3.Connection,
    cipher: Cipher,
    migrations: tuple[tuple[Step, ...], ...] = MIGRATIONS,
    *,
    before: Callable[[int], None] = lambda schema: None,
) -> None:
    """Apply the migrations that are missing, in one transaction. The caller must not have begun one.

    ``before`` is called with the present schema before the first statement, if a migration is missing; nobody else
    can write from then on. Raises sqlite3.Error and what ``before`` raises; the database is then as it was.
    """
    # No effect inside a transaction. With foreign keys, dropping a table would delete the rows that refer to it.
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Read inside the transaction: another process may have migrated while we waited.
        (applied,) = connection.execute("PRAGMA user_version").fetchone()
        if applied < len(migrations):
            before(applied)
            for steps in migrations[applied:]:
                for step in steps:
                    connection.execute(step) if isinstance(step, str) else step(connection, cipher)
            connection.execute(f"PRAGMA user_version = {len(migrations):d}")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID:d}")
        connection.execute("COMMIT")
    except BaseException:  # also on Ctrl-C: a migration happens as a whole or not at all
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
