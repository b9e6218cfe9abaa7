"""Decide whether a stored grant or flow still belongs to a server as it is configured now.

The configuration may change while a grant or a flow is stored: before a restart, or with a reload. If a name now means
another server, the token of the old server must not be sent to the new one.
"""

from collections.abc import Mapping

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import DpopUse, Flow, Grant, GrantKey, GrantType
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.urls import Origin
from mcp_auth_proxy.oauth import discovery, dpop
from mcp_auth_proxy.store.grant_summaries import GrantSummary


def matches(stored: Grant | GrantSummary | Flow, server: ServerSettings) -> bool:
    """Return whether a grant, or the grant that a flow leads to, may be used with the server as configured now."""
    return (
        _grant_type(stored) is server.oauth.grant
        and _key_matches(stored.key, server)
        and _binding_matches(stored, server.oauth.dpop)
    )


def configured(servers: Mapping[str, ServerSettings], name: str) -> ServerSettings:
    """Return the settings of a server. Raises AuthorizationError if it was removed from the configuration."""
    server = servers.get(name)
    if server is None:
        raise server_removed(name)
    return server


def configured_at(servers: Mapping[str, ServerSettings], sent_to: ServerSettings) -> ServerSettings:
    """Return the settings of a server that a request was sent to, or is about to be, as ``sent_to`` says.

    Raises AuthorizationError if the server was removed, or if its url now has another origin or path: its token must
    not be sent to the old one, and what the old one answers says nothing about the new one.
    """
    server = configured(servers, sent_to.name)
    if server.url != sent_to.url and _place(server.url) != _place(sent_to.url):
        raise AuthorizationError(
            f"The configuration of server {server.name} was changed after this request began: its url leads elsewhere "
            f"now. Try again."
        )
    return server


def configured_for(servers: Mapping[str, ServerSettings], flow: Flow) -> ServerSettings:
    """Return the settings of a flow's server.

    Raises AuthorizationError if the server was removed or changed since the flow was started.
    """
    server = configured(servers, flow.key.account.server)
    if not matches(flow, server):
        raise server_reconfigured(server.name)
    return server


def upstream_of(server: ServerSettings) -> str:
    """Return the origin and path of a server's URL, without its query, which may have a secret."""
    origin, path = _place(server.url)
    return f"{origin.serialized}{path}"


def server_removed(name: str) -> AuthorizationError:
    """Return the error for a server that was removed from the configuration."""
    return AuthorizationError(f"Server {name} is no longer configured.")


def server_reconfigured(name: str) -> AuthorizationError:
    """Return the error for an authorization that the server's new configuration makes useless."""
    return AuthorizationError(
        f"Server {name} was reconfigured after this authorization was started: the name now stands for another server, "
        f"issuer, resource, grant or use of DPoP. Try again: a new authorization will be started."
    )


def _grant_type(stored: Grant | GrantSummary | Flow) -> GrantType:
    if not isinstance(stored, Flow):
        return stored.grant_type
    return GrantType.AUTHORIZATION_CODE if stored.device is None else GrantType.DEVICE_CODE


def _key_matches(key: GrantKey, server: ServerSettings) -> bool:
    """Return whether a key names the server's current upstream, issuer and resource.

    Comparing the resource is not enough: it may be omitted, or cover several servers, and a token goes only to the
    origin and path that it was requested for.
    """
    oauth = server.oauth
    origin, path = _place(server.url)
    if key.upstream not in (None, origin.serialized) or key.path not in (None, path):
        return False
    if oauth.issuer is not None and key.issuer != oauth.issuer:
        return False
    match oauth.resource:
        case "omit":
            return not key.resource
        case "auto":
            # Without its query, which the canonical identifier of a server without metadata may have.
            return discovery.covers(key.resource.partition("?")[0], server.url)
        case exact:
            return key.resource == exact


def _place(url: str) -> tuple[Origin, str]:
    """Return the origin and the path of a server's URL: one origin may have a server at each path."""
    parsed = urls.parse(url)
    return parsed.origin, parsed.path or "/"


def _is_bound(stored: Grant | GrantSummary | Flow) -> bool:
    match stored:
        case Flow():
            return stored.dpop_key is not None
        case Grant():
            return stored.tokens.token_type == dpop.TOKEN_TYPE
        case _:
            return stored.token_type == dpop.TOKEN_TYPE


def _binding_matches(stored: Grant | GrantSummary | Flow, use: DpopUse) -> bool:
    bound = _is_bound(stored)
    match use:
        case DpopUse.OFF:
            return not bound
        case DpopUse.REQUIRED:
            return bound
        case _:
            return True
