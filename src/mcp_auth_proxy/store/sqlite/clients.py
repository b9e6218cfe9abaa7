"""The tables of what is remembered for MCP clients: schema 8.

``catalogs`` has what servers answered to ``initialize``, ``server/discover`` and the lists, and how many ``tools``
there are. ``mcp_sessions`` has the sessions that the proxy began itself while consent was outstanding; ``id_hash`` is
the SHA-256 (hex) of the id that the client has. ``connection_notes`` has what a process saw of a connection, for
commands and other processes.
"""

CLIENTS = (
    """
    CREATE TABLE catalogs (
        uid TEXT NOT NULL UNIQUE,
        principal TEXT NOT NULL,
        account TEXT NOT NULL,
        server TEXT NOT NULL,
        upstream TEXT NOT NULL,
        content BLOB NOT NULL,
        tools INTEGER,
        fetched_at DOUBLE PRECISION NOT NULL,
        seal BLOB NOT NULL,
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
        state BLOB NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        used_at DOUBLE PRECISION NOT NULL,
        seal BLOB NOT NULL
    )
    """,
    "CREATE INDEX mcp_sessions_by_account ON mcp_sessions (principal, account, server, used_at)",
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
        seal BLOB NOT NULL,
        PRIMARY KEY (principal, account, server)
    )
    """,
)
