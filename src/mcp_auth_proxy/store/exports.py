"""What moves from one store to another, read from the store: grants, and all that they need elsewhere.

An export is one JSON document of the values of ``models``, which ``sealed_file`` seals. Links, sessions of browsers and
what is only remembered (tools, errors) stay where they are.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import msgspec

from mcp_auth_proxy import __version__
from mcp_auth_proxy.errors import ExportRejected
from mcp_auth_proxy.models import (
    HEALTHY,
    Account,
    ApiKey,
    Grant,
    Identity,
    MadeServer,
    OAuthClient,
    Principal,
    Registration,
)
from mcp_auth_proxy.store.api_keys import ApiKeys
from mcp_auth_proxy.store.codec import read_grant
from mcp_auth_proxy.store.confirmations import Confirmation, Confirmations
from mcp_auth_proxy.store.engine import Engine, Row, Transaction
from mcp_auth_proxy.store.oauth_clients import OAuthClients
from mcp_auth_proxy.store.principals import Principals
from mcp_auth_proxy.store.registrations import ClientBinding, Registrations
from mcp_auth_proxy.store.sealed_rows import RowCipher, change_row, decode_rows
from mcp_auth_proxy.store.servers import Servers

MOVED = "moved"
"""Why a grant has ended that was exported to another store."""

_LIVE = "SELECT * FROM grants WHERE ended_at IS NULL ORDER BY granted_at, id"


class RefreshUnderWay(Exception):
    """A grant that is to be moved is being renewed: its tokens are about to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What is exported. ``identities`` are pairs of a principal's id and one of its identities."""

    made_at: float
    made_by: str = __version__
    grants: tuple[Grant, ...] = ()
    registrations: tuple[Registration, ...] = field(default=(), repr=False)
    bindings: tuple[ClientBinding, ...] = ()
    oauth_clients: tuple[OAuthClient, ...] = ()
    confirmations: tuple[Confirmation, ...] = ()
    servers: tuple[MadeServer, ...] = ()
    principals: tuple[Principal, ...] = ()
    identities: tuple[tuple[str, Identity], ...] = ()
    api_keys: tuple[ApiKey, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which accounts are exported: those of a server, or one name of its accounts. Empty: everything."""

    accounts: Collection[tuple[str, str | None]] = ()

    def __contains__(self, account: Account) -> bool:
        places = ((account.server, None), (account.server, account.name))
        return not self.accounts or any(place in self.accounts for place in places)

    def has_server(self, name: str) -> bool:
        """Return whether anything of a server is exported."""
        return not self.accounts or any(server == name for server, _ in self.accounts)


def encode(export: Export) -> bytes:
    """Return an export as bytes."""
    return msgspec.json.encode(export)


def decode(content: bytes, *, name: str) -> Export:
    """Read an export. ``name`` is that of its file, for errors. Raises ExportRejected."""
    try:
        return msgspec.json.decode(content, type=Export)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        # Without the text of the error, which may contain a value.
        raise ExportRejected(f"{name} has content that this program can't read: it may be from a newer one.") from None


async def copy(engine: Engine, selection: Selection) -> Export:
    """Return an export of the store as it is. Nothing is written. Raises StoreError."""
    rows = await engine.fetch_all(_LIVE)
    grants = [grant for _, grant in await _selected(engine, rows, selection)]
    return _with_the_rest(selection, grants, await _rest(engine))


async def move(
    engine: Engine, selection: Selection, *, now: Callable[[], float], place: Callable[[Export], None]
) -> Export:
    """Export, and end the grants here for the reason MOVED, in one transaction; return what was exported.

    ``place`` keeps the export durably. If it raises, nothing has changed. No process can renew a grant between its
    reading and its end. Raises RefreshUnderWay, and StoreError.
    """
    rest = await _rest(engine)
    async with engine.transaction() as transaction:
        selected = await _selected(engine, await transaction.execute(_LIVE), selection)
        for row, _ in selected:
            holder, begun_at = row["refresh_owner"], row["refresh_begun_at"]
            if not engine.owners.may_refresh(holder, begun_at, owner="", now=now(), needed=True):
                raise RefreshUnderWay
        export = _with_the_rest(selection, [grant for _, grant in selected], rest)
        place(export)
        for row, _ in selected:
            await _end(engine, transaction, row, now())
    return export


async def _selected(engine: Engine, rows: list[Row], selection: Selection) -> list[tuple[Row, Grant]]:
    def read(row: Row, cipher: RowCipher) -> tuple[Row, Grant]:
        # An id is that of a row here; who renews it, and how that goes, is of no use elsewhere.
        found = read_grant(row, cipher)
        return row, replace(found, id=0, refresh_begun_at=None, refresh_owner="", health=HEALTHY)

    found = await decode_rows(engine, "grants", rows, {}, read)
    return [(row, grant) for row, grant in found if grant.key.account in selection]


async def _end(engine: Engine, transaction: Transaction, row: Row, now: float) -> None:
    changes = {"ended_at": now, "ended_reason": MOVED, "refresh_begun_at": None, "refresh_owner": ""}
    await change_row(engine, transaction, "grants", row, changes)


async def _rest(engine: Engine) -> Export:
    """Return an export of everything but the grants."""
    principals = Principals(engine)
    registrations = Registrations(engine)
    return Export(
        made_at=time.time(),
        registrations=tuple(await registrations.all()),
        bindings=tuple(await registrations.bindings()),
        oauth_clients=tuple(await OAuthClients(engine).all()),
        confirmations=tuple(await Confirmations(engine).all()),
        servers=tuple(await Servers(engine).all()),
        principals=tuple(await principals.all()),
        identities=tuple(await principals.all_identities()),
        api_keys=tuple(await ApiKeys(engine).all()),
    )


def _with_the_rest(selection: Selection, grants: list[Grant], rest: Export) -> Export:
    """Return an export of these grants, with what is selected of the rest.

    If servers are named, only what their grants need goes with them, and no API key.
    """
    if not selection.accounts:
        return replace(rest, grants=tuple(grants))
    owners = {grant.key.account.principal for grant in grants}
    clients = {grant.registration.oauth_client for grant in grants}
    servers = tuple(server for server in rest.servers if selection.has_server(server.name))
    owners |= {server.owner for server in servers}
    return replace(
        rest,
        grants=tuple(grants),
        registrations=tuple(each for each in rest.registrations if selection.has_server(each.server)),
        bindings=tuple(each for each in rest.bindings if selection.has_server(each.server)),
        oauth_clients=tuple(client for client in rest.oauth_clients if client.id in clients),
        confirmations=tuple(each for each in rest.confirmations if each.account in selection),
        servers=servers,
        principals=tuple(principal for principal in rest.principals if principal.id in owners),
        identities=tuple(pair for pair in rest.identities if pair[0] in owners),
        api_keys=(),
    )
