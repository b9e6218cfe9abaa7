"""Compare what a process keeps in memory with the store: a few queries for thousands of grants and flows.

Only ids, versions and states are read, without opening a seal: whatever differs is then read as a whole, and checked.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from mcp_auth_proxy.models import Account, Grant
from mcp_auth_proxy.store.codec import read_grant
from mcp_auth_proxy.store.engine import Engine, Params
from mcp_auth_proxy.store.sealed_rows import decode_rows

PAGE = 500
"""Values that one query asks for. All queries of a kind have the same text, which a database prepares once."""

WHOLE_ROWS = 50
"""Accounts whose grants one query reads as a whole."""

T = TypeVar("T")


class GrantVersion(NamedTuple):
    """Which grant is in use for an account: its id, and the version that each renewal increments."""

    id: int
    version: int


async def changed_grants(engine: Engine, known: Mapping[Account, GrantVersion]) -> set[Account]:
    """Return the accounts whose grant is not the one that is known, or has ended, or is gone.

    Another grant of the same account ends the one before, so it needs no look of its own. Raises StoreUnavailable.
    """
    same = set()
    for page in _pages(sorted((grant.id, account) for account, grant in known.items())):
        for row in await engine.fetch_all(_VERSIONS, _numbered("id", [grant_id for grant_id, _ in page])):
            account = Account(row["principal"], row["server"], row["account"])
            if known.get(account) == (row["id"], row["version"]):
                same.add(account)
    return known.keys() - same


async def granted(engine: Engine, accounts: Collection[Account]) -> set[Account]:
    """Return those of the accounts that have a grant which has not ended. Raises StoreUnavailable."""
    found = set()
    for page in _pages(sorted(accounts)):
        for row in await engine.fetch_all(_GRANTED, _account_params(page)):
            found.add(Account(row["principal"], row["server"], row["account"]))
    return found


async def current_grants(engine: Engine, accounts: Collection[Account]) -> dict[Account, Grant]:
    """Return the newest grant of each account that has one which has not ended. Raises StoreUnavailable."""
    found: dict[Account, Grant] = {}
    for page in _pages(sorted(accounts), WHOLE_ROWS):
        rows = await engine.fetch_all(_CURRENT, _account_params(page, WHOLE_ROWS))
        # What the accounts are is read from the rows as they were sealed, so none can be passed off as another's.
        for grant in await decode_rows(engine, "grants", rows, {}, read_grant):
            if grant.key.account in accounts and grant.ended_at is None:
                found.setdefault(grant.key.account, grant)
    return found


async def decided_flows(engine: Engine, ids: Collection[str]) -> set[str]:
    """Return the ids of those flows that no longer wait for their user, or are gone. Raises StoreUnavailable."""
    waiting = set()
    for page in _pages(sorted(ids)):
        waiting |= {row["id"] for row in await engine.fetch_all(_WAITING, _numbered("id", page))}
    return set(ids) - waiting


def _pages(values: Sequence[T], size: int = PAGE) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _numbered(name: str, values: Sequence[object], size: int = PAGE) -> Params:
    """Return parameters for a page; one that is not full repeats its last value."""
    return {f"{name}{number}": values[min(number, len(values) - 1)] for number in range(size)}


def _account_params(page: Sequence[Account], size: int = PAGE) -> Params:
    return {
        **_numbered("principal", [account.principal for account in page], size),
        **_numbered("server", [account.server for account in page], size),
        **_numbered("account", [account.name for account in page], size),
    }


def _ids() -> str:
    return ", ".join(f":id{number}" for number in range(PAGE))


def _asked(size: int) -> str:
    rows = ", ".join(f"(:principal{number}, :server{number}, :account{number})" for number in range(size))
    return f"""
        WITH given (principal, server, account) AS (VALUES {rows}),
        asked AS (SELECT DISTINCT principal, server, account FROM given)
    """


# ruff: noqa: S608 - the statements have no values in them, only the names of parameters
_SAME = "grants.principal = asked.principal AND grants.server = asked.server AND grants.account = asked.account"
_VERSIONS = f"SELECT id, version, principal, server, account FROM grants WHERE ended_at IS NULL AND id IN ({_ids()})"
_GRANTED = f"""
    {_asked(PAGE)}
    SELECT DISTINCT asked.principal, asked.server, asked.account FROM asked JOIN grants ON {_SAME}
    WHERE grants.ended_at IS NULL
"""
_CURRENT = f"""
    {_asked(WHOLE_ROWS)}
    SELECT grants.* FROM asked JOIN grants ON {_SAME} WHERE grants.ended_at IS NULL
    ORDER BY grants.granted_at DESC, grants.id DESC
"""
_WAITING = f"SELECT id FROM flows WHERE status = 'pending' AND id IN ({_ids()})"
