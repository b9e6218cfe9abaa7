"""The second listener: what it serves, that it stays up while the proxy drains, and that it can end the process."""

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from bench.processes import free_port
from fakes.fixtures import Servers
from fakes.http_exchange import FakeResponse
from fakes.proxy import ProxyProcess, proxy_process, until, write_config
from fakes.raw_client import RawClient

ROUTES = ["/healthz", "/readyz", "/metrics"]
ELSEWHERE = "https://mcp.example.com/mcp"
DONE = {"jsonrpc": "2.0", "id": 1, "result": {"content": [{"type": "text", "text": "done"}]}}


async def health_of(proxy: ProxyProcess) -> str:
    """Return the origin of the second listener, which the log names."""
    await until(lambda: "are also at" in proxy.log, "the line about health_listen")
    found = re.search(r"are also at (http://\S+)", proxy.log)
    assert found
    return found[1]


@asynccontextmanager
async def serving(
    folder: Path, url: str = ELSEWHERE, **sections: Any
) -> AsyncIterator[tuple[ProxyProcess, httpx2.AsyncClient]]:
    """A proxy process, and a client of its second listener."""
    config = write_config(folder, {"notes": url}, **{"health_listen": "127.0.0.1:0", **sections})
    async with (
        proxy_process(config) as proxy,
        httpx2.AsyncClient(base_url=await health_of(proxy), trust_env=False) as client,
    ):
        yield proxy, client


async def draining(health: httpx2.AsyncClient) -> Any:
    """Wait, bounded, until /readyz is 503; return what it says."""
    for _ in range(100):
        answer = await health.get("/readyz")
        if answer.status_code == 503:
            return answer.json()
        await asyncio.sleep(0.02)
    raise AssertionError("still ready")


async def test_it_has_the_health_endpoints_and_the_other_listener_keeps_them(tmp_path: Path) -> None:
    async with serving(tmp_path) as (proxy, health):
        for path in ROUTES:
            here, there = await health.get(path), await health.get(proxy.origin + path)
            assert (here.status_code, there.status_code) == (200, 200), path
            assert here.headers["content-type"] == there.headers["content-type"]
        assert (await health.get("/readyz")).json() == {"status": "ready"}
        assert await proxy.stop() == 0


async def test_it_has_nothing_else(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, health):
        others = ["/", "/notes/mcp", "/connect/notes", "/oauth/callback", "/quitquitquit", "/healthz/", "/health%7a/x"]
        for path in others:
            assert (await health.get(path)).status_code == 404, path
            assert (await health.post(path)).status_code == 404, path


@pytest.mark.parametrize("path", ROUTES)
async def test_it_answers_other_methods_with_405(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path) as (_, health):
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            answer = await health.request(method, path)
            assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, {"GET", "HEAD"})


@pytest.mark.parametrize("host", ["10.1.2.3:8788", "pod.example", "[fd00::1]:8788"])
async def test_it_accepts_every_host(tmp_path: Path, host: str) -> None:
    async with serving(tmp_path) as (proxy, health):
        assert (await health.get("/readyz", headers={"Host": host})).status_code == 200
        assert (await health.get(f"{proxy.origin}/readyz", headers={"Host": host})).status_code == 421


async def test_it_says_503_while_a_running_call_is_finished(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(protected=False)
    answer = FakeResponse.json(DONE)
    answer.gate = gate = asyncio.Event()
    async with serving(tmp_path, upstream.url) as (proxy, health), proxy.client("notes") as client:
        upstream.answers["tools/call:slow"] = answer
        call = asyncio.create_task(client.call("slow"))
        await until(lambda: upstream.calls("tools/call:slow"))
        proxy.process.send_signal(signal.SIGTERM)
        assert await draining(health) == {"status": "draining"}
        assert (await health.get("/healthz")).status_code == 200
        gate.set()
        assert (await call).text == "done"
        assert await asyncio.wait_for(proxy.process.wait(), 20) == 0


async def test_it_answers_although_clients_have_every_connection(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(protected=False)
    upstream.answers["GET"] = FakeResponse.hang()
    limits = {"connections": 1}
    async with serving(tmp_path, upstream.url, limits=limits) as (proxy, health), RawClient.to(proxy.origin) as first:
        first.get()
        await until(lambda: upstream.calls("GET"))
        async with RawClient.to(proxy.origin) as second:
            assert (await second.answer()).status == 503
        assert (await health.get("/readyz")).status_code == 200


async def test_probes_that_never_end_leave_room_for_others(tmp_path: Path) -> None:
    async with serving(tmp_path) as (proxy, health), contextlib.AsyncExitStack() as stack:
        for _ in range(40):
            silent = await stack.enter_async_context(RawClient.to(await health_of(proxy)))
            silent.send(b"GET /readyz HTTP/1.1\r\n")
        assert (await health.get("/readyz")).status_code == 200
        await until(lambda: "the most for one address (health_listen)" in proxy.log)


async def test_a_client_that_reads_nothing_takes_no_place_from_other_addresses(tmp_path: Path) -> None:  # T83
    transport = httpx2.AsyncHTTPTransport(local_address="127.0.0.2")
    async with serving(tmp_path) as (proxy, _), contextlib.AsyncExitStack() as stack:
        origin = await health_of(proxy)
        for _ in range(40):
            deaf = await stack.enter_async_context(RawClient.to(origin, buffer=4096))
            deaf.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 400)
        await until(lambda: "the most for one address (health_listen)" in proxy.log)
        async with httpx2.AsyncClient(base_url=origin, transport=transport, trust_env=False) as kubelet:
            assert (await kubelet.get("/readyz")).status_code == 200


async def test_quit_ends_the_process_as_sigterm_does(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(protected=False)
    answer = FakeResponse.json(DONE)
    answer.gate = gate = asyncio.Event()
    async with serving(tmp_path, upstream.url, health_quit=True) as (proxy, health), proxy.client("notes") as client:
        upstream.answers["tools/call:slow"] = answer
        call = asyncio.create_task(client.call("slow"))
        await until(lambda: upstream.calls("tools/call:slow"))
        for _ in range(3):  # a script may try again, and must not end what is running
            assert (await health.post("/quitquitquit")).status_code == 200
        assert (await health.get("/readyz")).status_code == 503
        gate.set()
        assert (await call).text == "done"
        assert await asyncio.wait_for(proxy.process.wait(), 20) == 0


async def test_neither_a_web_page_nor_a_get_ends_the_process(tmp_path: Path) -> None:
    async with serving(tmp_path, health_quit=True) as (proxy, health):
        for origin in ("https://evil.example", "null", await health_of(proxy)):
            assert (await health.post("/quitquitquit", headers={"Origin": origin})).status_code == 403
        assert (await health.post("/quitquitquit", headers={"Sec-Fetch-Site": "cross-site"})).status_code == 403
        assert (await health.get("/quitquitquit")).status_code == 405
        assert (await health.get("/readyz")).status_code == 200


async def test_a_reload_says_that_both_keys_need_a_restart(tmp_path: Path) -> None:
    async with serving(tmp_path) as (proxy, health):
        config = tmp_path / "mcp-auth-proxy.yaml"
        document = yaml.safe_load(config.read_text())
        config.write_text(
            yaml.safe_dump({**document, "health_listen": f"127.0.0.1:{free_port()}", "health_quit": True})
        )
        proxy.process.send_signal(signal.SIGHUP)
        await until(lambda: "restart the proxy to apply the new health_listen, health_quit" in proxy.log)
        assert (await health.get("/readyz")).status_code == 200
        assert (await health.post("/quitquitquit")).status_code == 404
