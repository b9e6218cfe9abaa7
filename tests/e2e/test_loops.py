"""Proxies that lead to themselves or to each other (T85): refused at start, and bounded by a hop count."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import yaml

from fakes.fixtures import Servers
from fakes.mcp_client import PlainClient
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import RunningProxy, proxy_process, run_command, running_proxy, until, write_config
from fakes.raw_client import RawClient
from mcp_auth_proxy.config.settings import Address

PING = json.dumps({"jsonrpc": "2.0", "id": 7, "method": "ping"})


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@asynccontextmanager
async def chain(folder: Path, url: str, length: int) -> AsyncIterator[list[RunningProxy]]:
    """Run proxies in a row before a server; the last one leads to all others."""
    async with AsyncExitStack() as stack:
        proxies: list[RunningProxy] = []
        for number in range(length):
            (folder / str(number)).mkdir()
            proxies.append(await stack.enter_async_context(running_proxy(folder / str(number), {"notes": url})))
            url = f"{proxies[-1].origin}/notes/mcp"
        yield proxies


def hops_at(server: FakeMcpServer) -> list[bytes]:
    return [value for request in server.calls() for name, value in request.headers if b"hops" in name]


async def test_check_and_serve_refuse_a_server_that_is_the_proxy_itself(tmp_path: Path) -> None:
    port = free_port()
    urls = {
        "a": f"http://127.0.0.1:{port}/b/mcp",
        "b": f"http://[::ffff:127.0.0.1]:{port}/a/mcp",
        "c": "https://proxy.example/c/mcp",
        "fine": "https://mcp.example.com/mcp",
    }
    listen = f"127.0.0.1:{port}"
    config = write_config(tmp_path, urls, listen=listen, public_url="https://proxy.example")
    for command in ("check", "serve"):
        code, _, err = await run_command(command, "--config", str(config))
        assert code == 2
        for name in ("a", "b", "c"):
            assert f"servers.{name}.url: leads to this proxy itself" in err
        assert "fine" not in err
    code, _, err = await run_command("serve", urls["a"], "--listen", listen)
    assert code == 2
    assert "URL: leads to this proxy itself" in err


async def test_a_reload_that_leads_to_the_proxy_itself_changes_nothing(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server()
    upstream.protected = False
    config = write_config(tmp_path, {"notes": upstream.url})
    async with proxy_process(config) as proxy, proxy.client("notes") as client:
        port = proxy.origin.rpartition(":")[2]
        document = yaml.safe_load(config.read_text())
        document["servers"] = {"notes": {"url": f"http://localhost:{port}/notes/mcp"}}
        config.write_text(yaml.safe_dump(document))
        await until(lambda: "configuration not reloaded" in proxy.err, "a refused reload")
        assert "servers.notes.url: leads to this proxy itself" in proxy.err
        assert (await client.call("echo", text="x")).text == "x"


async def test_a_circle_of_proxies_ends_with_508(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "b").mkdir()
    async with (
        running_proxy(tmp_path, {"notes": f"http://127.0.0.1:{port}/notes/mcp"}) as first,
        running_proxy(
            tmp_path / "b", {"notes": f"{first.origin}/notes/mcp"}, listen=Address("127.0.0.1", port)
        ) as second,
        RawClient.to(first.origin) as raw,
    ):
        for _ in range(5):  # the later ones on the fast path
            raw.send(f"POST /notes/mcp HTTP/1.1\nHost: HOST\nContent-Length: {len(PING)}\n\n{PING}")
            answer = await raw.answer()
            assert answer.status == 508
            message = json.loads(answer.body)
            assert message["id"] == 7
            assert "loop" in message["error"]["message"]
            assert "servers.notes.url" in message["error"]["message"]
            assert answer.all("mcp-auth-proxy-hops") == []
        for proxy in (first, second):
            opened = sum(proxy.application.http.connections().values())
            assert opened <= 2


async def test_the_log_names_who_sent_a_request_in_a_loop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    named = []
    for trusted in ([], ["127.0.0.1"]):
        caplog.clear()
        inbound = {"trusted_proxies": trusted}
        async with running_proxy(tmp_path, {"notes": "http://127.0.0.1:9/mcp"}, inbound=inbound) as proxy:
            headers = {"mcp-auth-proxy-hops": "3", "x-forwarded-for": "198.51.100.9, 192.0.2.7"}  # T33
            async with PlainClient(f"{proxy.origin}/notes/mcp", headers=headers) as client:
                for _ in range(3):
                    reply = await client.call("echo", text="x")
                    assert (reply.status, "127.0.0.1" in reply.message) == (508, False)
        (line,) = [record.getMessage() for record in caplog.records if "loop" in record.getMessage()]
        named.append(line.partition("It came from ")[2])
    assert named == ["127.0.0.1.", "192.0.2.7 through 127.0.0.1."]


async def test_a_chain_of_proxies_works(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server()
    upstream.protected = False
    async with chain(tmp_path, upstream.url, 4) as proxies:
        async with proxies[1].client("notes") as client:
            for text in ("x", "y", "z"):
                assert (await client.call("echo", text=text)).text == text
        async with proxies[2].client("notes") as client:
            assert (await client.call("echo", text="x")).text == "x"
        assert hops_at(upstream) == [b"2", b"2", b"2", b"3"]
        async with proxies[3].client("notes") as client:
            assert (await client.call("echo", text="x")).status == 508
    assert len(upstream.calls()) == 4


async def test_a_client_can_only_shorten_its_own_way(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server()
    upstream.protected = False
    async with chain(tmp_path, upstream.url, 1) as (proxy,):
        for sent, status in (("0", 200), ("2", 200), ("3", 508), ("-5", 508), ("1, x-a: b", 508)):
            headers = {"mcp-auth-proxy-hops": sent, "connection": "mcp-auth-proxy-hops"}
            async with PlainClient(f"{proxy.origin}/notes/mcp", headers=headers) as client:
                assert (await client.call("echo", text="x")).status == status, sent
    assert hops_at(upstream) == [b"1", b"3"]


async def test_a_document_that_leads_to_the_proxy_itself_is_refused_at_once(servers: Servers, tmp_path: Path) -> None:
    # T85: the discovery of a server would wait for a request that waits for the discovery.
    upstream = await servers.mcp_server(await servers.authorization_server())
    async with (
        running_proxy(tmp_path, {"notes": upstream.url}, authorization={"wait": "0s"}) as proxy,
        proxy.client("notes") as client,
    ):
        upstream.challenges = {401: [f'Bearer resource_metadata="{proxy.origin}/notes/mcp"']}
        async with asyncio.timeout(5):
            reply = await client.call("echo", text="x")
        assert "HTTP 508" in reply.error["message"]
        assert len(upstream.calls()) == 1
