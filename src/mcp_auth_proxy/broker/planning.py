"""Make a plan from a challenge: discovery, client registration, scopes."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from mcp_auth_proxy.broker.backoff import Backoff, of_issuer
from mcp_auth_proxy.broker.client_registration import ClientRegistrar
from mcp_auth_proxy.broker.discovery import Discoverer
from mcp_auth_proxy.broker.oauth_clients import ClientDirectory, endpoints_of, metadata_of
from mcp_auth_proxy.broker.plan import Plan
from mcp_auth_proxy.broker.token_requests import TokenClient
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, AuthorizationServerUnavailable
from mcp_auth_proxy.models import Account, Flow, GrantKey, GrantType, OAuthClient, Registration
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth import discovery, dpop, scopes
from mcp_auth_proxy.oauth.challenge import BearerChallenge
from mcp_auth_proxy.oauth.discovery import ResourceMetadata, ServerMetadata

DISCOVERY_DEADLINE = 15.0
"""Seconds for all documents of one discovery together."""


class Planner:
    """Work out how to authorize at a server. Raises AuthorizationError and StoreError."""

    def __init__(
        self,
        *,
        discoverer: Discoverer,
        registrar: ClientRegistrar,
        token_client: TokenClient,
        backoff: Backoff,
        clients: ClientDirectory | None = None,
    ) -> None:
        """``clients``: those of the API; None where there is none."""
        self._discoverer = discoverer
        self._clients = clients
        self._registrar = registrar
        self._token_client = token_client
        self._backoff = backoff
        self._without_offline_access: set[tuple[str, str]] = set()

    async def plan(
        self,
        account: Account,
        server: ServerSettings,
        challenge: BearerChallenge | None,
        *,
        already: tuple[str, ...] = (),
        schemes: tuple[str, ...] = (),
    ) -> Plan:
        """Return what to request, registering a client if necessary, unless its issuer is paused.

        ``already``: scopes that a step-up must not lose. ``schemes``: authentication schemes other than Bearer that
        the server asked for, to be named if it turns out not to use OAuth.
        """

        async def register(metadata: ServerMetadata) -> Registration:
            policy = self._discoverer.policy(server.url, server)
            with self._backoff.attempt(of_issuer(server.name, metadata.issuer)):
                return await self._registrar.register(account, server, metadata, policy, schemes=schemes)

        return await self._plan(account, server, challenge, already, register)

    async def preview(
        self,
        account: Account,
        server: ServerSettings,
        challenge: BearerChallenge | None,
        *,
        client: Registration | None = None,
    ) -> Plan:
        """Return what ``plan`` would, from the same documents, without registering or storing anything.

        ``client``: one that is registered already, at the authorization server that is found. Raises AuthorizationError
        also if the step after the plan is certain to fail.
        """

        async def preview(metadata: ServerMetadata) -> Registration:
            if client is not None:
                return replace(client, server=server.name, account=account.name, issuer=metadata.issuer)
            return await self._registrar.preview(account, server, metadata)

        plan = await self._plan(account, server, challenge, (), preview)
        if server.oauth.grant is GrantType.DEVICE_CODE:
            _ = plan.device_endpoint
        elif server.oauth.idp is not None:
            await self._discoverer.identity_provider(server, server.oauth.idp)
        elif server.oauth.grant.unattended:
            await self._token_client.check_unattended(plan)
        return plan

    async def register_again(self, server: ServerSettings, flow: Flow) -> Registration:
        """Register a new client for a flow, in place of its own, unless its issuer is paused.

        Raises AuthorizationError, also if the configuration names a client now, and StoreError.
        """
        account, issuer = flow.key.account, flow.key.issuer
        if server.oauth.client_id is not None:
            raise AuthorizationError(f"{server.key('oauth.client_id')} names the client.")
        try:
            async with asyncio.timeout(DISCOVERY_DEADLINE):
                metadata = await self._discoverer.server_metadata(server, issuer)
                with self._backoff.attempt(of_issuer(server.name, issuer)):
                    policy = self._discoverer.policy(server.url, server)
                    return await self._registrar.register_again(
                        account, server, metadata, policy, replaces=flow.registration.client_id
                    )
        except TimeoutError:
            raise AuthorizationServerUnavailable(
                f"A registration for server {server.name} did not end within {DISCOVERY_DEADLINE:.0f} s."
            ) from None

    async def _plan(
        self,
        account: Account,
        server: ServerSettings,
        challenge: BearerChallenge | None,
        already: tuple[str, ...],
        register: Callable[[ServerMetadata], Awaitable[Registration]],
    ) -> Plan:
        try:
            async with asyncio.timeout(DISCOVERY_DEADLINE):
                named = await self._clients.named_for(server) if self._clients else None
                resource, metadata = await self._discoverer.discover(_as_named(server, named), challenge)
                bound = dpop.decide(
                    server.oauth.dpop,
                    metadata,
                    challenged=challenge is not None and challenge.dpop,
                    demanded=resource is not None and resource.dpop_required,
                    server=server.name,
                )
                client = named
                if client is None and self._clients:
                    client = await self._clients.at_endpoint(server, metadata.token_endpoint)
                    metadata = metadata if client is None else endpoints_of(client, metadata)
                registration = (
                    await register(metadata)
                    if client is None
                    else self._registrar.stand_for(client, account, server, metadata)
                )
        except TimeoutError:
            raise AuthorizationServerUnavailable(
                f"Discovery for server {server.name} did not end within {DISCOVERY_DEADLINE:.0f} s.", timed_out=True
            ) from None
        place = urls.parse(server.url)
        return Plan(
            server=server,
            key=GrantKey(
                account=account,
                resource=_resource(server, resource),
                issuer=metadata.issuer,
                upstream=place.origin.serialized,
                path=place.path or "/",
            ),
            metadata=metadata,
            registration=registration,
            scopes=self._scopes(account, server, client, challenge, resource, metadata, already),
            dpop=bound,
            redirect_uris=client.redirect_uris if client is not None else (),
        )

    def _scopes(
        self,
        account: Account,
        server: ServerSettings,
        client: OAuthClient | None,
        challenge: BearerChallenge | None,
        resource: ResourceMetadata | None,
        metadata: ServerMetadata,
        already: tuple[str, ...],
    ) -> tuple[str, ...]:
        wants_offline_access = (server.name, metadata.issuer) not in self._without_offline_access
        return scopes.choose(
            configured=server.scopes_of(account) or ((client and client.scopes) or None),
            challenged=challenge.scopes if challenge else None,
            supported_by_resource=resource.scopes_supported if resource else None,
            supported_by_server=metadata.scopes_supported,
            already=already,
            offline_access=wants_offline_access and not server.oauth.grant.unattended,
        )

    def leave_out_offline_access(self, refused: Flow | Plan) -> None:
        """Stop adding ``offline_access`` for a server that refused the requested scopes.

        Some servers list the scope for everyone but allow it only to some clients. Asking for less is never a risk.
        """
        if scopes.OFFLINE_ACCESS in refused.scopes:
            self._without_offline_access.add((refused.key.account.server, refused.key.issuer))


def _as_named(server: ServerSettings, client: OAuthClient | None) -> ServerSettings:
    """Return a server with the authorization server of the client that names it: nothing is to be discovered then."""
    if client is None:
        return server
    return replace(server, oauth=replace(server.oauth, issuer=None, metadata=metadata_of(client)))


def _resource(server: ServerSettings, metadata: ResourceMetadata | None) -> str:
    """Return the resource to request tokens for, spelled as in its metadata: servers compare strings (RFC 8707 §2)."""
    match server.oauth.resource:
        case "omit":
            return ""
        case "auto":
            return metadata.resource if metadata else discovery.canonical_resource(server.url)
        case exact:
            return exact
