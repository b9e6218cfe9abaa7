"""End grants before their time: of an account, of a server that was deleted, of a client that was revoked."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from mcp_auth_proxy.broker.client_registration import ClientRegistrar
from mcp_auth_proxy.broker.connection_notes import ConnectionJournal
from mcp_auth_proxy.broker.connections import Disconnected, ForgottenGrant, Revocation
from mcp_auth_proxy.broker.flows import PendingFlows
from mcp_auth_proxy.broker.matching import server_removed
from mcp_auth_proxy.broker.token_cache import TokenCache
from mcp_auth_proxy.broker.token_requests import TokenClient
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationDenied, McpAuthProxyError
from mcp_auth_proxy.models import Account, Grant, OAuthClient
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grants import Grants

logger = logging.getLogger(__name__)


class Disconnector:
    """Delete or end grants here, and revoke them at their authorization servers."""

    def __init__(
        self,
        *,
        servers: Mapping[str, ServerSettings],
        flows: Flows,
        grants: Grants,
        tokens: TokenCache,
        pending: PendingFlows,
        token_client: TokenClient,
        registrar: ClientRegistrar,
        journal: ConnectionJournal,
        clock: Callable[[], float],
    ) -> None:
        self._servers = servers
        self._journal = journal
        self._flows = flows
        self._grants = grants
        self._tokens = tokens
        self._pending = pending
        self._token_client = token_client
        self._registrar = registrar
        self._clock = clock

    async def disconnect(self, account: Account, *, forget_client: bool = False) -> Disconnected:
        """Delete the grants of an account and revoke them at their authorization servers.

        A revocation that fails is part of the result: the grant is deleted all the same. ``forget_client``: delete the
        dynamic registrations too, even if there is no grant. Raises StoreError.
        """
        disconnected = await self._disconnect(account, self._servers.get(account.server))
        if forget_client:
            await self._registrar.forget_all(account)
        return replace(disconnected, client_forgotten=forget_client)

    async def _disconnect(self, account: Account, server: ServerSettings | None) -> Disconnected:
        # In this order: a grant that is stored in between finds its flow cancelled, or is deleted.
        await self._flows.cancel(account)
        grants = await self._grants.delete(account)
        self._tokens.evict(account)
        self._pending.cancel(account)
        if grants:
            self._journal.disconnected(account)
        forgotten = [await self._revoke_at(account, grant, server) for grant in grants if grant.ended_at is None]
        return Disconnected(account=account, grants=tuple(forgotten), client_forgotten=False)

    async def server_deleted(self, server: ServerSettings) -> list[Disconnected]:
        """Delete and revoke the grants of all accounts at a server that is no longer there. Raises StoreError."""
        gone: list[Disconnected] = []
        stored = [grant.key.account for grant in await self._grants.all()]
        stored += [flow.key.account for flow in await self._flows.unanswered()]
        for account in dict.fromkeys(stored):
            if account.server == server.name:
                gone.append(await self._disconnect(account, server))
        return gone

    async def revoke(self, account: Account, grant: Grant) -> ForgottenGrant:
        """Revoke a grant at its authorization server. A failure is part of the result."""
        return await self._revoke_at(account, grant, self._servers.get(account.server))

    async def _revoke_at(self, account: Account, grant: Grant, server: ServerSettings | None) -> ForgottenGrant:
        reason = ""
        try:
            if server is None:
                raise server_removed(account.server)
            revoked = await self._token_client.revoke(server, grant)
        except McpAuthProxyError as error:
            revocation, reason = Revocation.FAILED, str(error)
        else:
            revocation = Revocation.REVOKED if revoked else Revocation.NOT_OFFERED
        return ForgottenGrant(issuer=grant.key.issuer, revocation=revocation, reason=reason)

    async def end_client(self, client: OAuthClient, reason: str, *, revoke: bool) -> None:
        """End the grants and flows of a client of the API; ``revoke``: at their authorization servers too.

        ``client`` is as it was before it was changed in the store: its secret is needed to revoke. A revocation that
        fails is logged. Raises StoreError.
        """
        for flow in await self._flows.of_oauth_client(client.id):
            await self._pending.fail(flow, AuthorizationDenied(reason))
        grants = await self._grants.of_oauth_client(client.id)
        for grant in grants:
            await self._grants.end(grant.id, version=grant.version, reason=reason, now=self._clock())
            self._tokens.evict(grant.key.account)
        if not revoke:
            return
        for grant in grants:
            known = replace(grant.registration, oauth_client=None, client_secret=client.client_secret)
            forgotten = await self.revoke(grant.key.account, replace(grant, registration=known))
            if forgotten.revocation is Revocation.FAILED:
                logger.warning("a grant of the client %s could not be revoked: %s", client.id, forgotten.reason)
