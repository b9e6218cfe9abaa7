"""The tables of the store in PostgreSQL: those of ``store.sqlite.schema``, with one count of schemas for both engines.

A table of its own says which schema it is; its name tells a store of ours from other databases. As in SQLite, texts are
compared byte by byte (``COLLATE "C"``), and the id of a deleted row is never used again.

A new schema is a new entry of ``MIGRATIONS``, beside that of SQLite; those that were released never change.
"""

import re

MARK = "mcp_auth_proxy_store"
"""The table that has the number of the schema, in its only row."""

FIRST_SCHEMA = 9
"""The schema that ``BASELINE`` makes: there was none for PostgreSQL before."""

_CLIENT = """
    client_id TEXT NOT NULL,
    client_auth TEXT NOT NULL,
    client_kind TEXT NOT NULL,
    client_secret BYTEA,
    client_redirect_uri TEXT NOT NULL,
    client_secret_expires_at DOUBLE PRECISION,
    client_created_at DOUBLE PRECISION NOT NULL,
"""
_ENDPOINTS = """
    authorization_endpoint TEXT NOT NULL,
    token_endpoint TEXT NOT NULL,
    revocation_endpoint TEXT,
"""
BASELINE = (
    f"CREATE TABLE {MARK} (version INTEGER NOT NULL)",
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value BYTEA NOT NULL)",
    f"""
    CREATE TABLE grants (
        id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        uid TEXT NOT NULL UNIQUE,
        principal TEXT NOT NULL,
        account TEXT NOT NULL DEFAULT 'default',
        server TEXT NOT NULL,
        resource TEXT NOT NULL,
        issuer TEXT NOT NULL,
        upstream TEXT,
        path TEXT,
        grant_type TEXT NOT NULL,
        {_CLIENT} {_ENDPOINTS}
        access_token BYTEA NOT NULL,
        refresh_token BYTEA,
        token_type TEXT NOT NULL,
        token_scopes TEXT NOT NULL,
        obtained_at DOUBLE PRECISION NOT NULL,
        expires_at DOUBLE PRECISION,
        dpop_key BYTEA,
        scopes TEXT NOT NULL,
        granted_at DOUBLE PRECISION NOT NULL,
        version INTEGER NOT NULL,
        refresh_begun_at DOUBLE PRECISION,
        refresh_owner TEXT NOT NULL DEFAULT '',
        ended_at DOUBLE PRECISION,
        ended_reason TEXT NOT NULL DEFAULT '',
        label TEXT,
        oauth_client TEXT,
        refresh_expires_at DOUBLE PRECISION,
        renewal_refused_at DOUBLE PRECISION,
        failing_since DOUBLE PRECISION,
        renewal_failure TEXT,
        next_try_at DOUBLE PRECISION,
        rejected_since DOUBLE PRECISION,
        seal BYTEA,
        UNIQUE (principal, account, server, resource, issuer)
    )
    """,
    f"""
    CREATE TABLE registrations (
        uid TEXT NOT NULL UNIQUE,
        server TEXT NOT NULL,
        issuer TEXT NOT NULL,
        account TEXT NOT NULL DEFAULT 'default',
        {_CLIENT}
        seal BYTEA,
        PRIMARY KEY (server, issuer, account, client_redirect_uri)
    )
    """,
    """
    CREATE TABLE client_bindings (
        uid TEXT NOT NULL UNIQUE,
        server TEXT NOT NULL,
        client_id TEXT NOT NULL,
        issuer TEXT NOT NULL,
        seal BYTEA,
        PRIMARY KEY (server, client_id)
    )
    """,
    f"""
    CREATE TABLE flows (
        id TEXT PRIMARY KEY,
        uid TEXT NOT NULL UNIQUE,
        principal TEXT NOT NULL,
        account TEXT NOT NULL DEFAULT 'default',
        server TEXT NOT NULL,
        resource TEXT NOT NULL,
        issuer TEXT NOT NULL,
        upstream TEXT,
        path TEXT,
        {_CLIENT} {_ENDPOINTS}
        scopes TEXT NOT NULL,
        redirect_uri TEXT NOT NULL,
        iss_supported BOOLEAN NOT NULL,
        extra_params TEXT NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        expires_at DOUBLE PRECISION NOT NULL,
        status TEXT NOT NULL,
        reason TEXT NOT NULL,
        device BYTEA,
        poll_owner TEXT NOT NULL DEFAULT '',
        next_poll_at DOUBLE PRECISION NOT NULL DEFAULT 0,
        dpop_key BYTEA,
        oauth_client TEXT,
        mode TEXT,
        return_origin TEXT,
        seal BYTEA
    )
    """,
    """
    CREATE TABLE attempts (
        state_hash TEXT PRIMARY KEY,
        uid TEXT NOT NULL UNIQUE,
        flow_id TEXT NOT NULL REFERENCES flows (id) ON DELETE CASCADE,
        browser_hash TEXT NOT NULL,
        code_verifier BYTEA NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        expires_at DOUBLE PRECISION NOT NULL,
        seal BYTEA
    )
    """,
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
        seal BYTEA NOT NULL,
        PRIMARY KEY (principal, account, server, upstream, issuer, sign_in_host)
    )
    """,
    """
    CREATE TABLE principals (
        uid TEXT NOT NULL UNIQUE,
        id TEXT PRIMARY KEY,
        project_id TEXT NOT NULL,
        name TEXT NOT NULL UNIQUE,
        role TEXT NOT NULL,
        status TEXT NOT NULL,
        listed INTEGER NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        seal BYTEA NOT NULL
    )
    """,
    """
    CREATE TABLE identities (
        uid TEXT NOT NULL UNIQUE,
        source TEXT NOT NULL,
        subject TEXT NOT NULL,
        principal TEXT NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        seal BYTEA NOT NULL,
        PRIMARY KEY (source, subject)
    )
    """,
    """
    CREATE TABLE api_keys (
        uid TEXT NOT NULL UNIQUE,
        id TEXT PRIMARY KEY,
        principal TEXT NOT NULL,
        name TEXT NOT NULL,
        key_hash TEXT NOT NULL UNIQUE,
        scopes TEXT NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        expires_at DOUBLE PRECISION,
        last_used_at DOUBLE PRECISION,
        seal BYTEA NOT NULL
    )
    """,
    """
    CREATE TABLE sessions (
        uid TEXT NOT NULL UNIQUE,
        id_hash TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        principal TEXT NOT NULL,
        credential TEXT NOT NULL,
        scopes TEXT NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        expires_at DOUBLE PRECISION NOT NULL,
        seal BYTEA NOT NULL
    )
    """,
    """
    CREATE TABLE shared_secrets (
        uid TEXT NOT NULL UNIQUE,
        name TEXT PRIMARY KEY,
        value BYTEA NOT NULL,
        seal BYTEA NOT NULL
    )
    """,
    """
    CREATE TABLE servers (
        uid TEXT NOT NULL UNIQUE,
        id TEXT PRIMARY KEY,
        project_id TEXT NOT NULL,
        name TEXT NOT NULL,
        origin TEXT NOT NULL,
        owner TEXT NOT NULL,
        url TEXT NOT NULL,
        settings BYTEA NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        updated_at DOUBLE PRECISION NOT NULL,
        connected_at DOUBLE PRECISION,
        seal BYTEA NOT NULL,
        UNIQUE (project_id, name)
    )
    """,
    """
    CREATE TABLE oauth_clients (
        uid TEXT NOT NULL UNIQUE,
        id TEXT PRIMARY KEY,
        customer_id TEXT NOT NULL,
        project_id TEXT NOT NULL,
        provider TEXT NOT NULL,
        provider_name TEXT NOT NULL,
        client_id TEXT NOT NULL,
        client_secret BYTEA,
        authorization_url TEXT NOT NULL,
        token_url TEXT NOT NULL,
        scopes TEXT NOT NULL,
        redirect_uris TEXT NOT NULL,
        metadata TEXT NOT NULL,
        server_ids TEXT NOT NULL,
        status TEXT NOT NULL,
        version INTEGER NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        updated_at DOUBLE PRECISION NOT NULL,
        deleted_at DOUBLE PRECISION,
        seal BYTEA NOT NULL
    )
    """,
    """
    CREATE TABLE events (
        uid TEXT NOT NULL UNIQUE,
        id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        at DOUBLE PRECISION NOT NULL,
        project_id TEXT NOT NULL,
        principal TEXT NOT NULL,
        credential TEXT NOT NULL,
        action TEXT NOT NULL,
        target TEXT NOT NULL,
        server TEXT NOT NULL,
        server_name TEXT NOT NULL,
        outcome TEXT NOT NULL,
        address TEXT NOT NULL,
        request_id TEXT NOT NULL,
        seal BYTEA
    )
    """,
    """
    CREATE TABLE catalogs (
        uid TEXT NOT NULL UNIQUE,
        principal TEXT NOT NULL,
        account TEXT NOT NULL,
        server TEXT NOT NULL,
        upstream TEXT NOT NULL,
        content BYTEA NOT NULL,
        tools INTEGER,
        fetched_at DOUBLE PRECISION NOT NULL,
        seal BYTEA NOT NULL,
        PRIMARY KEY (principal, account, server)
    )
    """,
    """
    CREATE TABLE mcp_sessions (
        uid TEXT NOT NULL UNIQUE,
        id_hash TEXT PRIMARY KEY,
        principal TEXT NOT NULL,
        account TEXT NOT NULL,
        server TEXT NOT NULL,
        upstream TEXT NOT NULL,
        state BYTEA NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        used_at DOUBLE PRECISION NOT NULL,
        seal BYTEA NOT NULL
    )
    """,
    """
    CREATE TABLE connection_notes (
        uid TEXT NOT NULL UNIQUE,
        principal TEXT NOT NULL,
        account TEXT NOT NULL,
        server TEXT NOT NULL,
        used_at DOUBLE PRECISION,
        unreachable_since DOUBLE PRECISION,
        failed_at DOUBLE PRECISION,
        failure TEXT NOT NULL DEFAULT '',
        remedy TEXT NOT NULL DEFAULT '',
        retrying_since DOUBLE PRECISION,
        seal BYTEA NOT NULL,
        PRIMARY KEY (principal, account, server)
    )
    """,
    "CREATE INDEX attempts_by_flow ON attempts (flow_id, created_at)",
    "CREATE INDEX flows_by_account ON flows (principal, account, server, status)",
    "CREATE INDEX grants_by_principal ON grants (principal, id)",
    "CREATE INDEX grants_by_server ON grants (server, id)",
    "CREATE INDEX grants_by_principal_and_server ON grants (principal, server, id)",
    "CREATE INDEX grants_by_oauth_client ON grants (oauth_client) WHERE oauth_client IS NOT NULL",
    # The conditions are those of ``store.grant_summaries``.
    """
    CREATE INDEX grants_renewable
    ON grants (
        id, server, principal, expires_at, refresh_begun_at, renewal_refused_at, failing_since, rejected_since
    )
    WHERE ended_at IS NULL
        AND (refresh_token IS NOT NULL
            OR grant_type IN ('client_credentials', 'jwt_bearer', 'id_jag', 'token_exchange'))
    """,
    """
    CREATE INDEX grants_not_renewable
    ON grants (id, server, principal, ended_at, expires_at, grant_type, renewal_refused_at, rejected_since)
    WHERE ended_at IS NOT NULL OR refresh_token IS NULL OR renewal_refused_at IS NOT NULL
        OR rejected_since IS NOT NULL
    """,
    """
    CREATE INDEX grants_by_refresh ON grants (id, obtained_at, refresh_expires_at, next_try_at, renewal_refused_at)
    WHERE ended_at IS NULL AND refresh_token IS NOT NULL
    """,
    "CREATE INDEX grants_being_refreshed ON grants (id) WHERE refresh_begun_at IS NOT NULL",
    "CREATE INDEX identities_by_principal ON identities (principal)",
    "CREATE INDEX api_keys_by_principal ON api_keys (principal)",
    "CREATE INDEX sessions_by_principal ON sessions (principal)",
    """
    CREATE UNIQUE INDEX oauth_clients_by_provider ON oauth_clients (project_id, provider) WHERE deleted_at IS NULL
    """,
    "CREATE INDEX mcp_sessions_by_account ON mcp_sessions (principal, account, server, used_at)",
)

MIGRATIONS: tuple[tuple[str, ...], ...] = ()
"""What leads from ``FIRST_SCHEMA`` to each later one."""

NEWEST = FIRST_SCHEMA + len(MIGRATIONS)
"""The schema that this version writes and reads."""

VERSION = f"SELECT version FROM {MARK}"  # noqa: S608 - our own constant
"""Reads the schema of the store."""

_TEXT = re.compile(r"\bTEXT\b")


def statements(schema: int | None) -> list[str]:
    """Return what makes the newest schema of this one; None if there are no tables yet."""
    steps = [BASELINE, *MIGRATIONS] if schema is None else MIGRATIONS[schema - FIRST_SCHEMA :]
    wanted = [_TEXT.sub('TEXT COLLATE "C"', statement) for step in steps for statement in step]
    if schema is None:
        return [*wanted, f"INSERT INTO {MARK} (version) VALUES ({NEWEST:d})"]  # noqa: S608 - our own constants
    return [*wanted, f"UPDATE {MARK} SET version = {NEWEST:d}"]  # noqa: S608 - our own constants
