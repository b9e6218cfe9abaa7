"""What the store says about an authorization that was needed and that nobody has given."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcp_auth_proxy.broker import Connection, ConnectionState, stored_connections, stored_servers
from mcp_auth_proxy.config.settings import AccountSettings, ServerSettings
from mcp_auth_proxy.models import LOCAL, Account, Flow, FlowStatus, Grant
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grants import Grants
from store.builders import NOW, flow, grant, store_settings

URL = "https://linear.example/mcp"
EXPIRED = NOW + 601


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = await open_store(store_settings(tmp_path))
    yield engine
    await engine.close()


async def shown(database: Engine, now: float = EXPIRED) -> Connection:
    servers = {"linear": ServerSettings(name="linear", url=URL)}
    (connection,) = await stored_connections(servers, database, now=now)
    return connection


def asked(*scopes: str, at: float = NOW) -> Flow:
    pending = flow(at=at)
    key = replace(pending.key, resource=URL, upstream="https://linear.example", path="/mcp")
    return replace(pending, key=key, scopes=scopes or pending.scopes)


def granted(at: float, *, renewed_at: float | None = None, refresh_token: str | None = "r") -> Grant:
    held = grant(at=at)
    tokens = replace(held.tokens, obtained_at=renewed_at or at, refresh_token=refresh_token)
    return replace(held, tokens=tokens)


async def test_an_expired_link_is_not_shown_but_authorization_is_still_needed(database: Engine) -> None:
    await Flows(database).save(asked())
    waiting, later = await shown(database, NOW), await shown(database)
    assert (waiting.needs_authorization, waiting.link != "") == (True, True)
    assert (later.needs_authorization, later.link, later.authorizing) == (True, "", False)


async def test_a_link_that_waits_is_shown_although_a_later_authorization_has_failed(database: Engine) -> None:
    await Flows(database).save(asked())
    await Flows(database).save(replace(asked(at=NOW + 1), id="later"))
    await Flows(database).finish("later", FlowStatus.FAILED, "The user declined.")
    assert (await shown(database, NOW + 2)).link.endswith("flow=flow-1")
    assert (await shown(database)).failure == "The user declined."


@pytest.mark.parametrize("at", [NOW - 60, NOW + 60])
async def test_a_later_grant_answers_what_was_asked(database: Engine, at: float) -> None:
    await Flows(database).save(asked())
    await Grants(database).add(granted(at))
    assert (await shown(database)).needs_authorization is (at < NOW)


async def test_a_grant_that_was_renewed_since_was_not_refused(database: Engine) -> None:
    await Flows(database).save(asked())
    await Grants(database).add(granted(NOW - 60, renewed_at=NOW + 60))
    assert (await shown(database, NOW + 61)).link
    assert not (await shown(database)).needs_authorization


async def test_the_scopes_that_a_grant_lacks_are_named(database: Engine) -> None:
    await Flows(database).save(asked("read", "admin"))
    await Grants(database).add(granted(NOW - 60))
    connection = await shown(database)
    assert (connection.state, connection.asked_scopes) == (ConnectionState.CONNECTED, ("admin",))


async def test_a_grant_that_has_ended_needs_no_more_scopes_but_all(database: Engine) -> None:
    added = await Grants(database).add(granted(NOW - 60))
    await Grants(database).end(added.id, version=added.version, reason="invalid_grant", now=NOW - 1)
    await Flows(database).save(asked("read", "admin"))
    connection = await shown(database)
    assert (connection.state, connection.needs_authorization) == (ConnectionState.ENDED, True)
    assert connection.asked_scopes == ()


async def test_an_expired_token_needs_authorization_unless_it_can_be_renewed(database: Engine) -> None:
    await Grants(database).add(granted(NOW, refresh_token=None))
    assert not (await shown(database, NOW + 3599)).needs_authorization
    assert (await shown(database, NOW + 3600)).needs_authorization
    await Grants(database).add(granted(NOW + 1))
    assert not (await shown(database, NOW + 3601)).needs_authorization


async def test_a_logout_needs_nothing(database: Engine) -> None:
    await Flows(database).save(asked())
    await Flows(database).cancel(asked().key.account)
    assert not (await shown(database)).needs_authorization
    assert await stored_servers(database) == {}


async def test_a_server_without_a_configuration_is_known_by_its_expired_flow(database: Engine) -> None:
    await Flows(database).save(asked())
    (server,) = (await stored_servers(database)).values()
    assert (server.name, server.command_name) == ("linear", URL)


async def listed(database: Engine, servers: dict[str, ServerSettings], **wanted: Any) -> list[Account]:
    return [each.account for each in await stored_connections(servers, database, now=NOW, **wanted)]


async def test_the_accounts_of_one_owner_or_of_everybody_are_listed(database: Engine) -> None:
    linear = ServerSettings(name="linear", url=URL, accounts={"home": AccountSettings()})
    team = ServerSettings(name="team", url=URL, grant_owner="shared")
    servers = {"linear": linear, "team": team}
    work, hers = Account(LOCAL, "linear", "work"), Account("prn_1", "linear")
    home, shared = Account(LOCAL, "linear", "home"), Account("project:default", "team")
    assert await listed(database, servers) == [Account(LOCAL, "linear"), home, Account(LOCAL, "team")]
    assert await listed(database, servers, owner_of=None) == [Account("", "linear"), shared]
    for account in (work, hers):
        key = replace(grant().key, account=account)
        await Grants(database).add(replace(grant(), key=key))
    waiting = asked()
    await Flows(database).save(replace(waiting, key=replace(waiting.key, account=shared)))
    assert await listed(database, servers) == [home, work, Account(LOCAL, "team")]
    assert await listed(database, servers, owner_of=None) == [work, hers, shared]
    assert await listed(database, servers, owner_of=lambda server: "prn_1", account="work") == [
        Account("prn_1", "linear", "work"),
        Account("prn_1", "team", "work"),
    ]
