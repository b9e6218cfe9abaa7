"""Indexes for lists of grants by state, server and owner: of 100,000 grants, a page takes a few milliseconds.

What a filter compares stands in the index beside the id, so rows that are not wanted are not read: they are ten times
as large. The conditions are those of ``store.grant_summaries``, word for word: else SQLite would not use the index.
"""

INDEXES = (
    "CREATE INDEX grants_by_principal_and_server ON grants (principal, server, id)",
    """
    CREATE INDEX grants_renewable ON grants (id, server, principal, expires_at, refresh_begun_at)
    WHERE ended_at IS NULL
        AND (refresh_token IS NOT NULL
            OR grant_type IN ('client_credentials', 'jwt_bearer', 'id_jag', 'token_exchange'))
    """,
    "DROP INDEX grants_not_renewed",
    """
    CREATE INDEX grants_not_renewable ON grants (id, server, principal, ended_at, expires_at, grant_type)
    WHERE ended_at IS NOT NULL OR refresh_token IS NULL
    """,
)
