"""Somebody with write access to the store, but without its key, changes where secrets go (T80)."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import Browser, consent
from fakes.mcp_client import PlainClient
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import ProxyProcess, link_in, proxy_process, run_command, until, write_config
from mcp_auth_proxy.broker.attempts import digest

UNHELD = {"wait": "0s"}
SKIPPED = "store: a row of"


@dataclass
class Place:
    """Two servers with authorization servers of their own, one of which belongs to the attacker, and the store."""

    folder: Path
    config: Path
    issuer: FakeAuthorizationServer
    notes: FakeMcpServer
    evil_issuer: FakeAuthorizationServer
    evil: FakeMcpServer

    def change(self, sql: str, **values: object) -> None:
        """Write to the store as another program would, which does not know the key."""
        with closing(sqlite3.connect(self.folder / "proxy.db")) as connection, connection:
            assert connection.execute(sql, values).rowcount > 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[tuple[ProxyProcess, PlainClient]]:
        async with proxy_process(self.config) as proxy, proxy.client("notes") as client:
            yield proxy, client


@pytest.fixture
async def place(servers: Servers, tmp_path: Path) -> Place:
    issuer, evil_issuer = [await servers.authorization_server(auto_consent=True) for _ in range(2)]
    notes, evil = await servers.mcp_server(issuer), await servers.mcp_server(evil_issuer, checks_audience=False)
    config = write_config(tmp_path, {"notes": notes.url, "evil": evil.url}, authorization=UNHELD, listen="127.0.0.1:0")
    return Place(tmp_path, config, issuer, notes, evil_issuer, evil)


async def log_in(client: PlainClient) -> None:
    page = await consent(link_in((await client.call("echo")).message))
    assert page.status_code == 200, page.text
    assert (await client.call("echo", text="in")).text == "in"


async def other_link(client: PlainClient, link: str) -> None:
    """Wait, bounded, until the proxy has noticed that the flow of a link is gone."""
    for _ in range(100):
        if link_in((await client.call("echo")).message) != link:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the link is still given out")


def evil_endpoints(place: Place) -> dict[str, str]:
    metadata = place.evil_issuer.metadata()
    return {name: str(metadata[name]) for name in ("token_endpoint", "authorization_endpoint", "revocation_endpoint")}


def assert_nothing_stolen(place: Place) -> None:
    """The attacker has seen none of the secrets that the honest authorization server has issued."""
    secrets = place.issuer.secrets()
    assert secrets
    for received in (*place.evil_issuer.requests, *place.evil.requests):
        text = f"{received.path} {received.query_string} {received.headers} {received.body!r}"
        assert [secret for secret in secrets if secret in text] == []


async def asked_once(proxy: ProxyProcess, client: PlainClient, place: Place) -> None:
    """The user is asked again, and then everything works; one line of the log says why."""
    await log_in(client)
    assert proxy.log.count(SKIPPED) == 1, proxy.log
    (line,) = [line for line in proxy.log.splitlines() if SKIPPED in line]
    assert "has changed it" in line
    assert_nothing_stolen(place)


@pytest.mark.parametrize(
    "column", ["token_endpoint", "revocation_endpoint", "authorization_endpoint", "issuer", "client_auth", "client_id"]
)
async def test_a_changed_grant_is_not_used_after_a_restart(place: Place, column: str) -> None:  # T80
    async with place.serving() as (_, client):
        await log_in(client)
    value = {**evil_endpoints(place), "issuer": place.evil_issuer.issuer, "client_auth": "client_secret_post"}
    place.change(f"UPDATE grants SET {column} = :it", it=value.get(column, "evil"))
    place.issuer.end_access_tokens()
    async with place.serving() as (proxy, client):
        await asked_once(proxy, client, place)
    assert place.issuer.refreshes == 0


def send_refreshes_to_evil(place: Place) -> None:
    place.change("UPDATE grants SET token_endpoint = :it", it=evil_endpoints(place)["token_endpoint"])


async def test_a_grant_that_is_changed_while_the_proxy_runs_is_not_used(place: Place) -> None:  # T80
    async with place.serving() as (proxy, client):
        await log_in(client)
        send_refreshes_to_evil(place)
        place.issuer.end_access_tokens()
        await asked_once(proxy, client, place)
    assert place.issuer.refreshes == 0


async def test_a_grant_that_is_changed_while_the_proxy_runs_is_dropped_by_itself(place: Place) -> None:  # T80
    async with place.serving() as (proxy, client):
        await log_in(client)
        send_refreshes_to_evil(place)
        await until(lambda: SKIPPED in proxy.log)
        await asked_once(proxy, client, place)


@pytest.mark.parametrize("running", [False, True], ids=["restarted", "running"])
async def test_a_grant_that_was_given_to_another_server_brings_no_token_there(  # T80
    place: Place, *, running: bool
) -> None:
    def give_away() -> None:
        origin = place.evil.origin
        place.change(
            "UPDATE grants SET server = 'evil', upstream = :origin, path = '/mcp', resource = :url",
            origin=origin,
            url=place.evil.url,
        )

    async with place.serving() as (proxy, client):
        await log_in(client)
        if running:
            async with proxy.client("evil") as other:
                assert "/connect/" in str((await other.call("echo")).message)
                give_away()
                await until(lambda: SKIPPED in proxy.log)
                assert "/connect/" in str((await other.call("echo")).message)
                await asked_once(proxy, client, place)
    if not running:
        give_away()
        async with place.serving() as (proxy, client), proxy.client("evil") as other:
            assert "/connect/" in str((await other.call("echo")).message)
            await asked_once(proxy, client, place)
    assert set(place.evil.bearers) == {None}


async def test_logging_out_sends_nothing_to_a_changed_address(place: Place) -> None:  # T80
    async with place.serving() as (_, client):
        await log_in(client)
    place.change("UPDATE grants SET revocation_endpoint = :it", it=evil_endpoints(place)["revocation_endpoint"])
    code, out, _ = await run_command("status", "--config", str(place.config))
    assert (code, "connected" in out.replace("not connected", "")) == (0, False)
    code, _, _ = await run_command("logout", "notes", "--config", str(place.config))
    assert code == 0
    assert place.evil_issuer.requests == []


@pytest.mark.parametrize("column", ["token_endpoint", "client_id", "iss_supported", "status", "expires_at"])
async def test_a_changed_flow_leads_nowhere(place: Place, column: str) -> None:  # T80
    values = {"token_endpoint": evil_endpoints(place)["token_endpoint"], "iss_supported": 0, "expires_at": 9e9}
    async with place.serving() as (proxy, client), Browser() as browser:
        link = link_in((await client.call("echo")).message)
        callback = await browser.stop_before(link)
        place.change(f"UPDATE flows SET {column} = :it", it=values.get(column, "done"))
        assert (await browser.follow(callback)).status_code == 400
        assert place.issuer.token_requests() == 0
        assert place.evil_issuer.requests == []
        await other_link(client, link)
        await asked_once(proxy, client, place)


async def test_an_attempt_cannot_be_given_to_another_browser(place: Place) -> None:  # T80
    async with place.serving() as (proxy, client), Browser() as victim, Browser() as attacker:
        callback = await victim.stop_before(link_in((await client.call("echo")).message))
        (name,) = [cookie.name for cookie in victim.client.cookies.jar]
        attacker.client.cookies.set(name, "evil", domain="127.0.0.1")
        place.change("UPDATE attempts SET browser_hash = :it", it=digest("evil"))
        assert (await attacker.follow(callback)).status_code == 400
        assert place.issuer.token_requests() == 0
        await asked_once(proxy, client, place)


async def test_a_changed_registration_is_made_again(place: Place) -> None:  # T80
    async with place.serving() as (proxy, client):
        link = link_in((await client.call("echo")).message)
        code, _, _ = await run_command("logout", "notes", "--config", str(place.config))
        assert code == 0
        place.change("UPDATE registrations SET client_id = 'evil'")
        await other_link(client, link)
        await asked_once(proxy, client, place)
    assert place.issuer.registrations == 2
    assert not place.issuer.seen("token", client_id="evil")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("server", "CAST(x'ff' AS TEXT)"),
        ("uid", "CAST(x'ff' AS TEXT)"),
        ("issuer", "x'00ff'"),
        ("seal", "17"),
        ("granted_at", "''"),
        ("principal", "hex(zeroblob(1000000))"),
        ("uid", "hex(zeroblob(1000000))"),
    ],
)
async def test_the_proxy_starts_whatever_is_in_a_row(place: Place, column: str, value: str) -> None:  # T80
    async with place.serving() as (_, client):
        await log_in(client)
    place.change(f"UPDATE grants SET {column} = {value}")
    async with place.serving() as (proxy, client):
        await log_in(client)
        assert proxy.log.count(SKIPPED) == 1, proxy.log
        assert max(len(line) for line in proxy.log.splitlines()) < 4096
