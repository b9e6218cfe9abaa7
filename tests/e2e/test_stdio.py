"""``stdio`` as clients start it: as a program, over a proxy that it starts or that runs already."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.types import TextContent

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import RealMcpServer, Servers
from fakes.headless import consent
from fakes.http_exchange import FakeResponse
from fakes.line_client import BridgeProcess, bridge_process
from fakes.mcp_client import MODERN
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import link_in, proxy_process, run_command, until, write_config


@pytest.fixture
async def upstream(servers: Servers) -> FakeMcpServer:
    return await servers.mcp_server(protected=False, sessions_on=True)


def served(folder: Path) -> list[dict[str, Any]]:
    """Return what the processes that serve over the store say of themselves."""
    found = []
    for path in folder.glob(".*.serving"):
        try:
            found.append(json.loads(path.read_text()))
        except FileNotFoundError:
            continue
    return found


async def proxy_has_ended(folder: Path) -> None:
    """Wait until the proxy of the bridges has seen that there is none any more."""
    await until(lambda: not served(folder), "the end of the proxy")


async def echo(bridge: BridgeProcess, id: int, *, modern: bool = False) -> str:
    bridge.call(id=id, text=f"text {id}", modern=modern)
    answer = await bridge.answer(id)
    assert "result" in answer, answer
    text: str = answer["result"]["content"][0]["text"]
    return text


# The official client


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_the_sdks_client_uses_the_tools_after_consent(
    real_mcp_server: RealMcpServer, authorization_server: FakeAuthorizationServer, tmp_path: Path, mode: Any
) -> None:
    config = write_config(tmp_path, {"notes": real_mcp_server.url}, authorization={"wait": "20s"})
    log = tmp_path / "log"
    parameters = StdioServerParameters(
        command=sys.executable,
        args=["-m", "mcp_auth_proxy", "stdio", "notes", "--config", str(config)],
        env=dict(os.environ),
    )

    async def consent_to_link() -> None:
        await until(lambda: re.search(r"http://\S+/connect/\S+", log.read_text()), "a link in the log")
        found = re.search(r"http://\S+/connect/\S+", log.read_text())
        assert found is not None
        assert (await consent(found[0])).status_code == 200

    with log.open("w") as errors:
        consenting = asyncio.create_task(consent_to_link())
        async with Client(stdio_client(parameters, errlog=errors), mode=mode) as client:
            assert (client.protocol_version == MODERN) is (mode == "auto")
            await consenting
            assert "whoami" in [tool.name for tool in (await client.list_tools()).tools]
            result = await client.call_tool("echo", {"text": "hello"})
            assert [part.text for part in result.content if isinstance(part, TextContent)] == ["hello"]
    await proxy_has_ended(tmp_path)
    assert "Traceback" not in log.read_text()


async def test_the_proxys_answers_are_passed_on_unchanged(servers: Servers, tmp_path: Path) -> None:
    authority = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(authority)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization={"wait": "0s", "cold_start": False})
    async with proxy_process(config) as proxy, bridge_process("notes", "--config", str(config)) as bridge:
        bridge.call(id=1, modern=True)
        answer = await bridge.answer(1)
        link = link_in(answer)
        assert link.startswith(f"{proxy.origin}/connect/notes?flow=")
        assert answer["result"]["isError"] is True
        # A user who takes long: the next call works, without a new start of anything.
        assert (await consent(link)).status_code == 200
        assert await echo(bridge, 2, modern=True) == "text 2"
        assert len(served(tmp_path)) == 1, "a running proxy is used"


# One proxy for all


async def test_bridges_share_a_proxy_and_survive_each_other_and_it(upstream: FakeMcpServer, tmp_path: Path) -> None:
    config = write_config(tmp_path, {"notes": upstream.url, "other": upstream.url})
    async with (
        bridge_process("notes", "--config", str(config)) as first,
        bridge_process("other", "--config", str(config)) as second,
    ):
        await asyncio.gather(first.initialize(), second.initialize())
        assert await echo(first, 1) == "text 1"
        (proxy,) = served(tmp_path)
        gate = asyncio.Event()
        held = upstream.log.wait_for(lambda received: received.tool == "slow")
        slow = {"jsonrpc": "2.0", "id": 2, "result": {"slow": True}}
        upstream.script("tools/call:slow", FakeResponse(body=json.dumps(slow).encode(), gate=gate))
        second.call("slow", id=2)
        await held
        # The bridge that has started the proxy, maybe: what the other one waits for is not lost.
        first.process.kill()
        await first.wait()
        gate.set()
        assert (await second.answer(2))["result"] == {"slow": True}
        # And the proxy: the next request goes to the next one, in the same session.
        os.kill(proxy["pid"], signal.SIGKILL)
        assert await echo(second, 3) == "text 3"
        (other,) = served(tmp_path)
        assert other["pid"] != proxy["pid"]
        assert len(upstream.calls("initialize")) == 2
        second.close()
        assert await second.wait() == 0
    await proxy_has_ended(tmp_path)


async def test_bridges_that_begin_at_once_start_one_proxy(upstream: FakeMcpServer, tmp_path: Path) -> None:
    config = write_config(tmp_path, {"notes": upstream.url})

    @asynccontextmanager
    async def initialized() -> AsyncIterator[BridgeProcess]:
        async with bridge_process("notes", "--config", str(config)) as bridge:
            await bridge.initialize()
            yield bridge

    started = [initialized() for _ in range(4)]
    bridges = await asyncio.gather(*(each.__aenter__() for each in started))
    try:
        assert len(served(tmp_path)) == 1
        assert sum("one is started" in bridge.err for bridge in bridges) == 1
    finally:
        for each in started:
            await each.__aexit__(None, None, None)


async def test_a_running_proxy_that_is_restarted_is_used_again(upstream: FakeMcpServer, tmp_path: Path) -> None:
    config = write_config(tmp_path, {"notes": upstream.url})
    async with proxy_process(config) as proxy, bridge_process("notes", "--config", str(config)) as bridge:
        await bridge.initialize()
        assert await proxy.stop() == 0
        async with proxy_process(config):
            assert await echo(bridge, 1) == "text 1"
            assert "one is started" not in bridge.err


async def test_a_flow_outlives_the_client_that_began_it(servers: Servers, tmp_path: Path) -> None:
    """A client gave up, and its user consents afterwards."""
    authority = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(authority)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization={"wait": "0s"})
    async with bridge_process("notes", "--config", str(config)) as bridge:
        bridge.call(id=1, modern=True)
        link = link_in(await bridge.answer(1))
        bridge.process.kill()
        await bridge.process.wait()
    assert (await consent(link)).status_code == 200
    await proxy_has_ended(tmp_path)


async def test_a_url_needs_no_configuration_and_urls_do_not_share_a_proxy(servers: Servers, tmp_path: Path) -> None:
    """The store is the same, and so may the port be that one of them wants."""
    one = await servers.mcp_server(protected=False)
    other = await servers.mcp_server(protected=False)
    env = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    folder = tmp_path / "mcp-auth-proxy"
    async with bridge_process(one.url, env=env) as first, bridge_process(other.url, env=env) as second:
        assert [await echo(bridge, 1, modern=True) for bridge in (first, second)] == ["text 1", "text 1"]
        assert [len(each.calls("tools/call")) for each in (one, other)] == [1, 1]
        assert len(served(folder)) == 2
        assert str(one.url) not in json.dumps(served(folder))
    await proxy_has_ended(folder)


# Ends and errors


async def test_a_signal_ends_the_session_and_the_bridge(upstream: FakeMcpServer, tmp_path: Path) -> None:
    config = write_config(tmp_path, {"notes": upstream.url})
    async with proxy_process(config), bridge_process("notes", "--config", str(config)) as bridge:
        await bridge.initialize()
        await until(lambda: upstream.sessions)
        bridge.process.terminate()
        assert await bridge.wait() == 0
        assert upstream.sessions == {}


async def test_a_proxy_that_can_not_start_is_an_answer_and_a_reason_in_the_log(
    upstream: FakeMcpServer, tmp_path: Path
) -> None:
    config = write_config(tmp_path, {"notes": upstream.url})
    (tmp_path / "proxy.db").write_bytes(b"not a store, and more than a hundred bytes long " * 10)
    (tmp_path / "proxy.key").write_text("not a key")
    async with bridge_process("notes", "--config", str(config)) as bridge:
        bridge.send("ping", id=1)
        error = (await bridge.answer(1))["error"]
        assert error["code"] == -32002
        assert "could not be started" in error["message"]
        bridge.close()
        assert await bridge.wait() == 0
    assert "key" in bridge.err


async def test_a_client_that_reads_no_more_ends_the_bridge(upstream: FakeMcpServer, tmp_path: Path) -> None:
    config = write_config(tmp_path, {"notes": upstream.url})
    reader, writer = os.pipe()
    async with proxy_process(config):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mcp_auth_proxy", "stdio", "notes", "--config", str(config)),
            stdin=asyncio.subprocess.PIPE,
            stdout=writer,
            stderr=asyncio.subprocess.DEVNULL,
        )
        os.close(writer)
        os.close(reader)
        assert process.stdin is not None
        process.stdin.write(b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n')
        async with asyncio.timeout(20):
            assert await process.wait() == 0


async def test_a_client_that_does_not_read_the_log_is_not_waited_for(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(protected=False)
    config = write_config(tmp_path, {"notes": upstream.url})
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x" * 4096):
            pass
    os.set_blocking(writer, True)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mcp_auth_proxy", "stdio", "notes", "--config", str(config), "--log-format", "json"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=writer,
    )
    os.close(writer)
    out, _ = await asyncio.wait_for(process.communicate(b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n'), 30)
    os.close(reader)
    assert json.loads(out)["result"] == {}
    await proxy_has_ended(tmp_path)


async def test_input_and_output_may_be_files(upstream: FakeMcpServer, tmp_path: Path) -> None:
    config = write_config(tmp_path, {"notes": upstream.url})
    (tmp_path / "in").write_text('{"jsonrpc":"2.0","id":1,"method":"ping"}\nnot json\n')
    with (tmp_path / "in").open() as given, (tmp_path / "out").open("w") as taken:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mcp_auth_proxy", "stdio", "notes", "--config", str(config)),
            stdin=given,
            stdout=taken,
            stderr=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(20):
            assert await process.wait() == 0
    answers = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert sorted(answer["id"] or 0 for answer in answers) == [0, 1]


# A proxy elsewhere, and callers


async def test_a_proxy_elsewhere_is_used_with_a_key(upstream: FakeMcpServer, tmp_path: Path) -> None:
    config = write_config(tmp_path, {"notes": upstream.url}, inbound={"mode": "api_key"})
    code, key, err = await run_command("api-keys", "create", "anna", "--config", str(config))
    assert code == 0, err
    env = {"PROXY_KEY": key.strip()}
    async with proxy_process(config) as proxy:
        options = ("--url", proxy.origin, "--api-key", "env:PROXY_KEY")
        async with bridge_process("notes", *options, env=env) as bridge:
            await bridge.initialize()
            assert await echo(bridge, 1) == "text 1"
        async with bridge_process("notes", "--config", str(config), "--api-key", "env:PROXY_KEY", env=env) as bridge:
            assert await echo(bridge, 1, modern=True) == "text 1"
        async with bridge_process("notes", *options, env={"PROXY_KEY": "mapk_wrong"}) as bridge:
            bridge.send("ping", id=1)
            assert (await bridge.answer(1))["error"]["code"] == -32005
    assert key.strip() not in bridge.err + proxy.log
    async with bridge_process("notes", *options, env=env) as bridge:
        bridge.send("ping", id=1)
        assert "can't be reached" in (await bridge.answer(1))["error"]["message"]


async def test_a_proxy_that_asks_for_no_key_is_used_without_one(upstream: FakeMcpServer, tmp_path: Path) -> None:
    config = write_config(tmp_path, {"notes": upstream.url})
    async with proxy_process(config) as proxy:
        async with bridge_process("notes", "--url", proxy.origin) as bridge:
            await bridge.initialize()
            assert await echo(bridge, 1) == "text 1"
        async with bridge_process("notes", "--url", f"{proxy.origin}/notes/mcp") as bridge:
            assert await echo(bridge, 1, modern=True) == "text 1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("notes", "--url", "https://proxy.example.com", "--config", "x.yaml"), "not both"),
        (("https://a.example/mcp", "--url", "https://proxy.example.com", "--api-key", "env:K"), "name of a server"),
        (("notes", "--url", "http://proxy.example.com", "--api-key", "env:K"), "https://"),
        (("notes", "--url", "https://proxy.example.com", "--api-key", "mapk_1"), "env:NAME or file:PATH"),
        (("a.example/mcp",), "https://"),
        (("https://a.example/mcp", "--config", "x.yaml"), "not both"),
        (("notes", "--config", "nowhere.yaml"), "does not exist"),
    ],
)
async def test_wrong_usage_exits_with_2_and_writes_nothing_to_stdout(arguments: tuple[str, ...], said: str) -> None:
    code, out, err = await run_command("stdio", *arguments, env={"K": "k"})
    assert (code, out) == (2, "")
    assert said in err
