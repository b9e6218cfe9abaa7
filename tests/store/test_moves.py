"""Exports of a store, taken into another one: what goes with them, and what is here already."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.models import (
    Account,
    ApiKey,
    FlowStatus,
    Grant,
    Identity,
    MadeServer,
    OAuthClient,
    OAuthClientStatus,
    Principal,
    Role,
    Scope,
)
from mcp_auth_proxy.store import Engine, exports, imports, open_store
from mcp_auth_proxy.store.api_keys import ApiKeys
from mcp_auth_proxy.store.confirmations import Confirmations
from mcp_auth_proxy.store.engine import Row
from mcp_auth_proxy.store.exports import MOVED, Export, RefreshUnderWay, Selection
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.imports import ImportResult, Outcome
from mcp_auth_proxy.store.oauth_clients import OAuthClients
from mcp_auth_proxy.store.principals import Principals
from mcp_auth_proxy.store.registrations import Registrations
from mcp_auth_proxy.store.servers import Servers
from store.builders import NOW, flow, grant, registration, tokens

ALL = Selection()
ANNA = Principal(id="prn_anna", name="anna", role=Role.ADMIN, created_at=NOW)
HER_JWT = Identity("jwt:https://idp.example", "anna@example")
KEY = ApiKey(id="k1", principal="prn_anna", name="anna", key_hash="0" * 64, scopes=frozenset(Scope), created_at=NOW)
CLIENT = OAuthClient(
    id="oac_1",
    customer_id="default",
    provider="acme",
    provider_name="Acme",
    client_id="client",
    client_secret="canary-secret",
    authorization_url="https://as.example/authorize",
    token_url="https://as.example/token",
    created_at=NOW,
)
WIKI = MadeServer(id="srv_1", name="wiki", url="https://wiki.example/mcp", owner="prn_anna", document={"scopes": ["a"]})


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Engine]:
    """Open a SQLite store, whatever the other one is."""
    key = KeySource(kind="file", name=str(tmp_path / "there.key"))
    opened = await open_store(StoreSettings(path=tmp_path / "there.db", keys=(key,), default_key=True))
    yield opened
    await opened.close()


def of_anna(given: Grant) -> Grant:
    return replace(given, key=replace(given.key, account=given.key.account._replace(principal=ANNA.id)))


async def fill(engine: Engine) -> None:
    await Principals(engine).add(ANNA, [HER_JWT])
    await ApiKeys(engine).add(KEY)
    await OAuthClients(engine).add(CLIENT)
    await Servers(engine).add(WIKI)
    await Grants(engine).add(grant("linear"))
    mine = of_anna(grant("wiki"))
    await Grants(engine).add(replace(mine, registration=replace(mine.registration, oauth_client=CLIENT.id)))
    await Registrations(engine).save(registration("linear"))
    await Registrations(engine).bind_client("linear", "configured", "https://as.example")
    await Confirmations(engine).add(
        Account("local", "linear"), upstream="https://linear.example", issuer="i", sign_in_host="h", now=NOW
    )


def values(row: Row) -> list[object]:
    return [row[name] for name in ("uid", "access_token", "seal")]


async def take_in(engine: Engine, export: Export) -> ImportResult:
    export = exports.decode(exports.encode(export), name="f")
    result = await imports.take_in(engine, export, now=NOW)
    assert result is not None
    return result


async def test_everything_that_grants_need_goes_with_them(engine: Engine, there: Engine) -> None:
    await fill(engine)
    result = await take_in(there, await exports.copy(engine, ALL))
    assert [each.outcome for each in result.grants] == [Outcome.IMPORTED] * 2
    assert result.notes == []
    before, after = await exports.copy(engine, ALL), await exports.copy(there, ALL)
    assert replace(after, made_at=before.made_at) == before


async def test_a_store_of_either_kind_takes_it_in(engine: Engine, there: Engine) -> None:
    await fill(there)
    result = await take_in(engine, await exports.copy(there, ALL))
    assert [each.outcome for each in result.grants] == [Outcome.IMPORTED] * 2
    before, after = await exports.copy(there, ALL), await exports.copy(engine, ALL)
    assert replace(after, made_at=before.made_at) == before


async def test_what_is_imported_is_sealed_with_the_keys_of_this_store(engine: Engine, there: Engine) -> None:
    await fill(engine)
    await take_in(there, await exports.copy(engine, ALL))
    before = await engine.fetch_all("SELECT uid, access_token, seal FROM grants")
    after = await there.fetch_all("SELECT uid, access_token, seal FROM grants")
    assert not {value for row in before for value in values(row)} & {value for row in after for value in values(row)}
    assert engine.cipher.key_ids != there.cipher.key_ids


async def test_a_named_server_takes_only_what_it_needs(engine: Engine) -> None:
    await fill(engine)
    found = await exports.copy(engine, Selection([("wiki", None)]))
    assert [each.key.account.server for each in found.grants] == ["wiki"]
    assert (found.principals, found.oauth_clients, found.servers) == ((ANNA,), (CLIENT,), (WIKI,))
    assert (found.registrations, found.bindings, found.confirmations, found.api_keys) == ((), (), (), ())
    found = await exports.copy(engine, Selection([("linear", "work")]))
    assert found.grants == ()


async def test_a_move_ends_what_was_kept_and_nothing_else(engine: Engine) -> None:
    await fill(engine)
    kept: list[Export] = []
    await exports.move(engine, Selection([("linear", None)]), now=lambda: NOW + 5, place=kept.append)
    ended = {each.key.account.server: (each.ended_reason, each.ended_at) for each in await Grants(engine).all()}
    assert ended == {"linear": (MOVED, NOW + 5), "wiki": ("", None)}
    assert [each.tokens.refresh_token for each in kept[0].grants] == ["canary-refresh-1"]


async def test_a_move_that_is_not_kept_changes_nothing(engine: Engine) -> None:
    await fill(engine)

    def full(export: Export) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        await exports.move(engine, ALL, now=lambda: NOW, place=full)
    assert {each.ended_reason for each in await Grants(engine).all()} == {""}


async def test_a_grant_that_is_being_renewed_is_not_moved(engine: Engine) -> None:
    stored = await Grants(engine).add(grant())
    owner = engine.owners.new()
    await Grants(engine).begin_refresh(stored.id, version=stored.version, owner=owner, now=NOW)
    with pytest.raises(RefreshUnderWay):
        await exports.move(engine, ALL, now=lambda: NOW + 1, place=lambda export: None)
    await Grants(engine).renewed(stored.id, version=stored.version, owner=owner, tokens=tokens("2"))
    moved = await exports.move(engine, ALL, now=lambda: NOW + 1, place=lambda export: None)
    assert moved.grants[0].tokens.refresh_token == "canary-refresh-2"


async def test_the_newer_grant_stays(there: Engine) -> None:
    await Grants(there).add(grant(at=NOW, name="here"))
    for at, name, outcome in (
        (NOW - 1, "older", Outcome.KEPT),
        (NOW, "copy", Outcome.KEPT),
        (NOW + 1, "newer", Outcome.IMPORTED),
    ):
        result = await take_in(there, Export(made_at=NOW, grants=(grant(at=at, name=name),)))
        assert result.grants[0].outcome is outcome
    current = await Grants(there).current(Account("local", "linear"))
    assert current is not None
    assert current.tokens.access_token == "canary-access-newer"


async def test_of_two_copies_the_one_that_was_renewed_later_is_newer(there: Engine) -> None:
    await Grants(there).add(grant())
    renewed = replace(grant(), tokens=tokens("2", NOW + 60))
    assert (await take_in(there, Export(made_at=NOW, grants=(renewed,)))).grants[0].outcome is Outcome.IMPORTED
    assert (await take_in(there, Export(made_at=NOW, grants=(grant(),)))).grants[0].outcome is Outcome.KEPT


async def test_a_late_result_of_a_renewal_does_not_replace_an_import(there: Engine) -> None:
    before = await Grants(there).add(grant())
    owner = there.owners.new()
    await Grants(there).begin_refresh(before.id, version=before.version, owner=owner, now=NOW)
    await take_in(there, Export(made_at=NOW, grants=(grant(at=NOW + 1, name="new"),)))
    late = await Grants(there).renewed(before.id, version=before.version, owner=owner, tokens=tokens("late"))
    assert late is None


async def test_a_principal_is_known_by_an_identity(engine: Engine, there: Engine) -> None:
    await fill(engine)
    other = Principal(id="prn_other", name="Anna", created_at=NOW)
    await Principals(there).add(other, [HER_JWT])
    result = await take_in(there, await exports.copy(engine, ALL))
    assert await Grants(there).current(Account(other.id, "wiki")) is not None
    assert "The principal anna is Anna here: they have an identity in common." in result.notes
    assert [principal.id for principal in await Principals(there).all()] == [other.id]
    # Its keys may have been revoked here.
    assert await ApiKeys(there).all() == []
    made = await Servers(there).get(WIKI.id)
    assert made is not None
    assert made.owner == other.id


async def test_a_namesake_is_another_principal(engine: Engine, there: Engine) -> None:
    await fill(engine)
    await Principals(there).add(Principal(id="prn_namesake", name="anna", created_at=NOW))
    result = await take_in(there, await exports.copy(engine, ALL))
    assert "The principal anna is called anna#2 here." in result.notes
    assert await Grants(there).current(Account("prn_namesake", "wiki")) is None
    assert [key.principal for key in await ApiKeys(there).all()] == [ANNA.id]


async def test_a_key_that_was_revoked_does_not_come_back(engine: Engine, there: Engine) -> None:
    await fill(engine)
    export = await exports.copy(engine, ALL)
    await take_in(there, export)
    await ApiKeys(there).delete(KEY.id)
    assert (
        "The API keys of anna were not imported, as the principal is here already."
        in (await take_in(there, export)).notes
    )
    assert await ApiKeys(there).all() == []


async def test_a_grant_whose_client_cant_be_used_here_is_left_out(engine: Engine, there: Engine) -> None:
    await fill(engine)
    export = await exports.copy(engine, ALL)
    await OAuthClients(there).add(replace(CLIENT, id="oac_2"))
    result = await take_in(there, export)
    outcomes = {each.account.server: each.outcome for each in result.grants}
    assert outcomes == {"linear": Outcome.IMPORTED, "wiki": Outcome.LEFT_OUT}
    revoked = replace(CLIENT, status=OAuthClientStatus.REVOKED, client_secret=None, provider="other")
    await OAuthClients(there).add(revoked)
    result = await take_in(there, export)
    assert result.grants[-1].reason == "its OAuth client is revoked here"


async def test_what_is_bound_here_stays_bound(engine: Engine, there: Engine) -> None:
    await fill(engine)
    await Registrations(there).bind_client("linear", "configured", "https://other.example")
    result = await take_in(there, await exports.copy(engine, ALL))
    assert "stays bound to https://other.example" in result.notes[0]
    assert await Registrations(there).bound_issuer("linear", "configured") == "https://other.example"


async def test_whoever_waits_for_consent_is_told(there: Engine) -> None:
    await Flows(there).save(flow())
    await take_in(there, Export(made_at=NOW, grants=(grant(),)))
    found = await Flows(there).get("flow-1")
    assert found is not None
    assert found.status is FlowStatus.DONE


async def test_a_file_that_is_remembered_is_taken_in_once(there: Engine) -> None:
    export = Export(made_at=NOW, grants=(grant(),))
    assert not await imports.was_imported(there, b"sealed")
    assert await imports.take_in(there, export, now=NOW, remember=b"sealed") is not None
    assert await imports.was_imported(there, b"sealed")
    assert await imports.take_in(there, export, now=NOW, remember=b"sealed") is None
    assert not await imports.was_imported(there, b"another")


async def test_a_login_that_has_ended_here_does_not_come_back_in_another_file(there: Engine) -> None:  # T91
    first, renewed = grant(), replace(grant(), tokens=replace(grant().tokens, obtained_at=NOW + 9))

    async def outcome(found: Grant, file: bytes) -> imports.Outcome:
        result = await imports.take_in(there, Export(made_at=NOW, grants=(found,)), now=NOW, remember=file)
        assert result is not None
        return result.grants[0].outcome

    assert await outcome(first, b"first") is imports.Outcome.IMPORTED
    await Grants(there).delete(first.key.account)
    assert await outcome(first, b"second") is imports.Outcome.KEPT
    assert await Grants(there).all() == []
    assert await outcome(renewed, b"third") is imports.Outcome.IMPORTED
    await Grants(there).delete(first.key.account)
    assert (await take_in(there, Export(made_at=NOW, grants=(first,)))).grants[0].outcome is imports.Outcome.IMPORTED, (
        "somebody has asked for it"
    )


@pytest.mark.sqlite
async def test_an_import_that_fails_changes_nothing(engine: Engine, there: Engine) -> None:
    await fill(engine)
    async with there.transaction() as transaction:
        await transaction.execute(
            "CREATE TRIGGER in_the_way BEFORE INSERT ON grants WHEN new.server = 'wiki' BEGIN SELECT RAISE(IGNORE); END"
        )
    with pytest.raises(StoreUnavailable):
        await imports.take_in(there, await exports.copy(engine, ALL), now=NOW, remember=b"sealed")
    empty = await exports.copy(there, ALL)
    assert empty == Export(made_at=empty.made_at)
    assert not await imports.was_imported(there, b"sealed")
