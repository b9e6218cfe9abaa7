"""The principals and API keys of the store, in memory, and in step with it within a second."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence

from mcp_auth_proxy.errors import StoreError
from mcp_auth_proxy.models import (
    LOCAL,
    LOCAL_PRINCIPAL,
    ApiKey,
    Caller,
    Identity,
    Principal,
    PrincipalStatus,
    Role,
    Scope,
)
from mcp_auth_proxy.store.api_keys import ApiKeys
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.principals import Principals

WATCH_INTERVAL = 0.4
"""Seconds between checks whether another process has written to the store."""

HOUR = 3600.0

logger = logging.getLogger(__name__)


class Directory:
    """Who may call. Whatever changes principals or keys in this process does it here. Belongs to one event loop.

    ``local``: callers are not identified, so that keys may belong to the principal ``local``.
    """

    def __init__(self, database: Engine, *, clock: Callable[[], float], local: bool = False) -> None:
        self._database = database
        self._reader = f"directory {id(self)}"
        self._clock = clock
        self._store = Principals(database)
        self._key_store = ApiKeys(database)
        self._principal_table = self._store.table()
        self._key_table = self._key_store.table()
        self._versions = (0, 0)
        self._known: dict[str, Principal] = {LOCAL: LOCAL_PRINCIPAL} if local else {}
        self._local = local
        self.callers: dict[bytes, Caller] = {}
        """The callers of keys with the scope ``mcp``, by the SHA-256 of the key."""
        self.other_callers: dict[bytes, Caller] = {}
        """The callers of the other keys."""
        self.expiries: dict[bytes, float] = {}
        """When a key ends (Unix seconds), if it does."""
        self.used: set[bytes] = set()
        """The keys that were used in this hour. Whoever accepts a key adds it."""
        self.epoch = object()
        """Another object as soon as what was found out about credentials may not hold any more. See ``end_epoch``."""
        self._hour = clock() // HOUR * HOUR
        self._written: set[bytes] = set()
        self._refused: list[Callable[[str], None]] = []
        self._keys_refused: list[Callable[[str], None]] = []
        self._next_expiry = math.inf
        self._changed: list[Callable[[frozenset[str]], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._reading = asyncio.Lock()

    async def start(self) -> None:
        """Read everything, then watch for changes. Raises StoreError."""
        await self._database.changed(self._reader)
        await self.reload()
        self._task = asyncio.create_task(self._watch())

    async def aclose(self) -> None:
        """Stop watching, and store which keys were used."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            with contextlib.suppress(StoreError):
                await self._write_uses()

    def principal(self, principal_id: str) -> Principal | None:
        """Return a principal, active or not; None if there is none with this id."""
        return self._known.get(principal_id)

    def principals(self) -> list[Principal]:
        """Return all principals, by name."""
        return sorted(self._known.values(), key=lambda principal: principal.name)

    def on_refused(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with the id of each principal that may no longer call, within a second of the change."""
        if callback not in self._refused:
            self._refused.append(callback)

    def on_key_refused(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with the id of each API key that was revoked or has expired, within a second."""
        if callback not in self._keys_refused:
            self._keys_refused.append(callback)

    def on_change(self, callback: Callable[[frozenset[str]], None]) -> None:
        """Call ``callback`` with the ids of principals that were changed or removed, before ``on_refused``."""
        self._changed.append(callback)

    def end_epoch(self) -> None:
        """Let every credential be looked up again, also on the connections that it came on before."""
        self.epoch = object()

    # Changes by this process

    async def add(self, principal: Principal, identities: Iterable[Identity] = ()) -> None:
        """Store a new principal. Raises NameTaken, StoreError."""
        async with self._reading:
            await self._store.add(principal, identities)
            self._known[principal.id] = principal

    async def provision(self, identity: Identity, names: Sequence[str], role: Role) -> Principal:
        """Return the principal of an identity; add one if there is none. Raises StoreError."""
        async with self._reading:
            principal = await self._store.provision(identity, names, role=role, now=self._clock())
            self._known.setdefault(principal.id, principal)
        return principal

    async def find(self, identity: Identity) -> Principal | None:
        """Return the principal of an identity, or None. Raises StoreError."""
        versions = self._versions
        principal = await self._store.by_identity(identity)
        if principal is None:
            return None
        # Not replaced: a change is told to the subscribers when everything is read again.
        known = self._known.setdefault(principal.id, principal)
        # If that has just been done, what is known is newer than what was read here.
        return principal if versions == self._versions else known

    async def identities(self, principal_id: str) -> list[Identity]:
        """Return the identities of a principal; the subject of ``key`` is the id of an API key. Raises StoreError."""
        if principal_id == LOCAL:
            return [Identity("local", LOCAL)]
        keys = await self._key_store.of_principal(principal_id)
        return [*(Identity("key", key.id) for key in keys), *await self._store.identities(principal_id)]

    async def change(
        self,
        principal_id: str,
        *,
        role: Role | None = None,
        status: PrincipalStatus | None = None,
        listed: bool | None = None,
        keep_admin: bool = False,
    ) -> Principal | None:
        """Change what is given of a principal and return it; None if there is none with this id. Raises StoreError.

        A principal that is disabled can't call any more when this returns. ``keep_admin``: raise LastAdmin if its
        project would have no active admin any more, apart from ``local``.
        """
        principal = await self._store.change(
            principal_id, role=role, status=status, listed=listed, keep_admin=keep_admin and not self._local
        )
        await self.reload()
        return principal

    async def add_key(self, key: ApiKey) -> None:
        """Store a new key, which can be used at once. Raises StoreError."""
        await self._key_store.add(key)
        await self.reload()

    async def revoke_key(self, key_id: str) -> bool:
        """Delete a key, which can't be used any more when this returns. Return False if there is none with this id.

        Raises StoreError.
        """
        found = await self._key_store.delete(key_id)
        await self.reload()
        return found

    async def keys(self, principal_id: str | None = None) -> list[ApiKey]:
        """Return the keys of a principal, or all, the oldest first. Raises StoreError."""
        if principal_id is None:
            return await self._key_store.all()
        return await self._key_store.of_principal(principal_id)

    # Changes by others

    async def heed_changes(self) -> None:
        """Read what another process has changed, if it has changed anything. Raises StoreError."""
        if await self._database.changed(self._reader):
            await self.reload()

    async def reload(self) -> None:
        """Read all principals and keys. Raises StoreError."""
        async with self._reading:
            principals = {principal.id: principal for principal in await self._principal_table.all()}
            if self._local:
                principals[LOCAL] = LOCAL_PRINCIPAL
            keys = await self._key_table.all()
            versions = (self._principal_table.version, self._key_table.version)
            if versions == self._versions:
                # Others write grants all the time.
                return
            self._versions = versions
            before, self._known = self._known, principals
            ended = self._key_ids()
            self._replace_keys(keys)
            ended -= self._key_ids()
        self._refuse_keys(ended)
        changed = frozenset(key for key in before.keys() | principals.keys() if before.get(key) != principals.get(key))
        if not changed:
            return
        for notify in self._changed:
            notify(changed)
        for principal_id in changed:
            now = principals.get(principal_id)
            if now is None or not now.is_active:
                for refuse in self._refused:
                    refuse(principal_id)

    def _replace_keys(self, keys: list[ApiKey]) -> None:
        # New dictionaries: whoever looks a key up meanwhile has the old ones, whole.
        callers: dict[bytes, Caller] = {}
        others: dict[bytes, Caller] = {}
        expiries: dict[bytes, float] = {}
        scopes: dict[frozenset[Scope], frozenset[Scope]] = {}
        for key in keys:
            principal = self._known.get(key.principal)
            if principal is None or not principal.is_active:
                continue
            digest = bytes.fromhex(key.key_hash)
            caller = Caller(
                principal=principal,
                credential=f"key:{key.id}",
                scopes=scopes.setdefault(key.scopes, key.scopes),
                key=key.id,
            )
            (callers if Scope.MCP in key.scopes else others)[digest] = caller
            if key.expires_at is not None:
                expiries[digest] = key.expires_at
        self.callers, self.other_callers, self.expiries = callers, others, expiries
        self.end_epoch()
        now = self._clock()
        self._next_expiry = min((ends for ends in expiries.values() if ends > now), default=math.inf)

    def _key_ids(self) -> set[str]:
        """Return the ids of all keys with the scope ``mcp``: the others have no requests that last."""
        return {caller.key for caller in self.callers.values()}

    def _refuse_keys(self, keys: Iterable[str]) -> None:
        for key in keys:
            for refuse in self._keys_refused:
                refuse(key)

    def _note_expiries(self) -> None:
        """Say which keys have expired since this was last done."""
        now = self._clock()
        if now < self._next_expiry:
            return
        ended, callers = [digest for digest, ends in self.expiries.items() if ends <= now], self.callers
        self._next_expiry = min((ends for ends in self.expiries.values() if ends > now), default=math.inf)
        self._refuse_keys(callers[digest].key for digest in ended if digest in callers)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            try:
                self._note_expiries()
                await self.heed_changes()
                await self._write_uses()
            except StoreError:
                # Reported by /readyz and by the requests that need the store.
                pass
            except Exception:  # a bug, or a row that nobody expects; who is disabled later must still be noticed
                logger.exception("the principals in the store could not be read")

    async def _write_uses(self) -> None:
        """Store which keys were used: once an hour for each."""
        new = self.used - self._written if len(self.used) > len(self._written) else set()
        if new:
            callers = (self.callers.get(digest) or self.other_callers.get(digest) for digest in new)
            ids = [caller.credential.partition(":")[2] for caller in callers if caller is not None]
            await self._key_store.used(ids, at=self._hour)
            self._written |= new
        hour = self._clock() // HOUR * HOUR
        if hour != self._hour:
            self._hour = hour
            self.used.clear()
            self._written.clear()
            # Each use in the new hour is noted again.
            self.end_epoch()
