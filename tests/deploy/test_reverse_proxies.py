"""The reverse proxies of docs/deployment.md, run as the examples there say, with TLS in front of the proxy."""

import asyncio
import json
import re
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from bench import certificates
from bench.certificates import Certificates
from bench.processes import Child, free_port
from conftest import SEARCH
from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.http_exchange import Channel, FakeResponse
from fakes.mcp_client import events
from fakes.nginx import command
from fakes.proxy import running_proxy
from mcp_auth_proxy.config.settings import Address, LimitSettings

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/deployment.md"
DOMAIN = "mcp-auth-proxy.example.com"
MIB = 1024 * 1024


def example(language: str, word: str) -> str:
    """Return the block of the documentation that has this word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (found,) = (block for block in blocks if word in block)
    return str(found)


def moved(text: str, files: Certificates, *, port: int, upstream: int) -> str:
    """Return an example with the ports and certificates of this test. Everything else stays as it is."""
    changes = {
        "127.0.0.1:8787": f"127.0.0.1:{upstream}",
        "port_value: 8787": f"port_value: {upstream}",
        "port_value: 443": f"port_value: {port}",
        "listen 443": f"listen {port}",
        "/etc/ssl/mcp-auth-proxy/fullchain.pem": str(files.certificate),
        "/etc/ssl/mcp-auth-proxy/privkey.pem": str(files.key),
    }
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def nginx(folder: Path, files: Certificates, port: int, upstream: int) -> list[str]:
    server = moved(example("nginx", "proxy_pass"), files, port=port, upstream=upstream).replace(DOMAIN, "localhost")
    server = server.replace("$host", "$http_host")  # the port is not 443
    return command(folder, server)


def caddy(folder: Path, files: Certificates, port: int, upstream: int) -> list[str]:
    site = moved(example("caddyfile", "reverse_proxy"), files, port=port, upstream=upstream)
    own = f"https://localhost:{port} {{\n    tls {files.certificate} {files.key}"
    file = folder / "Caddyfile"
    file.write_text("{\n    admin off\n    auto_https disable_redirects\n}\n" + site.replace(f"{DOMAIN} {{", own))
    return ["caddy", "run", "--config", str(file), "--adapter", "caddyfile"]


def envoy(folder: Path, files: Certificates, port: int, upstream: int) -> list[str]:
    file = folder / "envoy.yaml"
    text = moved(example("yaml", "static_resources"), files, port=port, upstream=upstream)
    file.write_text(text.replace(DOMAIN, f'"localhost:{port}"'))
    return ["envoy", "--config-path", str(file), "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "error"]


Program = Callable[[Path, Certificates, int, int], list[str]]
PROGRAMS = [pytest.param(program, marks=getattr(pytest.mark, program.__name__)) for program in (nginx, caddy, envoy)]


@asynccontextmanager
async def in_front(program: Program, folder: Path, port: int, upstream: int) -> AsyncIterator[ssl.SSLContext]:
    """Run a reverse proxy; yield what its clients trust."""
    files = certificates.create(folder)
    environment = {"HOME": str(folder), "PATH": SEARCH}
    child = Child(program(folder, files, port, upstream), log=folder / "reverse.log", environment=environment)
    try:
        await asyncio.to_thread(child.wait_for, port)
        yield ssl.create_default_context(cafile=files.authority)
    finally:
        child.stop()


def test_nginx_waits_an_hour_for_the_next_event_and_takes_what_the_proxy_takes() -> None:
    found = dict(re.findall(r"^ +(\w+) ([^;{\n]+);", example("nginx", "proxy_pass"), re.MULTILINE))
    assert found["listen"] == "443 ssl"
    assert found["proxy_pass"] == "http://127.0.0.1:8787"
    assert (found["proxy_buffering"], found["proxy_request_buffering"]) == ("off", "off")
    assert (found["proxy_read_timeout"], found["proxy_send_timeout"]) == ("1h", "1h")
    assert int(found["client_max_body_size"].removesuffix("m")) * MIB >= LimitSettings().body


def test_envoy_waits_an_hour_for_the_next_event_and_for_ever_for_the_last() -> None:
    text = example("yaml", "static_resources")
    assert re.findall(r"\b\w*timeout: (\w+)", text) == ["3600s", "0s"]


@pytest.mark.parametrize("program", PROGRAMS)
async def test_login_calls_and_streams_pass(
    program: Program, servers: Servers, authorization_server: FakeAuthorizationServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(authorization_server)
    authorization_server.auto_consent = True
    port = free_port()
    origin = f"https://localhost:{port}"
    behind = free_port()
    async with (
        running_proxy(
            tmp_path,
            {"notes": upstream.url},
            listen=Address("127.0.0.1", behind),
            public_url=origin,
            authorization={"wait": "0s", "open_browser": "never"},
        ) as proxy,
        in_front(program, tmp_path, port, behind) as trusted,
        httpx2.AsyncClient(verify=trusted, trust_env=False, timeout=20) as http,
        proxy.client("notes") as client,
        Browser() as browser,
    ):
        client.http = browser.client = http
        refused = json.dumps((await client.call("echo")).message)
        (link,) = set(re.findall(rf"{origin}/connect/[^\s\"\\]+", refused))
        assert (await browser.follow(link)).status_code == 200
        assert (await client.call("echo", text="in")).text == "in"
        big = "x" * (15 * MIB)
        assert (await client.call("echo", text=big)).text == big

        # Each event arrives when it was sent, and not at the end.
        channel = Channel()
        upstream.answers["tools/call"] = FakeResponse.events(channel)
        message = client.message("tools/call", {"name": "echo", "arguments": {}}, id=7)
        headers = client.headers(message)
        async with http.stream("POST", client.url, content=json.dumps(message), headers=headers) as response:
            assert response.headers["content-type"] == "text/event-stream"
            coming = events(response)
            for number in range(3):
                channel.event({"jsonrpc": "2.0", "method": "notifications/message", "params": {"n": number}})
                event = await asyncio.wait_for(anext(coming), 10)
                assert event["params"]["n"] == number
            channel.close()
