"""Stored grants for the API and the pages: their states, and what may be done with one of them."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from mcp_auth_proxy.broker.backoff import Backoff, of_account, of_issuer, of_server, of_tokens
from mcp_auth_proxy.broker.connection_notes import ConnectionJournal, ConnectionNotes, remedy
from mcp_auth_proxy.broker.connections import ForgottenGrant
from mcp_auth_proxy.broker.flows import PendingFlows
from mcp_auth_proxy.broker.matching import matches
from mcp_auth_proxy.broker.renewal import Renewer, renewable
from mcp_auth_proxy.broker.states import NOT_RENEWABLE, GrantStatus, Health, Word, grant_status, word
from mcp_auth_proxy.broker.token_cache import TokenCache
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import GrantUnusable
from mcp_auth_proxy.models import DEFAULT_ACCOUNT, Account, Grant, Principal
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grant_summaries import GrantFilter, GrantState, GrantSummaries, GrantSummary
from mcp_auth_proxy.store.grants import Grants

REVOKED_AT_ONCE = 10
"""Grants that are revoked at the same time, if many are deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountConnection:
    """An account of a server, as its principal sees it."""

    account: Account
    word: Word
    grant: GrantSummary | None = None
    status: GrantStatus | None = None
    """None if there is no grant."""
    notes: ConnectionNotes = field(default_factory=ConnectionNotes)


class DeletedGrant(NamedTuple):
    """A grant that was deleted from the store."""

    grant: GrantSummary
    revoked: ForgottenGrant | None
    """What became of it at its authorization server; None if it had ended before."""


class StoredGrants:
    """The grants in the store, with what this process knows of their renewals. Every method raises StoreError."""

    def __init__(
        self,
        *,
        servers: Mapping[str, ServerSettings],
        database: Engine,
        tokens: TokenCache,
        renewer: Renewer,
        pending: PendingFlows,
        outages: OutageLog,
        journal: ConnectionJournal,
        backoff: Backoff,
        revoke: Callable[[Account, Grant], Awaitable[ForgottenGrant]],
        clock: Callable[[], float],
    ) -> None:
        self._servers = servers
        self._summaries = GrantSummaries(database)
        self._grants = Grants(database)
        self._flows = Flows(database)
        self._tokens = tokens
        self._renewer = renewer
        self._pending = pending
        self._outages = outages
        self._journal = journal
        self._backoff = backoff
        self._revoke = revoke
        self._clock = clock

    async def get(self, grant_id: int) -> GrantSummary | None:
        """Return a grant, ended or not; None if it is gone."""
        return await self._summaries.get(grant_id)

    async def count(self, principal: str) -> int:
        """Return how many grants of an owner have not ended."""
        return sum(grant.ended_at is None for grant in await self._summaries.of_principal(principal))

    async def page(
        self, *, after: int, count: int, state: GrantState | None = None, **wanted: str | None
    ) -> tuple[list[GrantSummary], int | None]:
        """Return a page of grants, and what ``after`` is for the next one; ``wanted`` as in ``GrantFilter``."""
        filtered = GrantFilter(state=state, **wanted)
        return await self._summaries.page(filtered, after=after, count=count, now=self._clock())

    def status(self, grant: GrantSummary) -> GrantStatus:
        """Return the state of a grant now."""
        return grant_status(grant, now=self._clock())

    async def connections(self, principal: Principal) -> dict[str, list[AccountConnection]]:
        """Return the connections of a principal with each server that it may use, by the server's name.

        A server has at least its default account, and those that are preset.
        """
        servers = [server for server in self._servers.values() if server.admits(principal)]
        owners = {server.account(principal).principal for server in servers}
        grants = [grant for owner in sorted(owners) for grant in await self._summaries.of_principal(owner)]
        now = self._clock()
        waiting = [each for owner in sorted(owners) for each in await self._summaries.authorizing(owner, now)]
        found: dict[str, list[AccountConnection]] = {}
        for server in servers:
            owner = server.account(principal).principal
            own = [grant for grant in grants if _is_at(grant.key.account, owner, server)]
            begun = {account: since for account, since in waiting if _is_at(account, owner, server)}
            names = {
                DEFAULT_ACCOUNT,
                *server.accounts,
                *(it.key.account.name for it in own),
                *(it.name for it in begun),
            }
            accounts = [server.account(principal, name) for name in sorted(names, key=lambda it: (it != "default", it))]
            found[server.name] = [self._connection(account, server, own, begun.get(account)) for account in accounts]
        return found

    def _connection(
        self, account: Account, server: ServerSettings, grants: Iterable[GrantSummary], begun: float | None
    ) -> AccountConnection:
        usable = [grant for grant in grants if grant.key.account == account and matches(grant, server)]
        grant = max(usable, key=lambda each: (each.ended_at is None, each.granted_at), default=None)
        unreachable = server.name in self._outages.unreachable
        if grant is None:
            shown = word(None, authorizing=begun is not None, unreachable=unreachable)
            return AccountConnection(account=account, word=shown, notes=self._notes(account, shown, None, None))
        status = self.status(grant)
        answered = begun is None or (grant.ended_at is None and grant.granted_at > begun)
        shown = word(status, authorizing=not answered, unreachable=unreachable)
        notes = self._notes(account, shown, grant, status)
        return AccountConnection(account=account, word=shown, grant=grant, status=status, notes=notes)

    def _notes(
        self, account: Account, shown: Word, grant: GrantSummary | None, status: GrantStatus | None
    ) -> ConnectionNotes:
        """Return what is known of an account beside its grant: the error is that which is to be mended first."""
        noted, hint = self._journal.notes(account), None
        subjects = [of_server(account.server), of_account(account), of_tokens(account)]
        if grant is not None:
            subjects.append(of_issuer(account.server, grant.key.issuer))
        failed = self._backoff.last_failure(*subjects)
        error = self._outages.unreachable_reason(account.server)
        if not error:
            # A reason to warn of is no error yet.
            bad = status is not None and status.health is not Health.FRESH and status.reason != NOT_RENEWABLE
            error = (status.reason if status is not None and bad else "") or noted.last_error
        if not error and failed is not None:
            error, hint = failed
        return replace(
            noted,
            last_used_at=self._tokens.last_used_at(account) or noted.last_used_at,
            last_error=error or None,
            remedy=remedy(shown, hint) if error else None,
        )

    async def refresh(self, grant_id: int) -> GrantSummary | None:
        """Renew a grant now, and return it with its new tokens; None if it is gone.

        Raises GrantUnusable, and AuthorizationServerUnavailable or AuthorizationError if it has to wait, or fails for a
        reason that passes.
        """
        grant = await self._grants.get(grant_id)
        if grant is None:
            return None
        if grant.ended_at is not None:
            raise GrantUnusable(f"The grant has ended: {grant.ended_reason}", ended=True)
        if not renewable(grant):
            raise GrantUnusable("The grant has no refresh token: a user has to authorize again.", ended=False)
        account = grant.key.account
        cached = await self._tokens.load(account) if account.server in self._servers else None
        if cached is None or cached.grant.id != grant_id:
            raise GrantUnusable(
                f"The grant is not for server {account.server} as it is configured now, so it is not used.", ended=False
            )
        renewed = await self._tokens.renew(account, cached, asked=True)
        if renewed is None or renewed.grant.id != grant_id:
            ended = await self.get(grant_id)
            raise GrantUnusable(f"The grant has ended: {ended.ended_reason if ended else 'it is gone.'}", ended=True)
        if renewed.grant.health.refused_at is not None:
            raise GrantUnusable(
                f"The renewal was refused, but the token still works: {renewed.grant.health.failure}", ended=False
            )
        return GrantSummary.of(renewed.grant)

    async def delete(self, grant_id: int) -> DeletedGrant | None:
        """Delete a grant and revoke it at its authorization server; None if it was gone.

        An authorization of the same account that waits for its user is cancelled, as by a logout.
        """
        summary = await self.get(grant_id)
        if summary is None:
            return None
        account, live = summary.key.account, summary.ended_at is None
        if live:
            # In this order: a grant that is stored in between finds its flow cancelled.
            await self._flows.cancel(account)
        deleted = await self._grants.delete_one(grant_id)
        if live:
            self._tokens.evict(account)
            self._pending.cancel(account)
            self._journal.disconnected(account)
        if deleted is None:
            return None
        return DeletedGrant(summary, await self._revoke(account, deleted) if deleted.ended_at is None else None)

    async def delete_all(self, principal: str) -> list[DeletedGrant]:
        """Delete and revoke all grants of an owner, as ``delete`` does."""
        running = asyncio.Semaphore(REVOKED_AT_ONCE)

        async def delete(grant: GrantSummary) -> DeletedGrant | None:
            async with running:
                return await self.delete(grant.id)

        grants = await self._summaries.of_principal(principal)
        return [deleted for deleted in await asyncio.gather(*map(delete, grants)) if deleted is not None]


def _is_at(account: Account, owner: str, server: ServerSettings) -> bool:
    return account.principal == owner and account.server == server.name
