"""What commands and other processes see of connections, and the warnings before one fails."""

import logging
from pathlib import Path

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent, decline
from fakes.http_exchange import FakeResponse
from fakes.proxy import link_in, running_proxy, until
from fakes.proxy_setup import ProxySetup, proxy_setup
from mcp_auth_proxy.broker import Connection, connection_records, stored_connections
from mcp_auth_proxy.broker.states import Word
from mcp_auth_proxy.cli.account import logout
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.models import LOCAL, Account
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.events import Event, Events

NOTES = Account(LOCAL, "notes")
RENEWAL_LOGGERS = ("mcp_auth_proxy.broker.renewal", "mcp_auth_proxy.observability.outages")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_records, "INTERVAL", 0.05)


async def seen(folder: Path) -> Connection:
    """Return what a command of another process sees."""
    settings = load(folder / "mcp-auth-proxy.yaml", environ={})
    database = await open_store(settings.store)
    try:
        (connection,) = await stored_connections(settings.servers, database, now=0)
        return connection
    finally:
        await database.close()


async def events(folder: Path) -> list[Event]:
    """Return the audit trail of grants, oldest first."""
    database = await open_store(load(folder / "mcp-auth-proxy.yaml", environ={}).store)
    try:
        found, _ = await Events(database).page("default", before=None, count=100)
        return [event for event in reversed(found) if event.credential == connection_records.CREDENTIAL]
    finally:
        await database.close()


async def until_seen(folder: Path, **wanted: object) -> Connection:
    """Wait, bounded, until a command sees these fields; a callable is asked about the value."""
    for _ in range(200):
        found = await seen(folder)
        if all(
            value(getattr(found, name)) if callable(value) else getattr(found, name) == value
            for name, value in wanted.items()
        ):
            return found
    raise AssertionError(f"{found} is not {wanted}")


async def actions(folder: Path, *wanted: str) -> list[Event]:
    """Wait, bounded, until the audit trail has these actions; return its events."""
    for _ in range(200):
        found = await events(folder)
        if [event.action for event in found] == list(wanted):
            return found
    raise AssertionError([event.action for event in found])


def warnings(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [line for record in caplog.records if text in (line := record.getMessage())]


async def fail_to_renew(setup: ProxySetup) -> None:
    """Let the next renewal fail, while the token works."""
    setup.issuer.answers["token"] = FakeResponse(status=503)
    setup.clock.ahead += 54
    assert (await setup.ask()).text == "x"


async def test_when_an_account_was_used_is_seen_by_commands(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        setup.clock.stop()
        await setup.connect()
        used = setup.clock()
        assert (await until_seen(tmp_path, last_used_at=used)).label == Word.CONNECTED
        setup.clock.ahead += 10
        await setup.ask()
        # Once an hour is enough, and the last use is noted at the end.
        assert (await seen(tmp_path)).last_used_at == used
    assert (await seen(tmp_path)).last_used_at == used + 10


async def test_an_unreachable_server_is_seen_until_it_is_reached(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        port = setup.upstream.local.port
        await setup.upstream.local.stop()
        assert (await setup.ask()).status == 502
        found = await until_seen(tmp_path, unreachable=True)
        assert found.label == Word.UNREACHABLE
        assert found.last_error is not None
        assert "connect" in found.last_error
        assert found.remedy is not None
        assert "Check that the server runs" in found.remedy
        upstream = await servers.mcp_server(setup.issuer, port=port)
        assert (await setup.ask()).text == "x"
        assert (await until_seen(tmp_path, unreachable=False, last_error=None)).label == Word.CONNECTED
        assert upstream.calls()


async def test_after_a_start_it_is_known_that_a_server_was_unreachable(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        port, issuer, url = setup.upstream.local.port, setup.issuer, setup.upstream.url
        await setup.upstream.local.stop()
        assert (await setup.ask()).status == 502
    assert (await seen(tmp_path)).unreachable
    await servers.mcp_server(issuer, port=port)
    async with running_proxy(tmp_path, {"notes": url}) as proxy, proxy.client("notes") as client:
        assert proxy.application.broker.journal.notes(NOTES).last_error is not None
        assert (await client.call("echo", text="y")).text == "y"
        await until_seen(tmp_path, unreachable=False, last_error=None)


async def test_an_error_of_the_server_is_seen_until_a_request_succeeds(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        setup.upstream.script("tools/call", FakeResponse.drop())
        assert (await setup.ask()).status == 502
        found = await until_seen(tmp_path, last_error=lambda error: error is not None)
        assert not found.unreachable
        assert found.last_error_at is not None
        assert (await setup.ask()).text == "x"
        await until_seen(tmp_path, last_error=None, last_error_at=None)


async def test_a_refused_authorization_is_seen_with_what_to_do(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, issuer={"auto_consent": False}) as setup:
        await decline(await setup.link())
        found = await until_seen(tmp_path, last_error=lambda error: error is not None)
        assert found.remedy == (
            "To authorize again, run `mcp-auth-proxy login notes`, or open the link that the next request gets."
        )
        assert not any(secret in str(found) for secret in setup.issuer.secrets())


async def test_a_grant_from_consent_to_its_end_leaves_events(
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        await fail_to_renew(setup)
        found = await until_seen(tmp_path, last_error=lambda error: error is not None, word=Word.RETRYING)
        assert "It is tried again by itself" in (found.remedy or "")
        (line,) = warnings(caplog, "can't be renewed now")
        assert "It is tried again at " in line
        assert "Its token ends at " in line
        setup.skip_pause()
        assert (await setup.ask()).status == 503
        setup.issuer.answers.clear()
        setup.skip_pause()
        assert (await setup.ask()).text == "x"
        found = await until_seen(tmp_path, last_error=None)
        assert (found.word, found.trouble) == ("connected", None)
        setup.issuer.end_grants()
        setup.clock.ahead += 7200
        await setup.ask()
        found = await until_seen(tmp_path, label=Word.AUTHORIZING)
        (line,) = warnings(caplog, "the grant of server notes has ended")
        assert line.endswith("or open the link that the next request gets.")
        assert found.last_error is not None
        trail = await actions(tmp_path, "grants.connect", "grants.renew", "grants.recover", "grants.end")
        assert [event.outcome for event in trail] == ["ok", "failed", "ok", "ended"]
        assert {(event.principal, event.server, event.server_name, event.target) for event in trail} == {
            (LOCAL, "notes", "notes", "default")
        }


async def test_logout_leaves_an_event_and_no_note(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        await until_seen(tmp_path, last_used_at=lambda used: used is not None)
        settings = load(tmp_path / "mcp-auth-proxy.yaml", environ={})
        assert await logout(settings, "notes", forget_client=False) == 0
        await actions(tmp_path, "grants.connect", "grants.disconnect")
        assert (await seen(tmp_path)).last_used_at is None


async def test_a_token_that_can_not_be_renewed_is_warned_of_once_before_and_once_after_its_end(
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with proxy_setup(servers, tmp_path, issuer={"refresh": False, "token_seconds": 3600.0}) as setup:
        await setup.connect()
        await until(lambda: warnings(caplog, "can't be renewed, and ends at"))
        await setup.ask()
        setup.clock.ahead += 3601
        await until(lambda: warnings(caplog, "and can't be renewed"))
        upstream = setup.upstream
    first, second = (line for line in warnings(caplog, "can't be renewed"))
    assert first.startswith("server notes: its token can't be renewed, and ends at 20")
    assert second.startswith("server notes: its token has ended at 20")
    for line in (first, second):
        assert "mcp-auth-proxy login notes" in line
    caplog.clear()
    async with running_proxy(tmp_path, {"notes": upstream.url}) as proxy, proxy.client("notes") as client:
        assert (await client.call("echo", text="y")).text == "y"
        await until(lambda: warnings(caplog, "can't be renewed, and ends at"))


async def test_each_grant_of_a_server_is_warned_of_once(
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with proxy_setup(servers, tmp_path) as setup, setup.proxy.client("notes@work") as work:
        await setup.connect()
        await consent(link_in((await work.call("echo", text="x")).message))
        assert (await work.call("echo", text="x")).text == "x"
        await fail_to_renew(setup)
        await until(lambda: warnings(caplog, "server notes: its grant can't be renewed now"))
        setup.skip_pause()
        assert (await work.call("echo", text="x")).status == 503
        (line,) = warnings(caplog, "server notes@work: its grant can't be renewed now")
        assert "Its token has ended at " in line


async def test_renewals_that_fail_every_other_time_push_no_other_event_out(
    servers: Servers, tmp_path: Path
) -> None:  # T90
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        setup.clock.stop()
        journal = setup.proxy.application.broker.journal
        for _ in range(200):
            journal.not_renewed(NOTES, "It answers 503.")
            journal.renewed(NOTES, recovered=True)
        assert len(journal.events()) == 3
        setup.clock.ahead += 3600
        journal.not_renewed(NOTES, "It answers 503.")
        await actions(tmp_path, "grants.connect", "grants.renew", "grants.recover", "grants.renew")
