"""The stores in ``stores/``: one of each schema so far, and their key.

Each was written by the program that introduced its schema, so that what users have on their disks is what is tested.
To add the one of a new schema, extend ``contents`` by what is new in it, and run this module once from the root of the
project, before the schema is released:

    PYTHONPATH=src:tests .venv/bin/python -m store.samples
"""

import asyncio
import base64
import json
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.models import (
    Account,
    Attempt,
    Catalog,
    DeviceAuthorization,
    Flow,
    FlowMode,
    Grant,
    Registration,
    RenewalHealth,
)
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.catalogs import Catalogs
from mcp_auth_proxy.store.codec import account_params
from mcp_auth_proxy.store.confirmations import Confirmations
from mcp_auth_proxy.store.connection_notes import StoredNote, StoredNotes
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.registrations import Registrations
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, new_uid
from mcp_auth_proxy.store.sqlite.schema import MIGRATIONS
from store.builders import NOW, attempt, flow, grant, registration, sha256, store_settings

NEWEST = len(MIGRATIONS)
OLDER = range(1, NEWEST)
ALL = range(1, NEWEST + 1)

OWNER = "elsewhere:1:a"
BINDING = ("notes", "configured", "https://as.example")
DPOP_KEY = "canary-dpop-key"
UPSTREAM = "https://linear.example"
DEVICE = DeviceAuthorization(
    device_code="canary-device", user_code="CANARY-USER", verification_uri="https://as.example/d", interval=7.0
)
WORK = Account("local", "linear", "work")
CATALOG = Catalog(
    initialize={"2025-11-25": {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}}},
    lists={"tools": [{"name": "canary-tool"}]},
    fetched_at=NOW,
)
NOTE = StoredNote(
    used_at=NOW, unreachable_since=NOW + 1, failed_at=NOW + 2, failure="It is down.", remedy="Wait.", retrying_since=NOW
)
HEALTH = RenewalHealth(
    refused_at=NOW, failing_since=NOW + 1, failure="It is down.", next_try_at=NOW + 2, rejected_since=NOW + 3
)
SESSION_ID = "canary-session"
SESSION = {
    "initialize": base64.b64encode(b"{}").decode(),
    "announced": "2025-11-25",
    "log_level": "",
    "opened": True,
    "upstream_id": "canary-upstream-session",
    "negotiated": "2025-11-25",
    "lists": ["tools"],
    "announce_lists": False,
}

_STORES = Path(__file__).parent / "stores"


@dataclass(frozen=True)
class Contents:
    """What a store holds besides ``BINDING``. The ids of the grants count from 1."""

    grants: list[Grant]
    flows: list[Flow]
    attempts: list[Attempt]
    registrations: list[Registration]
    confirmations: list[tuple[Account, str, str, str]]
    """Account, upstream, issuer, sign-in host."""
    catalogs: list[tuple[Account, str, Catalog]] = field(default_factory=list)
    """Account, upstream, catalog."""
    sessions: list[tuple[str, Account, str, dict[str, object]]] = field(default_factory=list)
    """Id, account, upstream, state."""
    notes: dict[Account, StoredNote] = field(default_factory=dict)

    @property
    def last_id(self) -> int:
        """The highest id that was ever given to a grant: that of one which was deleted again."""
        return len(self.grants) + 1


def contents(schema: int) -> Contents:
    """Return what the store of a schema holds."""
    linear = replace(grant(), id=1, refresh_begun_at=NOW, refresh_owner=OWNER)
    notes = replace(grant("notes", name="2"), id=2, ended_at=NOW + 60, ended_reason="The refresh token was revoked.")
    found = Contents([linear, notes], [flow()], [attempt("state")], [registration()], [])
    if schema >= 2:
        found.flows.append(replace(flow("flow-2", "notes"), device=DEVICE, redirect_uri=""))
    if schema >= 3:
        found.grants[0] = replace(found.grants[0], dpop_key=DPOP_KEY)
        found.flows[0] = replace(found.flows[0], dpop_key=DPOP_KEY)
    if schema >= 4:
        found.grants[0] = replace(found.grants[0], key=replace(linear.key, upstream=UPSTREAM))
        found.flows[0] = replace(found.flows[0], key=replace(found.flows[0].key, upstream=UPSTREAM))
    if schema >= 5:
        client = registration(account=WORK.name, client_id="client of work")
        work = grant(name="3")
        found.grants.append(replace(work, id=3, key=replace(work.key, account=WORK), registration=client))
        waiting = flow("flow-3")
        found.flows.append(replace(waiting, key=replace(waiting.key, account=WORK), registration=client))
        found.registrations.append(client)
    if schema >= 6:
        found.grants[0] = replace(found.grants[0], key=replace(found.grants[0].key, path="/mcp"))
        found.flows[0] = replace(found.flows[0], key=replace(found.flows[0].key, path="/mcp"))
        found.confirmations.append((WORK, UPSTREAM, "https://as.example", "login.example"))
    if schema >= 7:
        client = replace(found.grants[0].registration, oauth_client="client-1")
        found.grants[0] = replace(found.grants[0], label="me@work.example", registration=client)
        origin = "https://app.example"
        found.flows[0] = replace(found.flows[0], registration=client, mode=FlowMode.HEADLESS, return_origin=origin)
    if schema >= 8:
        found.catalogs.append((WORK, f"{UPSTREAM}/mcp", CATALOG))
        found.sessions.append((SESSION_ID, WORK, f"{UPSTREAM}/mcp", dict(SESSION)))
        found.notes[WORK] = NOTE
    if schema >= 9:
        found.grants[0] = replace(found.grants[0], health=HEALTH)
        found.grants[2] = replace(
            found.grants[2], tokens=replace(found.grants[2].tokens, refresh_expires_at=NOW + 30 * 86_400)
        )
    return found


def copy(schema: int, folder: Path) -> StoreSettings:
    """Copy the store of a schema and its key into a folder, and return the settings that open it."""
    settings = store_settings(folder)
    shutil.copyfile(_STORES / f"schema-{schema}.db", settings.path)
    shutil.copyfile(_STORES / "store.key", settings.keys[0].name)
    Path(settings.keys[0].name).chmod(0o600)
    return settings


async def write(engine: Engine, given_contents: Contents) -> None:
    """Store the contents in an empty store."""
    grants, flows, registrations = Grants(engine), Flows(engine), Registrations(engine)
    for wanted in given_contents.grants:
        given = await grants.add(wanted)
        if wanted.refresh_begun_at is not None:
            begun_at, owner = wanted.refresh_begun_at, wanted.refresh_owner
            await grants.begin_refresh(given.id, version=given.version, owner=owner, now=begun_at)
        if wanted.ended_at is not None:
            reason, ended_at = wanted.ended_reason, wanted.ended_at
            await grants.end(given.id, version=given.version, reason=reason, now=ended_at)
    await grants.add(grant("gone"))
    await grants.delete(Account("local", "gone"))
    for waiting in given_contents.flows:
        await flows.save(waiting)
    for opened in given_contents.attempts:
        await flows.add_attempt(opened)
    for client in given_contents.registrations:
        await registrations.save(client)
    await registrations.bind_client(*BINDING)
    for account, upstream, issuer, host in given_contents.confirmations:
        await Confirmations(engine).add(account, upstream=upstream, issuer=issuer, sign_in_host=host, now=NOW)
    for account, upstream, catalog in given_contents.catalogs:
        await Catalogs(engine).put(account, catalog, upstream=upstream)
    for session_id, account, upstream, state in given_contents.sessions:
        await _add_session(engine, session_id, account, upstream, state)
    await StoredNotes(engine).change({account: fields_of(note) for account, note in given_contents.notes.items()})


async def _add_session(
    engine: Engine, session_id: str, account: Account, upstream: str, state: dict[str, object]
) -> None:
    uid = new_uid()
    cipher = RowCipher(engine.cipher, "mcp_sessions", uid)
    columns: Columns = {
        "id_hash": sha256(session_id),
        **account_params(account),
        "upstream": upstream,
        "state": cipher.seal("state", json.dumps(state)),
        "created_at": NOW,
        "used_at": NOW,
    }
    values = {"uid": uid, **columns, SEAL: cipher.seal_row(columns)}
    names = ", ".join(values)
    places = ", ".join(f":{name}" for name in values)
    async with engine.transaction() as transaction:
        await transaction.execute(f"INSERT INTO mcp_sessions ({names}) VALUES ({places})", values)


def fields_of(note: StoredNote) -> dict[str, object]:
    """Return all fields of a note, as a change of it."""
    return {name: getattr(note, name) for name in StoredNote.__slots__}


async def _main() -> None:
    target = _STORES / f"schema-{NEWEST}.db"
    if target.exists():
        raise SystemExit(f"{target} exists. It stays as it was written; what is new needs a new schema.")
    with tempfile.TemporaryDirectory() as folder:
        settings = store_settings(Path(folder))
        shutil.copyfile(_STORES / "store.key", settings.keys[0].name)
        Path(settings.keys[0].name).chmod(0o600)
        engine = await open_store(settings)
        await write(engine, contents(NEWEST))
        await engine.close()
        shutil.copyfile(settings.path, target)


if __name__ == "__main__":
    asyncio.run(_main())
