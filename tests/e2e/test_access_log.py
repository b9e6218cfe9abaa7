"""The access log of a running proxy, and the trace id of a request wherever the proxy writes about it."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fakes.fixtures import Servers
from fakes.http_exchange import FakeResponse
from fakes.mcp_client import MODERN
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import ProxyProcess, proxy_process, until, write_config
from fakes.raw_client import RawClient
from fakes.unattended import unattended

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"
CANARY = "cAnArY-of-an-argument"


@asynccontextmanager
async def logging_proxy(
    servers: Servers, folder: Path, *arguments: str, **server: Any
) -> AsyncIterator[tuple[ProxyProcess, FakeMcpServer]]:
    """A proxy process that has a token already, started with these arguments."""
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    config = write_config(folder, {"notes": unattended(issuer, upstream.url, folder, **server)})
    async with proxy_process(config, *arguments) as proxy:
        yield proxy, upstream


def lines(proxy: ProxyProcess) -> list[dict[str, str]]:
    """The access log so far, in the form of text."""
    found = [line for line in proxy.err.splitlines() if re.match(r"\S+ \S+ info    request ", line)]
    return [dict(pair.split("=", 1) for pair in line.split()[4:]) for line in found]


async def test_each_finished_request_is_one_line(servers: Servers, tmp_path: Path) -> None:
    async with logging_proxy(servers, tmp_path, "--access-log") as (proxy, _):
        async with proxy.client("notes") as client:
            reply = await client.call("echo", text=CANARY)  # obtains the token first
            again = await client.call("echo", text=CANARY)  # on the fast path
            await client.delete()
        await until(lambda: len(lines(proxy)) == 3)
        first, second, third = lines(proxy)
        for line in (first, second, third):
            assert (line["server"], line["account"]) == ("notes", "local/default")
            assert 0 < float(line.pop("duration_ms")) < 20_000
        assert (first["method"], first["status"], first["bytes"]) == ("POST", "200", str(len(reply.body)))
        assert second == {
            "server": "notes",
            "account": "local/default",
            "method": "POST",
            "status": "200",
            "bytes": str(len(again.body)),
        }
        assert third["method"] == "DELETE"
        assert CANARY not in proxy.err
        # What is no request to an MCP endpoint of a configured server is not logged.
        assert not re.search("readyz|nobody", proxy.err)


async def test_it_is_off_by_default_and_always_on_at_debug(servers: Servers, tmp_path: Path) -> None:
    for arguments, count in (((), 0), (("--log-level", "debug"), 1), (("--log-level", "warning", "--access-log"), 1)):
        async with logging_proxy(servers, tmp_path, *arguments) as (proxy, _), proxy.client("notes") as client:
            await client.call("echo", text=CANARY)
            await proxy.stop()
            assert len(lines(proxy)) == count, arguments
            assert CANARY not in proxy.err
            assert proxy.err.count(" request ") == count, proxy.err


async def test_the_method_of_mcp_is_shown_if_the_client_mirrors_it_or_the_body_was_read(
    servers: Servers, tmp_path: Path
) -> None:
    async with logging_proxy(servers, tmp_path, "--access-log") as (proxy, _):
        async with proxy.client("notes", version=MODERN) as modern, proxy.client("notes") as client:
            await modern.call("echo", text="x")
            await client.initialize()
            await client.post("ping", headers={"Mcp-Method": f"Bearer {CANARY}"})
        await until(lambda: len(lines(proxy)) == 4)
        assert [line.get("mcp_method") for line in lines(proxy)] == ["tools/call", "initialize", None, None]
        assert CANARY not in proxy.err


async def test_a_client_that_went_away_is_499(servers: Servers, tmp_path: Path) -> None:
    async with logging_proxy(servers, tmp_path, "--access-log") as (proxy, upstream):
        upstream.answers["ping"] = FakeResponse.hang()
        async with RawClient.to(proxy.origin) as raw:
            raw.post(b'{"jsonrpc":"2.0","id":1,"method":"ping"}')
            await until(lambda: upstream.calls("ping"))
        await until(lambda: lines(proxy))
        assert (lines(proxy)[0]["status"], lines(proxy)[0]["bytes"]) == ("499", "0")


async def test_as_json_the_names_are_members(servers: Servers, tmp_path: Path) -> None:
    async with logging_proxy(servers, tmp_path, "--access-log", "--log-format", "json") as (proxy, _):
        async with proxy.client("notes") as client:
            await client.http.post(
                client.url, json={"jsonrpc": "2.0", "method": "x"}, headers={"traceparent": TRACEPARENT}
            )
        await until(lambda: '"status"' in proxy.err)
        (entry,) = (json.loads(line) for line in proxy.err.splitlines() if '"status"' in line)
        assert (entry["message"], entry["server"], entry["trace_id"]) == ("request", "notes", TRACE)
        assert isinstance(entry["status"], int)


# Traces


async def test_traceparent_is_forwarded_unchanged_whatever_its_value(servers: Servers, tmp_path: Path) -> None:
    """The requests share an upstream connection, which the first one made: its trace is not that of the others."""
    async with logging_proxy(servers, tmp_path, "--access-log") as (proxy, upstream):
        for value in (TRACEPARENT, "00-NOT-A-TRACE", f"00-{'0' * 32}-b7ad6b7169203331-01"):
            async with proxy.client("notes") as client:
                await client.post("ping", headers={"traceparent": value, "tracestate": "a=1,b=2"})
            received = dict(upstream.calls("ping")[-1].headers)
            assert (received[b"traceparent"], received[b"tracestate"]) == (value.encode(), b"a=1,b=2")
        await until(lambda: len(lines(proxy)) == 3)
        assert [line.get("trace_id") for line in lines(proxy)] == [TRACE, None, None]
        assert "NOT-A-TRACE" not in proxy.err


@pytest.mark.parametrize("traceparent", [TRACEPARENT, "00-NOT-A-TRACE"])
async def test_an_error_of_the_proxy_has_the_trace_id_in_its_data_and_in_the_log(
    servers: Servers, tmp_path: Path, traceparent: str
) -> None:
    async with logging_proxy(servers, tmp_path, upstream_timeout="300ms") as (proxy, upstream):
        upstream.answers["ping"] = FakeResponse.hang()
        async with proxy.client("notes") as client:
            reply = await client.post("ping", headers={"traceparent": traceparent})
        assert reply.status == 504
        assert reply.error["data"].get("trace_id") == (TRACE if traceparent == TRACEPARENT else None)
        await until(lambda: "server notes" in proxy.err)
        (line,) = (line for line in proxy.err.splitlines() if "server notes: " in line and "warning" in line)
        assert (f"trace_id={TRACE}" in line) == (traceparent == TRACEPARENT)


@pytest.mark.parametrize("capabilities", [{}, {"elicitation": {"url": {}}}], ids=["plain", "elicitation"])
async def test_an_answer_with_the_link_has_the_trace_id_too(
    servers: Servers, tmp_path: Path, capabilities: dict[str, Any]
) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization={"wait": "0s"})
    async with proxy_process(config) as proxy:
        version = MODERN if not capabilities else "2025-11-25"
        async with proxy.client("notes", version=version, capabilities=capabilities) as client:
            reply = await client.post(
                "initialize" if capabilities else "tools/list",
                {"capabilities": capabilities},
                headers={"traceparent": TRACEPARENT},
            )
        assert reply.error["code"] == (-32042 if capabilities else -32001)
        assert reply.error["data"]["trace_id"] == TRACE
        assert reply.error["data"]["authorization_url"].startswith(proxy.origin)
