"""What it means if an authorization server refuses to renew a grant (RFC 6749 §5.2).

- ``invalid_grant`` and ``invalid_client`` end the grant, but only once its access token is dead: some servers refuse a
  renewal that comes early. Until then the grant is degraded, and its token is used as before.
- ``unauthorized_client``, ``invalid_scope`` and ``unsupported_grant_type`` can be mended, by a person. The renewal is
  tried again, at most every three seconds in all processes; the grant ends after a day of them.
- Everything else passes.
"""

from dataclasses import replace

from mcp_auth_proxy.broker.connection_notes import authorize_again, moment
from mcp_auth_proxy.broker.states import REJECTED_PAUSE
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.models import Grant, RenewalHealth

ENDING_ERRORS = frozenset({"invalid_grant", "invalid_client"})
"""Errors after which a grant with a dead token can't be renewed any more."""

REJECTING_ERRORS = frozenset({"unauthorized_client", "invalid_scope", "unsupported_grant_type"})
"""Errors that only a person can mend."""

ENDS_AFTER = 86_400.0
"""Seconds after which a grant ends that nobody has mended."""

_REMEDIES = {
    "unauthorized_client": "Allow the client to use this grant type at the authorization server",
    "invalid_scope": "Correct the scopes at the authorization server or in the configuration",
    "unsupported_grant_type": "Allow this grant type at the authorization server",
}


def works(grant: Grant, *, now: float, rejected: bool) -> bool:
    """Return whether the access token works, as far as is known: it has not expired, and no 401 has come since."""
    return not rejected and (grant.tokens.expires_at is None or now < grant.tokens.expires_at)


def is_final(grant: Grant, error: str, *, now: float) -> bool:
    """Return whether an error that only a person can mend has lasted for so long that it ends the grant."""
    since = grant.health.rejected_since
    return error in REJECTING_ERRORS and since is not None and now - since >= ENDS_AFTER


def after_rejection(health: RenewalHealth, reason: str, *, now: float) -> RenewalHealth:
    """Return the health after an error that only a person can mend."""
    return replace(
        health,
        failing_since=health.failing_since or now,
        failure=reason,
        next_try_at=now + REJECTED_PAUSE,
        rejected_since=health.rejected_since or now,
    )


def remedy(error: str, grant: Grant, server: ServerSettings, *, now: float) -> str:
    """Return what a person can do about an error that nobody else can mend."""
    ends = (grant.health.rejected_since or now) + ENDS_AFTER
    again = authorize_again(grant.key.account, server, by_link=False)
    return f"{_REMEDIES[error]}: the renewal is tried again until {moment(ends)}. {again}"
