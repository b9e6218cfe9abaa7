"""``healthcheck``: asks the proxy of a configuration directly, and exits with 0, or with 1 and one line."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bench.processes import free_port
from fakes.proxy import proxy_process, run_command, write_config
from fakes.raw_server import Peer, RawServer
from mcp_auth_proxy.cli import healthcheck
from mcp_auth_proxy.config.settings import Address

NO_WAY = dict.fromkeys(["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"], "http://127.0.0.1:9")
"""A forward proxy that does not exist, for everything."""


@pytest.fixture(params=["health_listen", "listen"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A configuration with the health endpoints at a known port, of all addresses if they are apart."""
    port = free_port()
    sections = {"health_listen": f"0.0.0.0:{port}"} if request.param == "health_listen" else {}
    listen = f"127.0.0.1:{free_port() if sections else port}"
    yield write_config(tmp_path, {"notes": "https://mcp.example.com/mcp"}, listen=listen, **sections)  # type: ignore[arg-type]


def listen_of(config: Path) -> str:
    return str(yaml.safe_load(config.read_text())["listen"])


async def failed(config: Path) -> str:
    """Return the line of a check that fails."""
    code, out, err = await run_command("healthcheck", "--config", str(config))
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: ")
    return err


async def test_a_proxy_that_is_ready(config: Path) -> None:
    async with proxy_process(config, listen=listen_of(config)):
        checked = await run_command("healthcheck", "--config", str(config), env=NO_WAY)
        found = await run_command("healthcheck", cwd=config.parent)
    assert checked == found == (0, "ready\n", "")


async def test_a_proxy_that_does_not_run(config: Path) -> None:
    assert "/readyz can't be reached: Connection refused" in await failed(config)


async def test_a_running_proxy_whose_file_was_broken_and_whose_secret_is_gone(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    oauth = {"client_id": "c", "client_secret": "file:secret"}
    server = {"url": "https://mcp.example.com/mcp", "oauth": oauth}
    config = write_config(tmp_path, {"notes": server}, listen=f"127.0.0.1:{free_port()}")
    async with proxy_process(config, listen=listen_of(config)):
        (tmp_path / "secret").unlink()
        config.write_text(config.read_text() + "nonsense: 1\n")
        assert (await run_command("healthcheck", "--config", str(config)))[0] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist"),
        ("listen: 8787", "listen: must be HOST:PORT"),
        ("servers: [", "not valid YAML"),
        ("health_listen: 0.0.0.0:8787", "health_listen: must be another address than listen (127.0.0.1:8787)"),
    ],
)
async def test_a_configuration_that_names_no_address(tmp_path: Path, text: str | None, words: str) -> None:
    config = tmp_path / "c.yaml"
    if text is not None:
        config.write_text(text)
    assert words in await failed(config)


async def test_no_configuration_at_all(tmp_path: Path) -> None:
    nothing = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "MCP_AUTH_PROXY_CONFIG": None}
    code, _, err = await run_command("healthcheck", cwd=tmp_path, env=nothing)
    assert (code, err.count("\n")) == (1, 1)
    assert "No configuration was found" in err
    assert "healthcheck http" not in err


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b'HTTP/1.1 503 X\r\nContent-Length: 21\r\n\r\n{"status":"draining"}', "answered 503 (draining)"),
        (b'HTTP/1.1 503 X\r\nContent-Length: 15\r\n\r\n{"reason":"no"}', "answered 503 (no)"),
        (b"HTTP/1.1 404 X\r\nContent-Length: 3\r\n\r\nno\n", "answered 404 (no)"),
        (b"HTTP/1.1 404 X\r\nContent-Length: 2\r\n\r\n[]", "answered 404 ([])"),
        (b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n", "answered 500 (no reason is given)"),
        (b"SSH-2.0-OpenSSH\r\n", "gave no proper HTTP response"),
        (b"", "gave no proper HTTP response"),
        (None, "can't be reached: timed out"),
    ],
)
async def test_an_answer_that_is_not_ready(monkeypatch: pytest.MonkeyPatch, answer: bytes | None, words: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        if answer is None:
            await peer.gone.wait()
        else:
            await peer.send(answer)

    monkeypatch.setattr(healthcheck, "TIMEOUT", 0.3)
    async with RawServer(script) as server:
        problem = await asyncio.to_thread(healthcheck.problem_at, Address("127.0.0.1", server.port))
    assert problem is not None
    assert words in problem


def test_it_starts_without_the_proxy() -> None:
    """It runs every few seconds: on a small machine the rest of the program would be most of its time."""
    script = (
        "import sys; sys.argv = ['x', 'healthcheck', '--config', '/none']\n"
        "from mcp_auth_proxy.cli.main import main\n"
        "try: main()\n"
        "finally: print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    heavy = {"asyncio", "uvloop", "starlette", "uvicorn", "jinja2", "mcp_auth_proxy.app", "mcp_auth_proxy.store"}
    assert heavy & set(done.stdout.split()) == set()
