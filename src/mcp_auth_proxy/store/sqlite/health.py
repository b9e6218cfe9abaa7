"""The columns of grants that tell how their renewal goes, for all processes on a store and for commands.

All are NULL for a grant that renews as it should, so rows of earlier schemas keep their seals. The indexes are those of
``indexes`` with what lists by state compare now, one for grants that have not been refreshed for long, and one for
renewals that a dead process has left behind.
"""

HEALTH = (
    # When the refresh token lapses, as the token response said.
    "ALTER TABLE grants ADD COLUMN refresh_expires_at DOUBLE PRECISION",
    # When a renewal was refused while the access token still worked.
    "ALTER TABLE grants ADD COLUMN renewal_refused_at DOUBLE PRECISION",
    # Since when renewals have failed for reasons that may pass, why the last one did, and when the next may be tried.
    "ALTER TABLE grants ADD COLUMN failing_since DOUBLE PRECISION",
    "ALTER TABLE grants ADD COLUMN renewal_failure TEXT",
    "ALTER TABLE grants ADD COLUMN next_try_at DOUBLE PRECISION",
    # Since when the answer is an error that only a person can mend.
    "ALTER TABLE grants ADD COLUMN rejected_since DOUBLE PRECISION",
    "DROP INDEX grants_renewable",
    """
    CREATE INDEX grants_renewable
    ON grants (
        id, server, principal, expires_at, refresh_begun_at, renewal_refused_at, failing_since, rejected_since
    )
    WHERE ended_at IS NULL
        AND (refresh_token IS NOT NULL
            OR grant_type IN ('client_credentials', 'jwt_bearer', 'id_jag', 'token_exchange'))
    """,
    "DROP INDEX grants_not_renewable",
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
)
