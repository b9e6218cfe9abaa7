"""Take an export into a store: all of it in one transaction, sealed with the keys of this store.

What is here already stays: of two grants for one account, the newer one; a principal keeps its name, role and status.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from mcp_auth_proxy.models import Account, FlowStatus, Grant, OAuthClientStatus, Principal
from mcp_auth_proxy.store.api_keys import ApiKeys
from mcp_auth_proxy.store.codec import account_params
from mcp_auth_proxy.store.confirmations import Confirmations
from mcp_auth_proxy.store.engine import Engine, Transaction
from mcp_auth_proxy.store.exports import Export
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.oauth_clients import OAuthClientConflict, OAuthClients
from mcp_auth_proxy.store.principals import Principals
from mcp_auth_proxy.store.registrations import Registrations
from mcp_auth_proxy.store.sealed_rows import change_row, intact_rows
from mcp_auth_proxy.store.servers import Servers

_PREFIX = "import:"
_LOGIN_PREFIX = "imported:"
_REMEMBER = "INSERT INTO meta (name, value) VALUES (:name, :value) ON CONFLICT (name) DO NOTHING RETURNING name"
_FIND = "SELECT name FROM meta WHERE name = :name"
_SET = "INSERT INTO meta (name, value) VALUES (:name, :value) ON CONFLICT (name) DO UPDATE SET value = :value"
_VALUE = "SELECT value FROM meta WHERE name = :name"
_PENDING = """
    SELECT * FROM flows
    WHERE principal = :principal AND account = :account AND server = :server AND status = 'pending'
"""


class Outcome(StrEnum):
    """What has become of a grant of an export."""

    IMPORTED = "imported"
    KEPT = "kept"
    """The one that was here is as new, or newer, and stays."""
    LEFT_OUT = "left_out"
    """It could not be used here."""


@dataclass(frozen=True, slots=True)
class ImportedGrant:
    """A grant of an export, with the account that it is for here, what has become of it, and why."""

    grant: Grant
    outcome: Outcome
    reason: str = ""

    @property
    def account(self) -> Account:
        """The account that the grant is for."""
        return self.grant.key.account


@dataclass(slots=True)
class ImportResult:
    """What was done with each grant, and one line for everything else that is not as in the export."""

    grants: list[ImportedGrant] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


async def was_imported(engine: Engine, content: bytes) -> bool:
    """Return whether a file with this content was taken in with ``remember``. Raises StoreError."""
    return await engine.fetch_one(_FIND, {"name": _name(content)}) is not None


async def take_in(engine: Engine, export: Export, *, now: float, remember: bytes | None = None) -> ImportResult | None:
    """Store an export. Raises StoreError; nothing has changed then.

    ``remember``: the content of the file, which is taken in only once; None is returned if it was before. So are its
    logins, in whatever file they come again: one that the user has ended here since must not come back by itself.
    """
    async with engine.transaction() as transaction:
        if remember is not None:
            # A process that does the same in this instant waits here, and then finds the row.
            row = {"name": _name(remember), "value": str(now).encode()}
            if not await transaction.execute(_REMEMBER, row):
                return None
        return await _Import(engine, transaction, export, now, once=remember is not None).run()


class _Import:
    def __init__(self, engine: Engine, transaction: Transaction, export: Export, now: float, *, once: bool) -> None:
        self._engine = engine
        self._transaction = transaction
        self._export = export
        self._now = now
        self._once = once
        self._grants = Grants(engine)
        self._result = ImportResult()

    async def run(self) -> ImportResult:
        owners = await self._principals()
        await self._servers(owners)
        unusable = await self._oauth_clients()
        registrations = Registrations(self._engine)
        for registration in self._export.registrations:
            await registrations.add_within(self._transaction, registration)
        for binding in self._export.bindings:
            bound = await registrations.bind_within(self._transaction, binding)
            if bound != binding.issuer:
                self._note(f"The client of {binding.server} stays bound to {bound}, not to {binding.issuer}.")
        for confirmation in self._export.confirmations:
            here = confirmation._replace(account=_owned(confirmation.account, owners))
            await Confirmations(self._engine).add_within(self._transaction, here)
        for grant in sorted(self._export.grants, key=_age):
            key = replace(grant.key, account=_owned(grant.key.account, owners))
            self._result.grants.append(await self._grant(replace(grant, key=key), unusable))
        return self._result

    async def _principals(self) -> Mapping[str, str]:
        """Return the ids of principals as they are here, by those in the export, where they differ."""
        principals, keys = Principals(self._engine), ApiKeys(self._engine)
        owners: dict[str, str] = {}
        for principal in self._export.principals:
            identities = [identity for owner, identity in self._export.identities if owner == principal.id]
            here, added = await principals.add_within(self._transaction, principal, identities)
            if here.id != principal.id:
                owners[principal.id] = here.id
                self._note(f"The principal {principal.name} is {here.name} here: they have an identity in common.")
            elif here.name != principal.name:
                self._note(f"The principal {principal.name} is called {here.name} here.")
            if not added:
                # A key that was revoked here must not come back.
                self._note_missing_keys(principal)
                continue
            for key in self._export.api_keys:
                if key.principal == principal.id:
                    await keys.add_within(self._transaction, key)
        return owners

    def _note_missing_keys(self, principal: Principal) -> None:
        if any(key.principal == principal.id for key in self._export.api_keys):
            self._note(f"The API keys of {principal.name} were not imported, as the principal is here already.")

    async def _servers(self, owners: Mapping[str, str]) -> None:
        for server in self._export.servers:
            here = replace(server, owner=owners.get(server.owner, server.owner))
            if not await Servers(self._engine).add_within(self._transaction, here):
                self._note(f"There is a server {server.name} already, which stays.")

    async def _oauth_clients(self) -> Mapping[str, str]:
        """Return why the grants of some clients can't be used here, by the id of the client."""
        clients, unusable = OAuthClients(self._engine), {}
        for client in self._export.oauth_clients:
            try:
                here = await clients.add_within(self._transaction, client)
            except OAuthClientConflict as conflict:
                unusable[client.id] = f"its OAuth client can't be added here: {conflict.reason}"
                self._note(f"The OAuth client {client.provider_name} was not imported: {conflict.reason}")
                continue
            if here.status is OAuthClientStatus.REVOKED:
                unusable[client.id] = "its OAuth client is revoked here"
            elif (here.client_id, here.token_url) != (client.client_id, client.token_url):
                unusable[client.id] = "its OAuth client has another client_id or token_url here"
        return unusable

    async def _grant(self, grant: Grant, unusable: Mapping[str, str]) -> ImportedGrant:
        reason = unusable.get(grant.registration.oauth_client or "")
        if reason is not None:
            return ImportedGrant(grant, Outcome.LEFT_OUT, reason)
        account = grant.key.account
        here = await self._grants.current_within(self._transaction, account)
        if here is not None and _age(here) >= _age(grant):
            same = here.granted_at == grant.granted_at
            return ImportedGrant(here, Outcome.KEPT, "it is here already" if same else "the one that is here is newer")
        if self._once and await self._was_taken_in(grant):
            return ImportedGrant(grant, Outcome.KEPT, "it was imported before, and has ended here since")
        stored = await self._grants.add_within(self._transaction, grant)
        await self._end_flows(account)
        return ImportedGrant(stored, Outcome.IMPORTED, "" if here is None else "in place of an older one")

    async def _was_taken_in(self, grant: Grant) -> bool:
        """Return whether this login, or a newer one of the account, was taken in before; if not, remember it."""
        name, age = _login_name(grant.key.account), _age(grant)
        rows = await self._transaction.execute(_VALUE, {"name": name})
        if rows and (before := _read_age(rows[0]["value"])) is not None and before >= age:
            return True
        await self._transaction.execute(_SET, {"name": name, "value": json.dumps(age).encode()})
        return False

    async def _end_flows(self, account: Account) -> None:
        """Let the requests go on that wait for their user: the account is connected."""
        asked = account_params(account)
        rows = await self._transaction.execute(_PENDING, asked)
        for row in await intact_rows(self._engine, "flows", rows, asked):
            await change_row(self._engine, self._transaction, "flows", row, {"status": str(FlowStatus.DONE)})

    def _note(self, line: str) -> None:
        self._result.notes.append(line)


def _age(grant: Grant) -> tuple[float, float]:
    """Return what the newer one of two grants has more of; of two copies, the one that was renewed later is newer."""
    return grant.granted_at, grant.tokens.obtained_at


def _read_age(value: object) -> tuple[float, float] | None:
    """Return what ``_age`` of a login was; None if something else has written it."""
    try:
        granted_at, obtained_at = map(float, json.loads(value if isinstance(value, bytes) else b""))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    return (granted_at, obtained_at) if math.isfinite(granted_at) and math.isfinite(obtained_at) else None


def _login_name(account: Account) -> str:
    return _LOGIN_PREFIX + hashlib.sha256(json.dumps(account).encode()).hexdigest()


def _owned(account: Account, owners: Mapping[str, str]) -> Account:
    return account._replace(principal=owners.get(account.principal, account.principal))


def _name(content: bytes) -> str:
    return _PREFIX + hashlib.sha256(content).hexdigest()
