"""The principals, and the identities by which credentials are told to be theirs."""

import secrets
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mcp_auth_proxy.errors import LastAdmin, NameTaken, excerpt
from mcp_auth_proxy.models import Identity, Principal, PrincipalStatus, Role
from mcp_auth_proxy.store.engine import Engine, Row, Transaction
from mcp_auth_proxy.store.sealed_rows import (
    SEAL,
    Columns,
    RowCipher,
    SealedTable,
    change_row,
    decode_rows,
    intact_rows,
    new_uid,
)

_PRINCIPALS = "principals"
_IDENTITIES = "identities"
_BY_ID = "SELECT * FROM principals WHERE id = :id"
_BY_NAME = "SELECT * FROM principals WHERE name = :name"
_OTHER_ADMINS = """
    SELECT * FROM principals WHERE project_id = :project_id AND role = 'admin' AND status = 'active' AND id <> :id
"""
_ADD = """
    INSERT INTO principals (uid, id, project_id, name, role, status, listed, created_at, seal)
    VALUES (:uid, :id, :project_id, :name, :role, :status, :listed, :created_at, :seal)
"""
_END_SESSIONS = "DELETE FROM sessions WHERE principal = :principal"
_BY_IDENTITY = "SELECT * FROM identities WHERE source = :source AND subject = :subject"
_IDENTITIES_OF = "SELECT * FROM identities WHERE principal = :principal ORDER BY source, subject"
_ALL_IDENTITIES = "SELECT * FROM identities ORDER BY source, subject"
# A row that was changed in the store counts as missing, and is replaced.
_ADD_IDENTITY = """
    INSERT INTO identities (uid, source, subject, principal, created_at, seal)
    VALUES (:uid, :source, :subject, :principal, :created_at, :seal)
    ON CONFLICT (source, subject) DO UPDATE SET
        uid = excluded.uid, principal = excluded.principal, created_at = excluded.created_at, seal = excluded.seal
"""


def new_principal_id() -> str:
    """Return an id for a principal that is about to be added."""
    return f"prn_{secrets.token_hex(12)}"


class Principals:
    """The principals in the store. Every method raises StoreUnavailable if the store can't be used now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def get(self, principal_id: str) -> Principal | None:
        """Return the principal with an id, or None."""
        asked = {"id": principal_id}
        return await self._one(await self._engine.fetch_all(_BY_ID, asked), asked)

    async def by_name(self, name: str) -> Principal | None:
        """Return the principal with a name, or None."""
        asked = {"name": name}
        return await self._one(await self._engine.fetch_all(_BY_NAME, asked), asked)

    async def by_identity(self, identity: Identity) -> Principal | None:
        """Return the principal that an identity belongs to, or None."""
        asked: Columns = identity._asdict()
        rows = await intact_rows(self._engine, _IDENTITIES, await self._engine.fetch_all(_BY_IDENTITY, asked), asked)
        return await self.get(rows[0]["principal"]) if rows else None

    async def identities(self, principal_id: str) -> list[Identity]:
        """Return the identities of a principal; API keys are not among them."""
        asked: Columns = {"principal": principal_id}
        rows = await self._engine.fetch_all(_IDENTITIES_OF, asked)
        return await decode_rows(self._engine, _IDENTITIES, rows, asked, _read_identity)

    async def all_identities(self) -> list[tuple[str, Identity]]:
        """Return all identities with the ids of their principals."""
        rows = await self._engine.fetch_all(_ALL_IDENTITIES)
        return await decode_rows(
            self._engine, _IDENTITIES, rows, {}, lambda row, cipher: (row["principal"], _read_identity(row, cipher))
        )

    def table(self) -> SealedTable[Principal]:
        """Return a reader of all principals."""
        return SealedTable(self._engine, _PRINCIPALS, _read_principal)

    async def all(self) -> list[Principal]:
        """Return all principals, by name."""
        return sorted(await self.table().all(), key=lambda principal: principal.name)

    async def add(self, principal: Principal, identities: Iterable[Identity] = ()) -> None:
        """Store a new principal with its identities. Raises NameTaken if its name or one of them is another's."""
        async with self._engine.transaction() as transaction:
            for row in await transaction.execute(_BY_NAME, {"name": principal.name}):
                raise _name_taken(principal.name, row["id"])
            await self._insert(transaction, principal)
            for identity in identities:
                await self._add_identity(transaction, identity, principal.id, now=principal.created_at)

    async def add_within(
        self, transaction: Transaction, principal: Principal, identities: Sequence[Identity]
    ) -> tuple[Principal, bool]:
        """Store a principal within a transaction, unless it is here by its id or by one of its identities.

        Return the one that is here then, and whether it was added. A new one keeps its id. If its name is another's,
        it gets a number.
        """
        found = await self._one(await transaction.execute(_BY_ID, {"id": principal.id}), {"id": principal.id})
        for identity in () if found is not None else identities:
            asked: Columns = identity._asdict()
            rows = await transaction.execute(_BY_IDENTITY, asked)
            for row in await intact_rows(self._engine, _IDENTITIES, rows, asked):
                by_id = {"id": row["principal"]}
                found = found or await self._one(await transaction.execute(_BY_ID, by_id), by_id)
        if found is not None:
            return found, False
        principal = replace(principal, name=await _free_name(transaction, [principal.name]))
        await self._insert(transaction, principal)
        for identity in identities:
            await self._add_identity(transaction, identity, principal.id, now=principal.created_at)
        return principal, True

    async def add_identity(self, principal_id: str, identity: Identity, *, now: float) -> None:
        """Give a principal another identity. Raises NameTaken if it is another principal's."""
        async with self._engine.transaction() as transaction:
            await self._add_identity(transaction, identity, principal_id, now=now)

    async def provision(self, identity: Identity, names: Sequence[str], *, role: Role, now: float) -> Principal:
        """Return the principal that an identity belongs to; add one that is not listed if there is none.

        It gets the first of ``names`` that is free, or the last one with a number. Nobody else's identity is given to
        it, whatever it is called.
        """
        asked: Columns = identity._asdict()
        async with self._engine.transaction() as transaction:
            rows = await transaction.execute(_BY_IDENTITY, asked)
            for row in await intact_rows(self._engine, _IDENTITIES, rows, asked):
                found = {"id": row["principal"]}
                existing = await self._one(await transaction.execute(_BY_ID, found), found)
                if existing is not None:
                    return existing
            name = await _free_name(transaction, names)
            principal = Principal(id=new_principal_id(), name=name, role=role, listed=False, created_at=now)
            await self._insert(transaction, principal)
            await self._write_identity(transaction, identity, principal.id, now=now)
        return principal

    async def change(
        self,
        principal_id: str,
        *,
        role: Role | None = None,
        status: PrincipalStatus | None = None,
        listed: bool | None = None,
        keep_admin: bool = False,
    ) -> Principal | None:
        """Change what is given of a principal, and return it as it is now; None if there is none with this id.

        If it is disabled, its sessions end for good. ``keep_admin``: raise LastAdmin if its project would have no
        active admin any more.
        """
        given = {"role": role, "status": status, "listed": None if listed is None else int(listed)}
        changes = {name: value for name, value in given.items() if value is not None}
        asked = {"id": principal_id}
        async with self._engine.transaction() as transaction:
            rows = await transaction.execute(_BY_ID, asked)
            ends = status is PrincipalStatus.DISABLED or role is Role.MEMBER
            if keep_admin and ends and (principal := await self._one(rows, asked)) is not None:
                await self._require_other_admin(transaction, principal)
            if status is PrincipalStatus.DISABLED:
                await transaction.execute(_END_SESSIONS, {"principal": principal_id})
            for row in await intact_rows(self._engine, _PRINCIPALS, rows, asked):
                if any(row[name] != value for name, value in changes.items()):
                    await change_row(self._engine, transaction, _PRINCIPALS, row, changes)
            return await self._one(await transaction.execute(_BY_ID, asked), asked)

    async def _require_other_admin(self, transaction: Transaction, principal: Principal) -> None:
        """Raise LastAdmin if a principal is the last active admin of its project."""
        if principal.role is not Role.ADMIN or not principal.is_active:
            return
        rows = await transaction.execute(_OTHER_ADMINS, {"project_id": principal.project_id, "id": principal.id})
        if not await intact_rows(self._engine, _PRINCIPALS, rows, {"project_id": principal.project_id}):
            raise LastAdmin(
                f"{excerpt(principal.name)} is the last admin of the project {excerpt(principal.project_id)}: make "
                f"another one first."
            )

    async def _one(self, rows: list[Row], asked: Columns | dict[str, str]) -> Principal | None:
        return next(iter(await decode_rows(self._engine, _PRINCIPALS, rows, asked, _read_principal)), None)

    async def _insert(self, transaction: Transaction, principal: Principal) -> None:
        uid, columns = new_uid(), _principal_columns(principal)
        seal = RowCipher(self._engine.cipher, _PRINCIPALS, uid).seal_row(columns)
        await transaction.execute(_ADD, {"uid": uid, **columns, SEAL: seal})

    async def _add_identity(
        self, transaction: Transaction, identity: Identity, principal_id: str, *, now: float
    ) -> None:
        asked: Columns = identity._asdict()
        rows = await transaction.execute(_BY_IDENTITY, asked)
        for row in await intact_rows(self._engine, _IDENTITIES, rows, asked):
            if row["principal"] != principal_id:
                shown = excerpt(f"{identity.source}={identity.subject}")
                raise NameTaken(f"The identity {shown} belongs to another principal already.", row["principal"])
        await self._write_identity(transaction, identity, principal_id, now=now)

    async def _write_identity(
        self, transaction: Transaction, identity: Identity, principal_id: str, *, now: float
    ) -> None:
        uid = new_uid()
        columns: Columns = {**identity._asdict(), "principal": principal_id, "created_at": now}
        seal = RowCipher(self._engine.cipher, _IDENTITIES, uid).seal_row(columns)
        await transaction.execute(_ADD_IDENTITY, {"uid": uid, **columns, SEAL: seal})


async def _free_name(transaction: Transaction, names: Sequence[str]) -> str:
    # Rows that were changed in the store count too: no name may be given twice.
    for name in names:
        if not await transaction.execute(_BY_NAME, {"name": name}):
            return name
    number = 2
    while await transaction.execute(_BY_NAME, {"name": f"{names[-1]}#{number}"}):
        number += 1
    return f"{names[-1]}#{number}"


def _name_taken(name: str, existing_id: str) -> NameTaken:
    return NameTaken(f"There is a principal {excerpt(name)!r} already.", existing_id)


def _principal_columns(principal: Principal) -> Columns:
    return {
        "id": principal.id,
        "project_id": principal.project_id,
        "name": principal.name,
        "role": str(principal.role),
        "status": str(principal.status),
        "listed": int(principal.listed),
        "created_at": principal.created_at,
    }


def _read_principal(row: Row, _: RowCipher) -> Principal:
    return Principal(
        id=row["id"],
        # The same few in thousands of rows.
        project_id=sys.intern(row["project_id"]),
        name=row["name"],
        role=Role(row["role"]),
        status=PrincipalStatus(row["status"]),
        listed=bool(row["listed"]),
        created_at=row["created_at"],
    )


def _read_identity(row: Row, _: RowCipher) -> Identity:
    return Identity(row["source"], row["subject"])
