"""The composition root: how the proxy is reached, how it takes over a changed configuration, how it announces links."""

import asyncio
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fakes.forwarding import pending_authorization
from fakes.proxy import running_proxy, until
from fakes.raw_client import RawClient
from fakes.raw_server import Peer, RawServer, answers, ok
from mcp_auth_proxy import app
from mcp_auth_proxy.app import Announcer, Application, effective_public_url, lifespan
from mcp_auth_proxy.config.changes import compare
from mcp_auth_proxy.config.settings import (
    Address,
    AuthorizationSettings,
    InboundSettings,
    LimitSettings,
    ServerSettings,
    Settings,
    reachable,
)
from mcp_auth_proxy.errors import StoreRejected
from mcp_auth_proxy.models import DeviceAuthorization
from mcp_auth_proxy.net import pool
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.web import browser
from store.builders import store_settings

CALL = json.dumps({"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {"name": "pay"}}).encode()
LOOPBACK = Address("127.0.0.1", 8787)


def settings(folder: Path, **sections: object) -> Settings:
    base = Settings(listen=LOOPBACK, public_url=None, store=store_settings(folder), servers={})
    return replace(base, **sections)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("listening", "at"),
    [
        (LOOPBACK, "127.0.0.1:8787"),
        (Address("0.0.0.0", 80), "127.0.0.1:80"),
        (Address("::", 80), "[::1]:80"),
        (Address("::1", 80), "[::1]:80"),
        (Address("10.0.0.1", 80), "10.0.0.1:80"),
    ],
)
def test_the_address_for_browsers_can_be_called(listening: Address, at: str, tmp_path: Path) -> None:
    assert str(reachable(listening)) == at
    assert effective_public_url(settings(tmp_path), listening) == f"http://{at}"
    configured = settings(tmp_path, public_url="https://mcp.example.com")
    assert effective_public_url(configured, listening) == "https://mcp.example.com"


# A changed configuration


def change(application: Application, **sections: object) -> None:
    """Apply what a reload would."""
    application.apply(compare(application.settings, replace(application.settings, **sections)))  # type: ignore[arg-type]


async def test_every_section_is_taken_over_by_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "POOL_TIMEOUT", 0.05)

    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.until_gone()

    async with (
        RawServer(silent) as upstream,
        running_proxy(tmp_path, {"notes": upstream.url}) as proxy,
        RawClient.to(proxy.origin) as client,
        RawClient.to(proxy.origin) as other,
    ):
        application = proxy.application
        docs = ServerSettings(name="docs", url="http://127.0.0.1:1/mcp")
        change(
            application,
            servers={**application.settings.servers, "docs": docs},
            limits=LimitSettings(body=len(CALL), upstream_connections=1),
            inbound=InboundSettings(allowed_hosts=("mcp.internal",)),
            authorization=AuthorizationSettings(wait=0.0, allow_private=("10.0.0.0/8",)),
        )
        client.post(CALL + b" ")
        answer = await client.answer()
        assert (answer.status, b"limits.body" in answer.body) == (413, True)
        client.post(CALL, path="/docs/mcp")
        assert (await client.answer()).status == 502
        other.send("GET / HTTP/1.1\nHost: mcp.internal\n\n")
        assert (await other.answer()).status == 200
        client.post(CALL)
        await until(lambda: upstream.requests, "a request")
        other.post(CALL)
        answer = await other.answer()
        assert answer.status == 503
        assert "All 1 connections" in answer.body.decode()
        assert application.settings.limits.body == len(CALL)


async def test_a_key_that_needs_a_restart_keeps_its_value(tmp_path: Path) -> None:
    async with running_proxy(tmp_path, {"notes": "http://127.0.0.1:1/mcp"}) as proxy:
        before = proxy.application.settings
        change(proxy.application, listen=Address("127.0.0.1", 1), public_url="https://mcp.example.com")
        assert proxy.application.settings == before


async def test_the_series_of_a_removed_server_go_unless_it_has_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "FORGET_DELAY", 0.05)
    servers = {name: ServerSettings(name=name, url="http://127.0.0.1:1/mcp") for name in ("gone", "back", "kept")}

    def series() -> list[str]:
        text = metrics.registry.render()
        return [name for name in servers if f'server="{name}"' in text]

    async with (
        running_proxy(tmp_path, {name: server.url for name, server in servers.items()}) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        for name in servers:
            client.post(CALL, path=f"/{name}/mcp")
            await client.answer()
        assert series() == ["gone", "back", "kept"]
        change(proxy.application, servers={"kept": servers["kept"]})
        change(proxy.application, servers={"kept": servers["kept"], "back": servers["back"]})
        await until(lambda: series() == ["back", "kept"], "the series of the removed server to go")


# The end


async def test_draining_is_told_to_probes_and_waits_for_active_requests(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await gate.wait()
        await peer.send(ok(b"{}"))

    async with (
        RawServer(script) as upstream,
        running_proxy(tmp_path, {"notes": upstream.url}) as proxy,
        RawClient.to(proxy.origin) as client,
        RawClient.to(proxy.origin) as probe,
    ):
        client.post(CALL)
        await until(lambda: upstream.requests, "a request")
        draining = asyncio.create_task(proxy.application.drain())
        probe.get("/readyz")
        assert (await probe.answer()).status == 503
        assert not draining.done()
        gate.set()
        assert (await client.answer()).body == b"{}"
        await asyncio.wait_for(draining, 5)


async def test_what_outlasts_the_drain_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "DRAIN_SECONDS", 0.05)

    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.until_gone()

    async with (
        RawServer(silent) as upstream,
        running_proxy(tmp_path, {"notes": upstream.url}) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.post(CALL)
        await until(lambda: upstream.requests, "a request")
        await asyncio.wait_for(proxy.application.drain(), 5)
        assert (await client.answer()).status == 503


async def test_a_store_that_must_not_be_used_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreRejected):
        async with lifespan(settings(tmp_path), LOOPBACK, announce_key=lambda line: None):
            raise AssertionError("it must not start")


async def test_the_numbers_of_a_proxy_that_has_ended_are_counted_no_more(tmp_path: Path) -> None:
    async with RawServer(answers(ok())) as upstream:
        origin = f'origin="http://127.0.0.1:{upstream.port}"'
        async with running_proxy(tmp_path, {"notes": upstream.url}) as proxy, RawClient.to(proxy.origin) as client:
            client.post(CALL)
            await client.answer()
            assert origin in metrics.registry.render()
        assert origin not in metrics.registry.render()


# Links


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The links for which a browser was to be opened."""
    links: list[str] = []
    monkeypatch.setattr(browser, "open_link", links.append)
    for name in ("SSH_CONNECTION", "CI"):
        monkeypatch.delitem(os.environ, name, raising=False)
    monkeypatch.setitem(os.environ, "BROWSER", "/bin/true")
    return links


LINK = "http://127.0.0.1:8787/connect/notes?flow=F1"


@pytest.mark.parametrize(
    ("choice", "listening", "opens"),
    [
        ("auto", LOOPBACK, True),
        ("auto", Address("0.0.0.0", 8787), False),
        ("always", Address("0.0.0.0", 8787), True),
        ("never", LOOPBACK, False),
    ],
)
async def test_a_link_is_logged_and_opened_where_somebody_is_there_to_see_it(
    choice: str, listening: Address, opens: bool, opened: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    announcer = Announcer(
        settings(tmp_path, authorization=AuthorizationSettings(open_browser=choice)),  # type: ignore[arg-type]
        listening,
        opening=lambda flow: opened.append(flow.id),
    )
    announcer(pending_authorization().flow, LINK)
    assert opened == (["F1", LINK] if opens else [])
    (record,) = caplog.records
    assert (record.levelno, LINK in record.getMessage()) == (logging.WARNING, True)


async def test_a_changed_choice_holds_for_the_next_link(opened: list[str], tmp_path: Path) -> None:
    announcer = Announcer(
        settings(tmp_path, authorization=AuthorizationSettings(open_browser="never")), LOOPBACK, opening=print
    )
    announcer(pending_authorization().flow, LINK)
    announcer.configure(settings(tmp_path, authorization=AuthorizationSettings(open_browser="always")))
    announcer(pending_authorization().flow, LINK)
    assert opened == [LINK]


async def test_a_code_for_another_device_is_logged_with_the_address_that_any_device_reaches(
    opened: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = DeviceAuthorization(
        device_code="canary-device-code", user_code="AB-CD", verification_uri="https://as.example/device"
    )
    announce: Callable[..., None] = Announcer(settings(tmp_path), LOOPBACK, opening=print)
    announce(replace(pending_authorization().flow, device=device), LINK)
    first, second = (record.getMessage() for record in caplog.records)
    assert LINK in first
    assert ("https://as.example/device" in second, "AB-CD" in second) == (True, True)
    assert "canary" not in caplog.text
