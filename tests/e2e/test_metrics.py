"""/metrics: what a scraper sees of the traffic, and who may see it."""

import asyncio
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import Channel, FakeResponse
from fakes.proxy import RunningProxy, running_proxy, until, write_config
from fakes.proxy_setup import proxy_setup
from fakes.raw_client import RawClient
from fakes.unattended import connected, unattended
from mcp_auth_proxy import app
from mcp_auth_proxy.config.changes import compare
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.settings import Address
from mcp_auth_proxy.observability import metrics

SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (NaN|[+-]Inf|-?[0-9.e+-]+)')

Numbers = dict[str, float]


@pytest.fixture(autouse=True)
def _counted_from_zero() -> None:
    """The instruments belong to the process, and so to all tests in it."""
    for name in ("notes", "other"):
        metrics.registry.forget_server(name)


async def scrape(proxy: RunningProxy, **headers: str) -> Numbers:
    """Return each sample by its name and labels, and check each line on the way."""
    async with httpx2.AsyncClient(trust_env=False) as http:
        response = await http.get(f"{proxy.origin}/metrics", headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert response.text.endswith("\n")
    numbers: Numbers = {}
    family = ""
    for line in response.text.splitlines():
        if line.startswith("# "):
            _, kind, family, text = line.split(" ", 3)
            assert kind in ("HELP", "TYPE")
            assert kind == "HELP" or text in ("counter", "gauge", "histogram")
            continue
        found = SAMPLE.fullmatch(line)
        assert found is not None, line
        assert found[1].startswith(family)
        assert line.rpartition(" ")[0] not in numbers
        numbers[line.rpartition(" ")[0]] = float(found[3])
    return numbers


def requests(kind: str, status: str) -> str:
    return f'mcp_auth_proxy_requests_total{{server="notes",kind="{kind}",status="{status}"}}'


def of_server(name: str) -> str:
    return f'{name}{{server="notes"}}'


STREAMS = of_server("mcp_auth_proxy_open_streams")
WAITING = of_server("mcp_auth_proxy_requests_waiting_for_consent")


async def until_scraped(proxy: RunningProxy, expected: Mapping[str, float]) -> Numbers:
    """Scrape, bounded, until the samples have these values: some are counted just after the response."""
    for _ in range(100):
        numbers = await scrape(proxy)
        found = {name: numbers.get(name) for name in expected}
        if found == expected:
            return numbers
        await asyncio.sleep(0.02)
    raise AssertionError(f"{found} is not {expected}")


async def test_requests_are_counted_by_server_kind_and_status_and_timed(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup:
        for number in range(3):
            assert (await setup.client.call("echo", text=str(number))).text == str(number)
        setup.upstream.answers["tools/call:teapot"] = FakeResponse.json({}, status=418)
        assert (await setup.client.call("teapot")).status == 418
        await setup.client.delete()
        numbers = await until_scraped(setup.proxy, {requests("post", "200"): 3, requests("post", "418"): 1})
        count = 'mcp_auth_proxy_request_duration_seconds_count{server="notes",kind="post"}'
        bucket = 'mcp_auth_proxy_request_duration_seconds_bucket{server="notes",kind="post",le="+Inf"}'
        total = 'mcp_auth_proxy_request_duration_seconds_sum{server="notes",kind="post"}'
        assert numbers[count] == numbers[bucket] == 4
        assert 0 < numbers[total] < 30
        assert sum(value for name, value in numbers.items() if 'kind="delete",status=' in name) == 1


async def test_streams_are_counted_while_they_are_open(servers: Servers, tmp_path: Path) -> None:
    channel = Channel()
    async with connected(servers, tmp_path) as setup:
        setup.upstream.answers["GET"] = FakeResponse.events(channel)
        setup.upstream.answers["tools/call:slow"] = FakeResponse.events(slow := Channel())
        async with RawClient.to(setup.proxy.origin) as raw, RawClient.to(setup.proxy.origin) as gone:
            await setup.client.call("echo", text="warm")
            raw.get()
            await raw.head()
            gone.post(
                b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"slow"}}', "Accept: text/event-stream"
            )
            await gone.head()
            await until_scraped(setup.proxy, {STREAMS: 2})
            channel.close()
            await until_scraped(setup.proxy, {STREAMS: 1, requests("get", "200"): 1})
        # A client that goes away has still been answered with 200.
        await until_scraped(setup.proxy, {STREAMS: 0, requests("post", "200"): 2})
        slow.close()


async def test_a_client_that_goes_away_before_its_answer_is_499(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup:
        await setup.client.call("echo", text="warm")
        setup.upstream.answers["POST"] = FakeResponse.hang()
        async with RawClient.to(setup.proxy.origin) as raw:
            raw.post(b'{"jsonrpc":"2.0","id":1,"method":"ping"}')
            await until(lambda: setup.upstream.calls("ping"))
        await until_scraped(setup.proxy, {requests("post", "499"): 1})


async def test_an_unknown_server_is_not_a_label(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup, setup.proxy.client("nobody") as client:
        assert (await client.post("ping")).status == 404
        assert not [name for name in await scrape(setup.proxy) if "nobody" in name]


async def test_an_authorization_is_counted_from_its_start_to_the_refresh(servers: Servers, tmp_path: Path) -> None:
    def flows(outcome: str) -> str:
        return f'mcp_auth_proxy_flows_total{{server="notes",outcome="{outcome}"}}'

    refreshed = 'mcp_auth_proxy_refreshes_total{server="notes",outcome="renewed"}'
    async with proxy_setup(servers, tmp_path, wait="30s") as setup:
        held = asyncio.create_task(setup.ask("held"))
        link = await setup.proxy.next_link()
        numbers = await until_scraped(setup.proxy, {WAITING: 1, flows("started"): 1})
        assert flows("completed") not in numbers
        await consent(link)
        assert (await held).text == "held"
        valid, expired = 'mcp_auth_proxy_tokens{state="valid"}', 'mcp_auth_proxy_tokens{state="expired"}'
        await until_scraped(setup.proxy, {WAITING: 0, flows("completed"): 1, valid: 1, expired: 0})
        setup.clock.ahead = 365 * 24 * 3600
        await until_scraped(setup.proxy, {valid: 0, expired: 1})
        assert (await setup.ask("again")).text == "again"
        await until_scraped(setup.proxy, {refreshed: 1, valid: 1, expired: 0})


async def test_a_refused_consent_and_an_ended_grant_are_counted(servers: Servers, tmp_path: Path) -> None:
    failed = 'mcp_auth_proxy_flows_total{server="notes",outcome="failed"}'
    ended = 'mcp_auth_proxy_refreshes_total{server="notes",outcome="ended"}'
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        setup.issuer.end_grants()
        setup.clock.ahead = 365 * 24 * 3600
        await setup.ask()
        await until_scraped(setup.proxy, {ended: 1})
        setup.issuer.authorize_error = ("access_denied", "The user said no.")
        await consent(await setup.link())
        await until_scraped(setup.proxy, {failed: 1})


async def test_failures_of_upstreams_are_counted_by_kind(servers: Servers, tmp_path: Path) -> None:
    def failures(kind: str) -> str:
        return f'mcp_auth_proxy_upstream_failures_total{{server="notes",kind="{kind}"}}'

    async with connected(servers, tmp_path, server={"upstream_timeout": "300ms"}) as setup:
        await setup.client.call("echo", text="warm")
        setup.upstream.answers["tools/call:hang"] = FakeResponse.hang()
        assert (await setup.client.call("hang")).status == 504
        await until_scraped(setup.proxy, {failures("timeout"): 1, requests("post", "504"): 1})
    async with (
        running_proxy(tmp_path, {"notes": "http://127.0.0.1:9/mcp"}) as proxy,
        proxy.client("notes") as client,
    ):
        assert (await client.post("ping")).status == 502
        await until_scraped(proxy, {failures("unreachable"): 1})


async def test_connections_are_counted_on_both_sides(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup, RawClient.to(setup.proxy.origin):
        await setup.client.call("echo", text="warm")
        idle = f'mcp_auth_proxy_upstream_connections{{origin="{setup.upstream.origin}",state="idle"}}'
        active = f'mcp_auth_proxy_upstream_connections{{origin="{setup.upstream.origin}",state="active"}}'
        # The client's, the one that says nothing, and the scraper's.
        await until_scraped(setup.proxy, {idle: 1, active: 0, "mcp_auth_proxy_inbound_connections": 3})


async def test_a_closed_listener_is_no_longer_counted(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path):
        assert "\nmcp_auth_proxy_inbound_connections 0\n" in metrics.registry.render()
    for name in ("inbound_connections", "upstream_connections", "tokens"):
        assert not re.search(rf"^mcp_auth_proxy_{name}[ {{]", metrics.registry.render(), re.MULTILINE)


async def test_the_series_of_a_removed_server_are_dropped(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "FORGET_DELAY", 0.1)
    issuer, upstream = await servers.authorization_server(), await servers.mcp_server()
    upstream.protected = False
    both: dict[str, Any] = {"notes": {"url": upstream.url}, "other": unattended(issuer, upstream.url, tmp_path)}
    async with running_proxy(tmp_path, both) as proxy, proxy.client("notes") as client:
        await client.call("echo", text="x")
        await until_scraped(proxy, {requests("post", "200"): 1})
        settings = load(write_config(tmp_path, {"other": both["other"]}))
        proxy.application.apply(compare(proxy.application.settings, settings))
        await until(lambda: 'server="notes"' not in metrics.registry.render())


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example"])
async def test_a_scrape_with_a_foreign_host_is_refused_with_a_clear_line(
    servers: Servers, tmp_path: Path, host: str
) -> None:
    async with connected(servers, tmp_path) as setup, httpx2.AsyncClient(trust_env=False) as http:
        response = await http.get(f"{setup.proxy.origin}/metrics", headers={"Host": host})
        assert response.status_code == 421
        assert "inbound.allowed_hosts" in response.text
        assert "mcp_auth_proxy_" not in response.text
        response = await http.get(f"{setup.proxy.origin}/metrics", headers={"Origin": "https://evil.example"})
        assert response.status_code == 403


async def test_away_from_loopback_a_scraper_may_use_the_address_of_the_pod(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    config, public = {"notes": "http://127.0.0.1:9/mcp"}, "https://proxy.example"
    async with running_proxy(tmp_path, config, listen=Address("0.0.0.0", port), public_url=public):
        origin = f"http://127.0.0.1:{port}"
        async with httpx2.AsyncClient(trust_env=False) as http:
            response = await http.get(f"{origin}/metrics", headers={"Host": "10.1.2.3:8787"})
            assert response.status_code == 200
            assert (await http.get(f"{origin}/", headers={"Host": "10.1.2.3:8787"})).status_code == 421


async def test_only_get_is_allowed(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup, httpx2.AsyncClient(trust_env=False) as http:
        assert (await http.post(f"{setup.proxy.origin}/metrics")).status_code == 405
        assert (await http.head(f"{setup.proxy.origin}/metrics")).status_code == 200
