"""Outbound requests of a running proxy: forward proxies in its environment, and one HTTP client."""

import asyncio
import subprocess
import sys
from pathlib import Path

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.proxy import proxy_process, run_command, write_config
from fakes.raw_server import Peer, RawServer


async def test_odd_entries_of_no_proxy_are_named_at_start_and_change_nothing(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization={"wait": "30s"})
    # Nothing listens at port 9: what went to that proxy would fail. Loopback does not go there.
    env = {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "a.example, 10.0.0.0/99, , host:notaport", "no_proxy": None}
    async with proxy_process(config, env=env) as proxy, proxy.client("notes") as client:
        lines = [line for line in proxy.err.splitlines() if "NO_PROXY" in line]
        assert len(lines) == 1
        assert "'10.0.0.0/99', 'host:notaport'" in lines[0]
        assert "a.example" not in lines[0]
        call = asyncio.create_task(client.call("echo", text="x"))
        await consent(await proxy.next_link())
        assert (await call).text == "x"
        assert await proxy.stop() == 0


async def test_an_unusable_proxy_in_the_environment_is_a_configuration_error(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"notes": "http://127.0.0.1:9/mcp"})
    env = {"HTTPS_PROXY": "socks5://me:hidden@127.0.0.1:9", "https_proxy": None}
    code, _, err = await run_command("serve", "--config", str(config), env=env)
    assert code == 2
    assert "HTTPS_PROXY in the environment must be like http://host:port" in err
    assert "hidden" not in err


async def test_a_name_that_only_the_forward_proxy_can_look_up_needs_a_key(  # T87
    servers: Servers, tmp_path: Path
) -> None:
    name = f"{'a' * 64}.example"  # no resolver takes a label of 64 characters, so none is asked
    asked: list[bytes] = []

    async def refuse(peer: Peer) -> None:
        asked.append(await peer.head())
        await peer.send(b"HTTP/1.1 407 No\r\n\r\n")

    upstream = await servers.mcp_server(metadata_changes={"authorization_servers": [f"https://{name}"]})
    async with RawServer(refuse) as forward:
        env = {
            "HTTPS_PROXY": f"http://127.0.0.1:{forward.port}",
            "https_proxy": None,
            "NO_PROXY": None,
            "no_proxy": None,
        }
        config = write_config(tmp_path, {"notes": upstream.url})
        async with proxy_process(config, env=env) as proxy, proxy.client("notes") as client:
            answer = await client.call("echo", text="x")
            assert "outbound.trust_proxy" in answer.error["message"]
        assert asked == []
        config = write_config(tmp_path, {"notes": upstream.url}, outbound={"trust_proxy": "true"})
        async with proxy_process(config, env=env) as proxy, proxy.client("notes") as client:
            answer = await client.call("echo", text="x")
            assert "answered 407" in answer.error["message"]
        assert asked[0].startswith(f"CONNECT {name}:443 HTTP/1.1".encode())


def test_a_running_proxy_imports_one_http_client() -> None:
    code = "import sys, mcp_auth_proxy.app, mcp_auth_proxy.cli.serve; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"httpx2", "httpcore2", "mcp"} & set(done.stdout.split())
