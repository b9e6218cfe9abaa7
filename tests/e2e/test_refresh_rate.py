"""``limits.refresh_rate``: what the authorization server sees of many tokens that are renewed, and what clients see."""

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import FakeResponse, RecordedRequest
from fakes.mcp_client import McpResponse
from fakes.proxy import ProxyProcess, RunningProxy, link_in, proxy_process, running_proxy, until, write_config
from fakes.unattended import unattended
from mcp_auth_proxy.broker import refresh_rate, renewal_lease

from .test_reload import hangup, rewrite

LATE = 0.05
"""Seconds by which a request may arrive later than it was sent."""


def times_of_requests(issuer: FakeAuthorizationServer) -> list[float]:
    """Return a list that gets the time of each token request."""
    times: list[float] = []

    def note(received: RecordedRequest) -> None:
        times.append(time.monotonic())

    issuer.answers["token"] = note
    return times


def most_in_a_second(times: list[float]) -> int:
    """Return how many arrived in one second, at most. Some may have arrived later than they were sent."""
    return max(sum(start <= at < start + 1 - LATE for at in times) for start in times)


async def many(servers: Servers, folder: Path, count: int) -> tuple[FakeAuthorizationServer, dict[str, Any]]:
    """Return an issuer, and the configuration of many servers at it that need no user."""
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    return issuer, {f"s{number}": unattended(issuer, upstream.url, folder) for number in range(count)}


async def call(proxy: RunningProxy | ProxyProcess, name: str) -> McpResponse:
    async with proxy.client(name) as client:
        return await client.call("echo", text=name)


async def test_two_processes_on_one_store_keep_to_the_rate_together(servers: Servers, tmp_path: Path) -> None:
    issuer, configured = await many(servers, tmp_path, 10)
    times = times_of_requests(issuer)
    config = write_config(tmp_path, configured)
    async with proxy_process(config) as one, proxy_process(config) as two:
        replies = await asyncio.gather(*(call(proxy, name) for name in configured for proxy in (one, two)))
        assert [reply.text for reply in replies] == [name for name in configured for _ in "ab"]
        issuer.end_access_tokens()
        replies = await asyncio.gather(*(call(proxy, name) for name in configured for proxy in (one, two)))
        assert [reply.text for reply in replies] == [name for name in configured for _ in "ab"]
    assert len(times) >= 20
    assert most_in_a_second(times) <= 10
    assert times[-1] - times[0] >= (len(times) - 10) / 10 * 0.95


async def test_what_a_slow_store_has_brought_together_is_not_sent_together(servers: Servers, tmp_path: Path) -> None:
    issuer, configured = await many(servers, tmp_path, 34)
    times = times_of_requests(issuer)
    config = write_config(tmp_path, configured, limits={"refresh_rate": 12})
    async with proxy_process(config) as proxy:
        await asyncio.gather(*(call(proxy, name) for name in configured))
        issuer.end_access_tokens()
        times.clear()
        calls = asyncio.gather(*(call(proxy, name) for name in configured))
        await until(lambda: len(times) > 12)
        lock = sqlite3.connect(tmp_path / "proxy.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        done, _ = await asyncio.wait({calls}, timeout=1.5)
        assert not done
        lock.execute("ROLLBACK")
        lock.close()
        assert [reply.text for reply in await calls] == list(configured)
    assert len(times) == 34
    assert most_in_a_second(times) <= 12


async def test_a_request_beyond_the_rate_is_answered_503_with_a_number_and_the_next_one_goes_through(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh_rate, "LONGEST_WAIT", 0.3)
    issuer, configured = await many(servers, tmp_path, 2)
    async with running_proxy(tmp_path, configured, limits={"refresh_rate": 0.5}) as proxy:
        assert (await call(proxy, "s0")).text == "s0"
        refused = await call(proxy, "s1")
        assert (refused.status, refused.headers["retry-after"]) == (503, "2")
        assert "limits.refresh_rate" in refused.message["error"]["message"]
        assert (await call(proxy, "s0")).text == "s0"
        monkeypatch.setattr(refresh_rate, "LONGEST_WAIT", 30.0)
        assert (await call(proxy, "s1")).text == "s1"
    assert issuer.token_requests() == 2


async def test_consents_do_not_count(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    configured: dict[str, Any] = {f"s{number}": upstream.url for number in range(3)}
    sections: dict[str, Any] = {"authorization": {"wait": "0s"}, "limits": {"refresh_rate": 0.04}}
    async with running_proxy(tmp_path, configured, **sections) as proxy:
        started = time.monotonic()
        for name in configured:
            assert (await consent(link_in((await call(proxy, name)).message))).status_code == 200
            assert (await call(proxy, name)).text == name
        # The only refresh has its turn at once.
        issuer.end_access_tokens()
        assert (await call(proxy, "s0")).text == "s0"
        assert time.monotonic() - started < 20
    assert (issuer.token_requests("authorization_code"), issuer.refreshes) == (3, 1)


def test_a_request_is_answered_within_half_a_minute() -> None:
    assert refresh_rate.LONGEST_WAIT <= renewal_lease.LONGEST_WAIT <= 30


async def test_sighup_changes_the_rate_for_those_that_wait(servers: Servers, tmp_path: Path) -> None:
    _, configured = await many(servers, tmp_path, 2)
    config = write_config(tmp_path, configured, limits={"refresh_rate": 0.04})
    async with proxy_process(config) as proxy:
        assert (await call(proxy, "s0")).text == "s0"
        waiting = asyncio.create_task(call(proxy, "s1"))
        done, _ = await asyncio.wait({waiting}, timeout=0.5)
        assert not done
        rewrite(config, configured, limits={"refresh_rate": 100})
        await hangup(proxy)
        assert (await asyncio.wait_for(waiting, 10)).text == "s1"


async def test_what_a_server_asks_for_holds_in_another_process_too(servers: Servers, tmp_path: Path) -> None:
    issuer, configured = await many(servers, tmp_path, 1)
    config = write_config(tmp_path, configured)
    async with proxy_process(config) as one, proxy_process(config) as two:
        for proxy in (one, two):
            assert (await call(proxy, "s0")).text == "s0"
        busy = FakeResponse(status=429, headers=(("retry-after", "100"), ("content-type", "application/json")))
        issuer.answers["token"] = busy
        issuer.end_access_tokens()
        seen = issuer.token_requests()
        refused = await call(one, "s0")
        assert refused.status == 503
        assert 90 < int(refused.headers["retry-after"]) <= 100
        assert issuer.token_requests() == seen + 1
        refused = await call(two, "s0")
        assert refused.status == 503
        assert 90 < int(refused.headers["retry-after"]) <= 100
        assert issuer.token_requests() == seen + 1


async def test_a_shutdown_does_not_wait_for_turns(servers: Servers, tmp_path: Path) -> None:
    _, configured = await many(servers, tmp_path, 2)
    async with running_proxy(tmp_path, configured, limits={"refresh_rate": 0.04}) as proxy:
        assert (await call(proxy, "s0")).text == "s0"
        waiting = asyncio.create_task(call(proxy, "s1"))
        await until(lambda: proxy.application.forwarder.held.used)
        started = time.monotonic()
    assert time.monotonic() - started < 8
    await asyncio.gather(waiting, return_exceptions=True)
