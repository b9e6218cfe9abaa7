"""The tables, as an ordered list of migrations; ``PRAGMA user_version`` counts those that were applied.

Rows that hold something sealed have a ``uid``: random, given before the row is written and part of what
the seal covers. Times are Unix seconds; scopes are one text with spaces between.
"""

import sqlite3

APPLICATION_ID = 0x4D41_5031  # "MAP1"

_FIRST = (
    """
    CREATE TABLE meta (
        name TEXT PRIMARY KEY,
        value BLOB NOT NULL
    )
    """,
    # AUTOINCREMENT: the id of a deleted grant must not come back, or a refresh begun before the logout
    # could write into the grant of the login after it.
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

# Flows whose user authorizes on another device: what is polled with, sealed, and which process polls.
_DEVICE_FLOWS = (
    "ALTER TABLE flows ADD COLUMN device BLOB",
    "ALTER TABLE flows ADD COLUMN poll_owner TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE flows ADD COLUMN next_poll_at DOUBLE PRECISION NOT NULL DEFAULT 0",
)

# Tokens bound to a key (RFC 9449): the private key, sealed, from before the user is asked.
_DPOP_KEYS = (
    "ALTER TABLE grants ADD COLUMN dpop_key BLOB",
    "ALTER TABLE flows ADD COLUMN dpop_key BLOB",
)

# Where no resource says whom a token is for, this does.
_UPSTREAM_ORIGINS = (
    "ALTER TABLE grants ADD COLUMN upstream TEXT",
    "ALTER TABLE flows ADD COLUMN upstream TEXT",
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_FIRST, _DEVICE_FLOWS, _DPOP_KEYS, _UPSTREAM_ORIGINS)
"""What was released is never changed: a new schema is a new entry."""


def migrate(connection: sqlite3.Connection, migrations: tuple[tuple[str, ...], ...] = MIGRATIONS) -> None:
    """Applies what is missing, in one transaction of its own that the caller must not have begun.

    Raises sqlite3.Error; the database is then as it was.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Read inside the transaction: another process may have migrated while we waited.
        (applied,) = connection.execute("PRAGMA user_version").fetchone()
        for statements in migrations[applied:]:
            for statement in statements:
                connection.execute(statement)
        if applied < len(migrations):
            connection.execute(f"PRAGMA user_version = {len(migrations):d}")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID:d}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
