"""How the renewal of a grant goes, as its users see it: requests, ``status``, the API's words, the webhook, the log."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from e2e.test_login import login
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import ABSENT, FakeResponse
from fakes.proxy import link_in, proxy_process, run_command, until, write_config
from fakes.proxy_setup import ProxySetup, ask_many, proxy_setup
from fakes.webhook_receiver import SECRET, WebhookReceiver, is_signed, webhook_receiver

NOTICED_EARLY = 54.0
"""Seconds after which a token of a minute is due for renewal, but has not expired."""


@asynccontextmanager
async def observed(servers: Servers, folder: Path, **options: Any) -> AsyncIterator[tuple[ProxySetup, WebhookReceiver]]:
    """A connected proxy, and the receiver of its webhook, which has seen that it needed consent."""
    async with (
        webhook_receiver() as hook,
        proxy_setup(servers, folder, events=hook.settings, **options) as setup,
    ):
        setup.clock.stop()
        await setup.connect()
        await hook.until("needs-consent")
        yield setup, hook


async def status(folder: Path) -> dict[str, Any]:
    """The row of ``status --json`` of another process."""
    code, out, err = await run_command("status", "--json", "--config", str(folder / "mcp-auth-proxy.yaml"))
    assert code == 0, err
    (row,) = json.loads(out)
    found: dict[str, Any] = row
    return found


async def health(folder: Path, state: str) -> dict[str, Any]:
    found = (await status(folder))["health"]
    assert list(found) == ["state", "since", "next_try", "reason"]
    assert found["state"] == state
    return {**found, **{name: found[name] and datetime.fromisoformat(found[name]) for name in ("since", "next_try")}}


def refuse(setup: ProxySetup, error: str, description: str = "") -> None:
    setup.issuer.answers["token"] = FakeResponse.json({"error": error, "error_description": description}, 400)


async def test_an_early_invalid_grant_does_not_end_a_grant_whose_token_works(
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with observed(servers, tmp_path) as (setup, hook):
        fresh = await health(tmp_path, "fresh")
        assert (fresh["next_try"], fresh["reason"]) == (None, None)
        assert abs((datetime.now(UTC) - fresh["since"]).total_seconds()) < 30
        refuse(setup, "invalid_grant", "too early")
        setup.clock.ahead += NOTICED_EARLY
        await setup.ask()
        await hook.until("needs-consent", "degraded")
        assert all(reply.text for reply in await ask_many(setup, 20)), "the token goes on"
        assert setup.issuer.refreshes == 1
        shown = await status(tmp_path)
        assert (shown["state"], shown["word"], shown["health"]["state"]) == ("connected", "degraded", "degraded")
        assert "invalid_grant" in shown["health"]["reason"]
        until_then = datetime.fromisoformat(shown["health"]["next_try"])
        assert abs(until_then - datetime.fromisoformat(shown["token_until"])).total_seconds() < 1
        (line,) = [line.message for line in caplog.records if "is degraded" in line.message]
        assert "mcp-auth-proxy login notes" in line
        code, out, _ = await run_command("status", "--config", str(tmp_path / "mcp-auth-proxy.yaml"))
        assert code == 0
        assert "run `mcp-auth-proxy login notes` before then" in out
        # Dead, and the server has changed its mind.
        setup.issuer.answers.clear()
        setup.clock.ahead += 60
        assert (await setup.ask("renewed")).text == "renewed"
        await hook.until("needs-consent", "degraded", "recovered")
        assert (setup.issuer.refreshes, setup.issuer.authorizations) == (2, 1)
        await health(tmp_path, "fresh")


async def test_an_early_invalid_grant_is_believed_once_the_token_is_dead(servers: Servers, tmp_path: Path) -> None:
    async with observed(servers, tmp_path) as (setup, hook):
        refuse(setup, "invalid_grant")
        setup.clock.ahead += NOTICED_EARLY
        await setup.ask()
        await hook.until("needs-consent", "degraded")
        setup.issuer.end_access_tokens()
        assert "/connect/" in str((await setup.ask()).message)
        assert setup.issuer.refreshes == 2
        await hook.until("needs-consent", "degraded", "ended", "needs-consent")
        ended = await health(tmp_path, "ended")
        assert "invalid_grant" in ended["reason"]
        assert ended["next_try"] is None


async def test_invalid_grant_for_a_dead_token_ends_the_grant_at_once(servers: Servers, tmp_path: Path) -> None:  # F2
    async with observed(servers, tmp_path) as (setup, hook):
        setup.issuer.end_grants()
        assert "/connect/" in str((await setup.ask()).message)
        assert setup.issuer.refreshes == 1
        await hook.until("needs-consent", "ended", "needs-consent")


async def test_a_renewal_that_fails_for_a_while_is_retried_and_recovers(servers: Servers, tmp_path: Path) -> None:  # F1
    async with observed(servers, tmp_path) as (setup, hook):
        setup.issuer.answers["token"] = FakeResponse.json({"error": "temporarily_unavailable"}, 503)
        setup.clock.ahead += NOTICED_EARLY
        await setup.ask()
        await until(lambda: setup.issuer.refreshes == 1)
        await until_health(tmp_path, "retrying")
        retrying = await health(tmp_path, "retrying")
        assert "503" in retrying["reason"]
        assert retrying["since"] < retrying["next_try"]
        setup.issuer.answers.clear()
        setup.skip_pause()
        assert (await setup.ask("renewed")).text == "renewed"
        await hook.until("needs-consent", "recovered")


async def until_health(folder: Path, state: str) -> None:
    """Wait, bounded, until ``status`` of another process shows a state."""
    for _ in range(10):
        if (await status(folder))["health"]["state"] == state:
            return
    raise AssertionError(f"it is not {state}")


@pytest.mark.parametrize("error", ["unauthorized_client", "invalid_scope", "unsupported_grant_type"])
async def test_what_only_a_person_can_mend_says_so_and_ends_after_a_day(
    servers: Servers, tmp_path: Path, error: str
) -> None:
    async with observed(servers, tmp_path) as (setup, hook):
        refuse(setup, error)
        setup.issuer.end_access_tokens()
        for _ in range(4):
            for reply in await ask_many(setup, 10):
                assert reply.status == 503
                assert error in str(reply.message)
                assert "mcp-auth-proxy login notes" in str(reply.message)
            setup.clock.ahead += 1
        assert setup.issuer.refreshes == 2, "once in three seconds, of which four have passed"
        await hook.until("needs-consent", "degraded")
        assert error in (await health(tmp_path, "degraded"))["reason"]
        _, shown, _ = await run_command("status", "--config", str(tmp_path / "mcp-auth-proxy.yaml"))
        assert shown.count("mcp-auth-proxy login notes") == 1, shown
        setup.clock.ahead += 86_400
        assert "/connect/" in str((await setup.ask()).message)
        await hook.until("needs-consent", "degraded", "ended", "needs-consent")
        assert error in (await health(tmp_path, "ended"))["reason"]


@pytest.mark.parametrize("error", ["invalid_grant", "unauthorized_client"])
async def test_login_authorizes_again_what_can_not_be_renewed(servers: Servers, tmp_path: Path, error: str) -> None:
    """As the log, ``status`` and the webhook advise: while the token works, and once requests get errors."""
    config = tmp_path / "mcp-auth-proxy.yaml"
    async with observed(servers, tmp_path) as (setup, hook):
        setup.issuer.answers["token"] = lambda received: (
            FakeResponse.json({"error": error}, 400) if received.form["grant_type"] == "refresh_token" else None
        )
        if error == "invalid_grant":
            setup.clock.ahead += NOTICED_EARLY
            await setup.ask()
        else:
            setup.issuer.end_access_tokens()
            message = str((await setup.ask()).message)
            assert "run `mcp-auth-proxy login notes`" in message
            assert "the link that the next request gets" not in message, "there is none for a day"
        await hook.until("needs-consent", "degraded")
        async with login("notes", config) as attempt:
            assert (await consent(await attempt.link())).status_code == 200
            code, out, err = await attempt.end()
        assert code == 0, err
        assert "notes is connected." in out
        setup.clock.ahead = 0
        await until_health(tmp_path, "fresh")
        # The proxy notices within a second what the command has written.
        async with asyncio.timeout(5):
            while "result" not in (reply := await setup.ask("again")).message:  # noqa: ASYNC110 - only asking tells
                await asyncio.sleep(0.05)
        assert reply.text == "again"
        assert setup.issuer.authorizations == 2


async def test_webhooks_are_signed_and_tell_no_secret(servers: Servers, tmp_path: Path) -> None:
    async with observed(servers, tmp_path) as (setup, hook):
        setup.issuer.end_grants()
        await setup.ask()
        await hook.until("needs-consent", "ended", "needs-consent")
        assert all(is_signed(received) for received in hook.log.requests)
        assert len({received.header("webhook-id") for received in hook.log.requests}) == 3
        text = "".join(received.body.decode() for received in hook.log.requests)
        assert not any(secret in text for secret in (*setup.issuer.secrets(), SECRET, "/connect/"))
        ended = hook.events[1]
        assert ended["data"].items() >= {"server": "notes", "account": "default", "owner": "local"}.items()
        assert "invalid_grant" in ended["data"]["reason"]
        assert "mcp-auth-proxy login notes" in ended["data"]["remedy"]


async def test_a_webhook_that_hangs_delays_nothing_and_is_one_line_in_the_log(
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with webhook_receiver() as hook:
        hook.answer = FakeResponse.hang()
        async with proxy_setup(servers, tmp_path, events=hook.settings) as setup:
            await asyncio.wait_for(setup.connect(), 5)
            await until(lambda: hook.types == ["needs-consent"])
            assert (await setup.ask("on")).text == "on"
            hook.answer = FakeResponse.json({}, 500)
            await hook.local.drop_connections()
            await until(lambda: len(hook.types) >= 2, "a further attempt")
            first, second = hook.log.requests[:2]
            assert first.header("webhook-id") == second.header("webhook-id")
            hook.answer = None
            await until(lambda: len(hook.types) >= 3 and "it works again" in caplog.text, "the end of the outage")
        lines = [line.message for line in caplog.records if "events.webhook" in line.message]
        assert len(lines) == 2
        assert "canary-path" not in caplog.text


async def test_a_grant_that_nobody_uses_is_kept_alive(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    server = await servers.mcp_server(issuer)
    wanted = {"wait": "0s", "keep_alive": "1s"}
    config = write_config(tmp_path, {"notes": server.url}, authorization=wanted)
    async with proxy_process(config) as proxy, proxy.client("notes") as client:
        assert (await consent(link_in((await client.call("echo", text="x")).message))).status_code == 200
        await until(lambda: issuer.refreshes >= 2, "renewals, of a grant that was never used")
        assert (await client.call("echo", text="good")).text == "good"
    # Nor is it used in another process, which knows it from the store alone.
    before = issuer.refreshes
    async with proxy_process(config):
        await until(lambda: issuer.refreshes > before, "a renewal after a start")
    assert issuer.authorizations == 1


async def test_a_refresh_token_that_lapses_soon_is_used_before_and_warned_of(
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with proxy_setup(servers, tmp_path, issuer={"token_changes": {"refresh_token_expires_in": 6}}) as setup:
        await setup.connect()
        await until(lambda: setup.issuer.refreshes == 1, "a renewal after a third of the time", timeout=15)
        shown = await health(tmp_path, "fresh")
        assert "Its refresh token lapses at" in shown["reason"]


async def test_nothing_is_kept_alive_if_that_is_off(servers: Servers, tmp_path: Path) -> None:
    changes = {"refresh_token_expires_in": 1}
    async with proxy_setup(
        servers, tmp_path, authorization={"wait": "0s", "keep_alive": "0"}, issuer={"token_changes": changes}
    ) as setup:
        await setup.connect()
        assert setup.proxy.application.broker._keep_alive.period == 0
        assert setup.issuer.refreshes == 0


@asynccontextmanager
async def with_a_hint(servers: Servers, folder: Path, seconds: float) -> AsyncIterator[ProxySetup]:
    """A connected proxy whose token ends, as nothing but its ``exp`` says, in so many seconds."""
    issuer = {"jwt_seconds": seconds, "token_changes": {"expires_in": ABSENT}}
    async with proxy_setup(servers, folder, issuer=issuer) as setup:
        setup.clock.stop()
        await setup.connect()
        yield setup


async def test_the_exp_of_a_jwt_is_a_hint_to_refresh_ahead(servers: Servers, tmp_path: Path) -> None:
    async with with_a_hint(servers, tmp_path, 60) as setup:
        assert (await status(tmp_path))["token_until"] is None, "nobody has promised an end"
        assert (await setup.ask("early")).text == "early"
        assert setup.issuer.refreshes == 0
        setup.clock.ahead += 59
        assert (await setup.ask("due")).text == "due"
        await until(lambda: setup.issuer.refreshes == 1, "a renewal ahead of exp")
        assert (await setup.ask("renewed")).text == "renewed"
        assert setup.issuer.authorizations == 1


@pytest.mark.parametrize("seconds", [60, -3600])
async def test_the_exp_of_a_jwt_is_no_reason_to_refuse(servers: Servers, tmp_path: Path, seconds: float) -> None:
    async with with_a_hint(servers, tmp_path, seconds) as setup:
        refuse(setup, "invalid_grant")
        setup.clock.ahead += 7200
        for number in range(3):
            assert (await setup.ask(str(number))).text == str(number)
        await until(lambda: setup.issuer.refreshes == (seconds > 0), "a renewal, if exp was plausible")
        assert (await setup.ask("on")).text == "on"
        await health(tmp_path, "degraded" if seconds > 0 else "fresh")
        assert setup.issuer.authorizations == 1
