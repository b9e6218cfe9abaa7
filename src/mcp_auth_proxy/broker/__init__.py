"""Decide which token a request may use, and obtain one if there is none.

Other packages use ``Broker``, which is built from the modules here::

    broker ── token_cache ── renewal
       ├───── authorization ── planning ── discovery, client_registration
       ├───── flows ── device               token_requests ── authenticated_requests, unattended
       ├───── attempts, store_watch, connections
       └───── backoff: what waits after a failure

Requests use ``token()`` and, after a 401 or 403, ``challenged()``. Pages use ``open_link()`` and ``complete()``,
commands ``authorize()``, ``disconnect()`` and ``connections()``.
"""

from mcp_auth_proxy.broker.attempts import AuthorizationRedirect, DevicePrompt, cookie_name
from mcp_auth_proxy.broker.broker import Broker
from mcp_auth_proxy.broker.challenge_history import ChallengeHistory
from mcp_auth_proxy.broker.connections import (
    Connection,
    ConnectionState,
    Disconnected,
    ForgottenGrant,
    Revocation,
    stored_connections,
)
from mcp_auth_proxy.broker.pending import PendingAuthorization

__all__ = [
    "AuthorizationRedirect",
    "Broker",
    "ChallengeHistory",
    "Connection",
    "ConnectionState",
    "DevicePrompt",
    "Disconnected",
    "ForgottenGrant",
    "PendingAuthorization",
    "Revocation",
    "cookie_name",
    "stored_connections",
]
