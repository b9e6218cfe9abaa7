"""The tables of callers and of what the API makes: schema 7.

Lists and mappings are JSON. ``key_hash`` and ``id_hash`` are SHA-256 (hex) of a secret with 256 random bits.
"""

CALLERS = (
    "ALTER TABLE grants ADD COLUMN label TEXT",
    "ALTER TABLE grants ADD COLUMN oauth_client TEXT",
    "ALTER TABLE flows ADD COLUMN oauth_client TEXT",
    "ALTER TABLE flows ADD COLUMN mode TEXT",
    "ALTER TABLE flows ADD COLUMN return_origin TEXT",
    # Lists of grants have pages by id; few of many grants need somebody's attention.
    "CREATE INDEX grants_by_principal ON grants (principal, id)",
    "CREATE INDEX grants_by_server ON grants (server, id)",
    "CREATE INDEX grants_not_renewed ON grants (id) WHERE ended_at IS NOT NULL OR refresh_token IS NULL",
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
        seal BLOB NOT NULL
    )
    """,
    """
    CREATE TABLE identities (
        uid TEXT NOT NULL UNIQUE,
        source TEXT NOT NULL,
        subject TEXT NOT NULL,
        principal TEXT NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        seal BLOB NOT NULL,
        PRIMARY KEY (source, subject)
    )
    """,
    "CREATE INDEX identities_by_principal ON identities (principal)",
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
        seal BLOB NOT NULL
    )
    """,
    "CREATE INDEX api_keys_by_principal ON api_keys (principal)",
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
        seal BLOB NOT NULL
    )
    """,
    "CREATE INDEX sessions_by_principal ON sessions (principal)",
    # Random values that all processes on one store share.
    """
    CREATE TABLE shared_secrets (
        uid TEXT NOT NULL UNIQUE,
        name TEXT PRIMARY KEY,
        value BLOB NOT NULL,
        seal BLOB NOT NULL
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
        settings BLOB NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        updated_at DOUBLE PRECISION NOT NULL,
        connected_at DOUBLE PRECISION,
        seal BLOB NOT NULL,
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
        client_secret BLOB,
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
        seal BLOB NOT NULL
    )
    """,
    # Among those that are not deleted, a project has one for each provider.
    """
    CREATE UNIQUE INDEX oauth_clients_by_provider ON oauth_clients (project_id, provider) WHERE deleted_at IS NULL
    """,
    "CREATE INDEX grants_by_oauth_client ON grants (oauth_client) WHERE oauth_client IS NOT NULL",
    """
    CREATE TABLE events (
        uid TEXT NOT NULL UNIQUE,
        id INTEGER PRIMARY KEY AUTOINCREMENT,
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
        seal BLOB
    )
    """,
)
