"""A configuration that changes while the proxy serves: new servers are served, removed ones end cleanly."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
import yaml

from fakes.fixtures import Servers
from fakes.http_exchange import Channel, FakeResponse
from fakes.mcp_client import MODERN
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import ProxyProcess, RunningProxy, proxy_process, running_proxy, serving, until, write_config
from fakes.raw_client import RawClient
from fakes.unattended import unattended
from mcp_auth_proxy.config.changes import compare
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.net import urls


def rewrite(config: Path, servers: dict[str, Any], **sections: Any) -> None:
    """Put another configuration in the place of the one there, in one step."""
    document = {**yaml.safe_load(config.read_text()), "servers": servers, **sections}
    new = config.with_suffix(".new")
    new.write_text(yaml.safe_dump(document))
    new.rename(config)


def open_server(server: FakeMcpServer) -> dict[str, Any]:
    server.protected = False
    return {"url": server.url}


async def hangup(proxy: ProxyProcess, reports: int = 1) -> str:
    """Send SIGHUP; return the line of the log about the reload."""
    seen = len(re.findall("configuration reloaded", proxy.err))
    proxy.process.send_signal(signal.SIGHUP)
    await until(
        lambda: len(re.findall("configuration reloaded", proxy.err)) == seen + reports, f"a reload\n{proxy.err}"
    )
    return [line for line in proxy.err.splitlines() if "configuration reloaded" in line][-1]


async def status(proxy: ProxyProcess, path: str) -> tuple[int, str]:
    async with httpx2.AsyncClient(trust_env=False) as http:
        response = await http.post(proxy.origin + path, json={"jsonrpc": "2.0", "id": 1, "method": "ping"})
        return response.status_code, response.text


class Moving(NamedTuple):
    proxy: RunningProxy
    old: FakeMcpServer
    new: FakeMcpServer
    move: Callable[[], Awaitable[None]]


@asynccontextmanager
async def two_servers(
    servers: Servers, folder: Path
) -> AsyncIterator[tuple[ProxyProcess, Path, FakeMcpServer, FakeMcpServer]]:
    """A proxy process before ``alpha``; ``beta`` is not configured yet. Neither asks for a token."""
    alpha, beta = await servers.mcp_server(), await servers.mcp_server()
    config = write_config(folder, {"alpha": open_server(alpha)})
    async with proxy_process(config) as proxy:
        yield proxy, config, alpha, beta


async def test_sighup_serves_what_was_added_and_no_longer_what_was_removed(servers: Servers, tmp_path: Path) -> None:
    async with two_servers(servers, tmp_path) as (proxy, config, _, beta):
        async with proxy.client("alpha") as client:
            assert (await client.call("echo", text="before")).text == "before"
            rewrite(config, {"beta": open_server(beta)})
            line = await hangup(proxy)
            assert line.endswith("configuration reloaded: added beta; removed alpha")
            code, text = await status(proxy, "/alpha/mcp")  # on a connection of its own
            assert (code, "Configured servers: beta." in text) == (404, True)
            gone = await client.call("echo", text="after")  # on the connection that was kept
            assert gone.status == 404
        async with proxy.client("beta") as client:
            assert (await client.call("echo", text="new")).text == "new"
        assert (await status(proxy, "/mcp"))[0] == 200  # the only one, so under this address too


async def test_a_changed_file_is_noticed_without_a_signal(servers: Servers, tmp_path: Path) -> None:
    async with two_servers(servers, tmp_path) as (proxy, config, alpha, beta):
        rewrite(config, {"alpha": open_server(alpha), "beta": open_server(beta)})
        await until(lambda: "configuration reloaded: added beta" in proxy.err)
        async with proxy.client("beta") as client:
            assert (await client.call("echo", text="new")).text == "new"


async def test_a_changed_server_is_used_for_new_requests_and_running_ones_end_as_they_began(
    servers: Servers, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    slow = FakeResponse.json({"jsonrpc": "2.0", "id": 1, "result": {"content": [{"type": "text", "text": "old"}]}})
    slow.gate = gate
    async with two_servers(servers, tmp_path) as (proxy, config, alpha, beta), proxy.client("alpha") as client:
        alpha.answers["tools/call:slow"] = slow
        running = asyncio.create_task(client.call("slow"))
        await until(lambda: alpha.calls("tools/call:slow"))
        rewrite(config, {"alpha": open_server(beta)})
        assert (await hangup(proxy)).endswith("changed alpha")
        assert (await client.call("echo", text="x")).text == "x"
        assert len(beta.calls("tools/call:echo")) == 1
        gate.set()
        assert (await running).text == "old"


@asynccontextmanager
async def moving(servers: Servers, folder: Path) -> AsyncIterator[Moving]:
    """A proxy before ``old``, with a token for it; ``move`` gives its name to ``new`` and gets a token for that."""
    issuer = await servers.authorization_server()
    old, new = await servers.mcp_server(issuer), await servers.mcp_server(issuer)
    async with (
        running_proxy(folder, {"notes": unattended(issuer, old.url, folder)}) as proxy,
        proxy.client("notes") as client,
    ):
        assert (await client.call("echo", text="old")).text == "old"

        async def move() -> None:
            settings = load(write_config(folder, {"notes": unattended(issuer, new.url, folder)}))
            application = proxy.application
            application.apply(compare(application.settings, settings))
            assert (await client.call("echo", text="new")).text == "new"

        yield Moving(proxy, old, new, move)


async def test_a_request_that_began_before_its_server_moved_does_not_bring_the_new_token_to_the_old_place(
    servers: Servers, tmp_path: Path
) -> None:  # T49
    async with moving(servers, tmp_path) as (proxy, old, new, move), RawClient.to(proxy.origin) as raw:
        body = b'{"jsonrpc": "2.0", "id": 9, "method": "tools/list"}'
        raw.send(f"POST /notes/mcp HTTP/1.1\nHost: HOST\nContent-Length: {len(body)}\n\n")
        await until(lambda: proxy.application.forwarder.active_requests == 1)
        before = len(old.requests)
        await move()
        raw.send(body)
        answer = await raw.answer()
        assert (answer.status, "configuration of server notes was changed" in answer.body.decode()) == (200, True)
        assert len(old.requests) == before
        raw.post(body)
        assert (await raw.answer()).status == 200
        assert new.calls("tools/list")


async def test_a_challenge_of_the_old_place_of_a_server_is_nothing_to_the_new_one(
    servers: Servers, tmp_path: Path
) -> None:  # T49
    gate = asyncio.Event()
    async with moving(servers, tmp_path) as (proxy, old, new, move), proxy.client("notes") as client:
        metadata = f"{old.origin}/hostile-metadata"
        refusal = FakeResponse.json({}, 401)
        refusal.headers = (("www-authenticate", f'Bearer resource_metadata="{metadata}"'),)
        refusal.gate = gate
        old.answers["tools/call:slow"] = refusal
        asked = asyncio.create_task(client.call("slow"))
        await until(lambda: old.calls("tools/call:slow"))
        before = len(old.requests)
        await move()
        gate.set()
        reply = await asked
        assert "configuration of server notes was changed" in reply.error["message"]
        assert len(old.requests) == before
        assert not new.calls("tools/call:slow")


@pytest.mark.parametrize("version", ["2025-11-25", MODERN])
async def test_streams_of_a_removed_server_end_with_a_final_chunk(
    servers: Servers, tmp_path: Path, version: str
) -> None:
    async with two_servers(servers, tmp_path) as (proxy, config, alpha, beta), RawClient.to(proxy.origin) as raw:
        alpha.answers["GET"] = alpha.answers["POST"] = FakeResponse.events(Channel())
        if version == MODERN:
            body = b'{"jsonrpc": "2.0", "id": 1, "method": "subscriptions/listen"}'
            raw.post(body, "Accept: application/json, text/event-stream", path="/alpha/mcp")
        else:
            raw.get("/alpha/mcp")
        assert (await raw.head())[0] == 200
        rewrite(config, {"beta": open_server(beta)})
        await hangup(proxy)
        await asyncio.wait_for(raw.reader.readuntil(b"0\r\n\r\n"), 10)  # the connection stays
        await until(alpha.requests[-1].gone.is_set)


@pytest.mark.parametrize("accept", ["application/json", "application/json, text/event-stream"])
async def test_requests_held_for_a_removed_server_are_answered_at_once(
    servers: Servers, tmp_path: Path, accept: str
) -> None:
    issuer = await servers.authorization_server()
    alpha, beta = await servers.mcp_server(issuer), await servers.mcp_server()
    config = write_config(tmp_path, {"alpha": alpha.url}, authorization={"wait": "60s"})
    async with proxy_process(config) as proxy, proxy.client("alpha") as client:
        held = asyncio.create_task(client.post("tools/list", headers={"Accept": accept}))
        await proxy.next_link()
        if "event-stream" in accept:
            # Long enough for a comment, so that the answer has begun as an event stream.
            await asyncio.sleep(5.5)
        rewrite(config, {"beta": open_server(beta)}, authorization={"wait": "60s"})
        await hangup(proxy)
        reply = await asyncio.wait_for(held, 10)
        assert "alpha" in reply.error["message"]
        assert "configur" in reply.error["message"]
        assert reply.status == (200 if "event-stream" in accept else 503)


async def test_an_invalid_file_changes_nothing_and_says_why_each_time(servers: Servers, tmp_path: Path) -> None:
    async with two_servers(servers, tmp_path) as (proxy, config, alpha, _):
        good = open_server(alpha)
        rewrite(config, {"alpha": {"url": "ftp://x"}, "beta": {}}, nonsense=1)
        await until(lambda: proxy.err.count("configuration not reloaded") == 3)
        logged = re.findall(r"error   configuration not reloaded: \S+: (\S+): ", proxy.err)
        assert sorted(logged) == ["nonsense", "servers.alpha.url", "servers.beta.url"]
        rewrite(config, {"alpha": good, "beta": {}})
        await until(lambda: proxy.err.count("configuration not reloaded") == 5)
        async with proxy.client("alpha") as client:
            assert (await client.call("echo", text="still")).text == "still"
        document = yaml.safe_load(config.read_text())
        del document["nonsense"]
        config.write_text(yaml.safe_dump({**document, "servers": {"alpha": good}}))
        await until(lambda: "configuration reloaded: nothing has changed" in proxy.err)


async def test_keys_that_need_a_restart_are_named_and_the_rest_applied(servers: Servers, tmp_path: Path) -> None:
    alpha = await servers.mcp_server()
    config = write_config(tmp_path, {"alpha": open_server(alpha)}, inbound={"allowed_hosts": ["old.example"]})
    async with serving("--config", str(config)) as proxy:
        headers = {"Host": "new.example"}
        async with httpx2.AsyncClient(trust_env=False) as http:
            assert (await http.get(f"{proxy.origin}/healthz", headers=headers)).status_code == 421
            (tmp_path / "third.key").write_text("A" * 43 + "=")
            rewrite(
                config,
                {"alpha": open_server(alpha)},
                listen="127.0.0.1:1",
                store={"url": "sqlite:///other.db", "keys": ["file:third.key"]},
                inbound={"allowed_hosts": ["new.example"]},
                limits={"body": "1kB"},
            )
            assert (await hangup(proxy)).endswith("applied limits.body, inbound.allowed_hosts")
            await until(lambda: "restart the proxy to apply the new listen" in proxy.err)
            assert "apply the new listen, store.url, store.keys\n" in proxy.err
            assert (await http.get(f"{proxy.origin}/healthz", headers=headers)).status_code == 200
            headers = {"Host": "old.example"}
            assert (await http.get(f"{proxy.origin}/healthz", headers=headers)).status_code == 421
            big = {"jsonrpc": "2.0", "id": 1, "method": "x", "params": {"text": "x" * 2000}}
            assert (await http.post(f"{proxy.origin}/alpha/mcp", json=big)).status_code == 413


async def test_changed_sections_are_applied(servers: Servers, tmp_path: Path) -> None:
    alpha = await servers.mcp_server()
    served = {"alpha": open_server(alpha)}
    async with running_proxy(tmp_path, served) as proxy, proxy.client("alpha") as client:
        await client.call("echo", text="a connection")
        application = proxy.application
        sections: dict[str, Any] = {
            "authorization": {"wait": "0s", "allow_private": ["10.0.0.1"], "open_browser": "always"},
            "limits": {"upstream_connections": 7},
        }
        settings = load(write_config(tmp_path, served, **sections))
        change = compare(application.settings, settings)
        application.apply(change)
        assert (application.settings, change.needs_restart) == (settings, ())
        pool = application.http.pool(urls.parse(alpha.url).origin)
        assert pool is not None
        assert pool.limit == 7
        assert (await client.call("echo", text="on")).text == "on"


async def test_the_flag_still_overrides_the_file_and_is_not_a_change(servers: Servers, tmp_path: Path) -> None:
    async with two_servers(servers, tmp_path) as (proxy, config, alpha, _):  # with --listen
        rewrite(config, {"alpha": open_server(alpha)}, listen="127.0.0.1:1")
        assert (await hangup(proxy)).endswith("nothing has changed")
        assert "restart" not in proxy.err


async def test_a_changed_secret_file_is_used_from_then_on(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    alpha = await servers.mcp_server(issuer)
    server = unattended(issuer, alpha.url, tmp_path)
    secret = tmp_path / "agent-secret"
    good = secret.read_text()
    secret.write_text("another")
    config = write_config(tmp_path, {"alpha": server})
    async with proxy_process(config) as proxy, proxy.client("alpha") as client:
        assert "error" in (await client.call("echo", text="x")).message
        secret.write_text(good)
        await until(lambda: "configuration reloaded: changed alpha" in proxy.err)
        assert (await client.call("echo", text="rotated")).text == "rotated"


async def test_without_a_file_there_is_nothing_to_reload(servers: Servers, tmp_path: Path) -> None:
    alpha = await servers.mcp_server()
    env = {"XDG_DATA_HOME": str(tmp_path), "MCP_AUTH_PROXY_CONFIG": None}
    async with serving(open_server(alpha)["url"], "--listen", "127.0.0.1:0", env=env, cwd=tmp_path) as proxy:
        proxy.process.send_signal(signal.SIGHUP)
        await until(lambda: "there is nothing to reload" in proxy.err)
        async with proxy.client("server") as client:
            assert (await client.call("echo", text="on")).text == "on"


IN_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "mcp_auth_proxy", *sys.argv[1:]])
"""


async def test_a_proxy_whose_terminal_is_closed_ends(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"alpha": "http://127.0.0.1:9/mcp"})
    terminal, inside = os.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", IN_A_TERMINAL, "serve", "--config", str(config)),
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    os.set_blocking(terminal, False)
    shown = bytearray()

    def is_ready() -> bool:
        with suppress(BlockingIOError):
            shown.extend(os.read(terminal, 65536))
        return b"is listening at" in shown

    try:
        await until(is_ready, "the proxy is ready", timeout=20)
        os.close(terminal)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
