"""What is remembered of servers, for each account: kept in the store, and asked for in the background.

A server is asked after each consent, which shows that the new token works too, and at the first use of a grant of which
nothing is remembered since its consent. Nobody waits for that, and nothing is asked for grants that need no user.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from weakref import WeakValueDictionary

from mcp_auth_proxy.broker import Broker
from mcp_auth_proxy.broker.matching import upstream_of
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, StoreError, UpstreamError, UpstreamUnreachable
from mcp_auth_proxy.models import DEFAULT_ACCOUNT, AccessToken, Account, Catalog
from mcp_auth_proxy.proxy.catalog_fetch import CatalogFetch
from mcp_auth_proxy.proxy.routes import route_to
from mcp_auth_proxy.proxy.server_client import Challenged
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient
from mcp_auth_proxy.store.catalogs import Catalogs, size_of
from mcp_auth_proxy.store.engine import Engine

logger = logging.getLogger(__name__)

FETCHES = 4
"""Fetches at a time; the others wait."""

FETCHES_OF_SERVER = 2
"""Those of one server, so that a slow one leaves some to the others."""

MAX_WAITING = 1000
"""Fetches that wait or run at most. What exceeds that is fetched after another start."""

ANSWER_SECONDS = 15.0
"""Seconds that the head of each response is waited for."""

FETCHED_SECONDS = 10.0
"""Seconds that somebody waits for a fetch at most."""

MAX_KEPT = 4 * 1024 * 1024
"""Bytes of the catalogs in memory, as JSON."""

MAX_KEPT_ACCOUNTS = 1000
"""Accounts of which it is known in memory what is remembered, or that nothing is."""

_Key = tuple[Account, str]


class ServerCatalogs:
    """The catalogs of all servers and accounts. Belongs to one event loop."""

    def __init__(
        self,
        *,
        broker: Broker,
        servers: Mapping[str, ServerSettings],
        upstream: UpstreamClient,
        database: Engine,
        clock: Callable[[], float],
        enabled: bool = True,
    ) -> None:
        """``servers`` may change at any time; call ``servers_changed`` afterwards. ``enabled``: whether to fetch."""
        self._broker = broker
        self._servers = servers
        self._upstream = upstream
        self._store = Catalogs(database)
        self._clock = clock
        self.enabled = enabled
        self._kept: OrderedDict[_Key, tuple[Catalog | None, int]] = OrderedDict()
        self._size = 0
        self._reads = 0
        """Incremented when what is kept may be out of date."""
        self._tried: dict[_Key, float] = {}
        """When the grant was given for which a server was last asked."""
        self._tasks: dict[Account, asyncio.Task[None]] = {}
        self._again: set[Account] = set()
        self._slots = asyncio.Semaphore(FETCHES)
        self._slots_of: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def aclose(self) -> None:
        """Stop all fetches."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def get(self, server: ServerSettings, account: Account) -> Catalog | None:
        """Return what is remembered of a server; None if nothing is, or if the store can't be read."""
        key = (account, upstream_of(server))
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        before = self._reads
        try:
            catalog = await self._store.get(account, upstream=key[1])
        except StoreError as error:
            self._broker.outages.warn(server.name, f"what it offers can't be read from the store: {error}")
            return None
        if before == self._reads:
            self._keep(key, catalog)
        return catalog

    async def fetched(self, server: ServerSettings, account: Account) -> Catalog | None:
        """Return what is remembered of a server; if it is being asked just now, wait for that, bounded."""
        task = self._tasks.get(account)
        if task is not None:
            await asyncio.wait({task}, timeout=FETCHED_SECONDS)
        return await self.get(server, account)

    async def tools_count(self, server: ServerSettings, account: Account) -> int | None:
        """Return how many tools an account sees, as far as that is remembered."""
        catalog = await self.get(server, account)
        tools = None if catalog is None else catalog.lists.get("tools")
        return None if tools is None else len(tools)

    # What others tell

    def connected(self, account: Account) -> None:
        """Ask the server in the background, unless it was asked since the account's grant was given."""
        server = self._servers.get(account.server)
        if not self.enabled or server is None or server.oauth.grant.unattended:
            return
        if account in self._tasks:
            self._again.add(account)
        elif len(self._tasks) < MAX_WAITING:
            self._tasks[account] = task = asyncio.create_task(self._run(account))
            task.add_done_callback(lambda _: self._ended(account))

    def servers_changed(self, names: Collection[str]) -> None:
        """Forget what is kept in memory of servers that were removed or changed."""
        for key in [key for key in self._kept if key[0].server in names]:
            self._drop(key)
        for key in [key for key in self._tried if key[0].server in names]:
            del self._tried[key]

    async def reload(self) -> None:
        """Read again what another process may have written."""
        self._reads += 1
        self._kept.clear()
        self._size = 0

    async def purge(self) -> None:
        """Do nothing: the store bounds the catalogs when one is written."""

    # In the background

    def _ended(self, account: Account) -> None:
        del self._tasks[account]
        if account in self._again:
            self._again.discard(account)
            self.connected(account)

    async def _run(self, account: Account) -> None:
        own = self._slots_of.setdefault(account.server, asyncio.Semaphore(FETCHES_OF_SERVER))
        async with own, self._slots:
            server, granted_at = self._servers.get(account.server), self._broker.granted_at(account)
            if server is None or granted_at is None:
                return
            key = (account, upstream_of(server))
            before = await self.get(server, account)
            known_since = 0.0 if before is None else before.fetched_at
            if granted_at <= max(known_since, self._tried.get(key, 0.0)):
                return
            if len(self._tried) >= MAX_WAITING:
                del self._tried[next(iter(self._tried))]
            self._tried[key] = granted_at
            try:
                await self._fetch(key, server, before)
            except (UpstreamError, AuthorizationError, StoreError, ValueError, RecursionError) as error:
                # The last two: what the server has sent can be read as JSON, but not written.
                reason = (
                    str(error) if isinstance(error, UpstreamError | AuthorizationError | StoreError) else "too deep"
                )
                logger.warning("server %s: what it offers could not be remembered: %s", server.name, reason)

    async def _fetch(self, key: _Key, server: ServerSettings, before: Catalog | None) -> None:
        account = key[0]
        fetched_at = self._clock()
        impatient = replace(server, upstream_timeout=min(server.upstream_timeout, ANSWER_SECONDS))
        route = replace(route_to(impatient), account=account)
        token = await self._broker.token(account)
        failure: UpstreamError | None = None
        for last in (False, True):
            if token is None:
                return
            self._broker.check_origin(server)
            fetch = CatalogFetch(self._upstream, route, token)
            try:
                await fetch.run()
            except Challenged as challenged:
                token = None if last else await self._another(account, token, challenged)
                if token is not None:
                    continue
                failure = UpstreamError(_refused(account, challenged.status))
            except UpstreamError as error:
                failure = error
            else:
                self._broker.accepted(account)
                self._broker.outages.reached(account.server)
            break
        if not fetch.is_empty:
            await self._put(key, _merged(before, fetch.found(fetched_at=fetched_at), complete=fetch.complete))
        if failure is not None:
            unreachable = isinstance(failure, UpstreamUnreachable)
            if unreachable:
                self._broker.outages.note_unreachable(account.server, str(failure))
            self._broker.journal.request_failed(account, str(failure), unreachable=unreachable)
            raise failure

    async def _another(self, account: Account, token: AccessToken, challenged: Challenged) -> AccessToken | None:
        """Return a token to try again with after one was refused, maybe the same with a new nonce (RFC 9449 §9)."""
        if token.signer is not None and challenged.nonce:
            return token
        if challenged.status != 401:
            return None
        return await self._broker.newer_token(account, token)

    async def _put(self, key: _Key, catalog: Catalog) -> None:
        account, upstream = key
        server = self._servers.get(account.server)
        if server is None or upstream_of(server) != upstream:
            return
        self._reads += 1
        self._drop(key)
        stored = await self._store.put(account, catalog, upstream=upstream)
        self._keep(key, stored)
        if "tools" in stored.lists:
            self._broker.journal.note_tools(account, len(stored.lists["tools"]))

    # In memory

    def _keep(self, key: _Key, catalog: Catalog | None) -> None:
        size = 0 if catalog is None else size_of(catalog)
        self._kept[key] = (catalog, size)
        self._size += size
        while self._size > MAX_KEPT or len(self._kept) > MAX_KEPT_ACCOUNTS:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: _Key) -> None:
        _, size = self._kept.pop(key, (None, 0))
        self._size -= size


def _merged(before: Catalog | None, found: Catalog, *, complete: bool) -> Catalog:
    """Return what to remember. If not everything was found, what was known before is kept, and the rest asked again."""
    if complete:
        return found
    known = before or Catalog()
    return Catalog(
        initialize={**known.initialize, **found.initialize},
        discover=found.discover or known.discover,
        lists={**known.lists, **found.lists},
        fetched_at=0.0,
    )


def _refused(account: Account, status: int) -> str:
    name = account.server if account.name == DEFAULT_ACCOUNT else f"{account.server}@{account.name}"
    return (
        f"it refuses the token ({status}). The next request tries to mend that; if it can't, authorize again, for "
        f"example with `mcp-auth-proxy login {name}`."
    )
