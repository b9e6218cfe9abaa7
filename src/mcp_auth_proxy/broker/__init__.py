"""Decide which token a request may use, and obtain one if there is none.

Other packages use ``Broker``, which is built from the modules here::

    broker ── token_cache ── renewal
       ├───── challenge_handler: what follows a 401 or 403
       ├───── authorization ── planning ── discovery, client_registration
       ├───── flows ── device, turns        token_requests ── authenticated_requests, unattended
       ├───── attempts ── visits, sign_ins
       ├───── headless, requested_flows: flows that the API asks for
       ├───── store_watch, connections
       ├───── connection_notes, connection_records: what was noted of connections
       └───── backoff: what waits after a failure

Requests use ``token()`` and, after a 401 or 403, ``challenged()``. Pages use ``open_link()``, ``confirm_link()``,
``complete()``, ``connected()`` and ``begin()``, commands ``authorize()``, ``disconnect()`` and ``connections()``.
"""

from mcp_auth_proxy.broker.attempts import (
    AuthorizationRedirect,
    ConfirmationPrompt,
    ConnectedServer,
    DevicePrompt,
    cookie_name,
)
from mcp_auth_proxy.broker.broker import Broker
from mcp_auth_proxy.broker.challenge_history import ChallengeHistory
from mcp_auth_proxy.broker.connections import (
    Connection,
    ConnectionState,
    Disconnected,
    ForgottenGrant,
    Revocation,
    stored_connections,
    stored_servers,
)
from mcp_auth_proxy.broker.examination import Examination
from mcp_auth_proxy.broker.oauth_clients import CHANGED as CLIENT_CHANGED
from mcp_auth_proxy.broker.oauth_clients import REVOKED as CLIENT_REVOKED
from mcp_auth_proxy.broker.pending import PendingAuthorization
from mcp_auth_proxy.broker.requested_flows import FlowRequest, FlowState
from mcp_auth_proxy.broker.sign_ins import SignIn, sign_in
from mcp_auth_proxy.broker.stored_grants import AccountConnection

__all__ = [
    "CLIENT_CHANGED",
    "CLIENT_REVOKED",
    "AccountConnection",
    "AuthorizationRedirect",
    "Broker",
    "ChallengeHistory",
    "ConfirmationPrompt",
    "ConnectedServer",
    "Connection",
    "ConnectionState",
    "DevicePrompt",
    "Disconnected",
    "Examination",
    "FlowRequest",
    "FlowState",
    "ForgottenGrant",
    "PendingAuthorization",
    "Revocation",
    "SignIn",
    "cookie_name",
    "sign_in",
    "stored_connections",
    "stored_servers",
]
