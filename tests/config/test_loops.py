"""Servers whose URL leads back to the proxy (T85)."""

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from mcp_auth_proxy.config import loops
from mcp_auth_proxy.config.settings import Address, KeySource, ServerSettings, Settings, StoreSettings
from mcp_auth_proxy.errors import ConfigurationError
from mcp_auth_proxy.net.resolver import Resolver

LISTEN = Address("127.0.0.1", 8787)


def settings(*urls: str, source: Path | None = Path("/x/mcp-auth-proxy.yaml")) -> Settings:
    servers = {f"s{number}": ServerSettings(name=f"s{number}", url=url) for number, url in enumerate(urls)}
    store = StoreSettings(path=Path("/x/store.db"), keys=(KeySource(kind="env", name="K"),), default_key=False)
    return Settings(listen=LISTEN, public_url=None, store=store, servers=servers, source=source)


def leads_here(url: str, listen: str = "127.0.0.1", public_url: str | None = None) -> bool:
    return bool(loops.errors(settings(url), Address(listen, 8787), public_url))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8787/mcp",
        "https://127.0.0.1:8787",
        "http://localhost:8787/a/mcp?x=y",
        "HTTP://LOCALHOST.:8787/mcp",
        "http://a.localhost:8787/mcp",
        "http://[::ffff:127.0.0.1]:8787/mcp",
        "http://[::ffff:7f00:1]:8787/mcp",
        "https://127.1:8787/mcp",
        "https://0x7f.1:8787/mcp",
        "https://2130706433:8787/mcp",
        "https://017700000001:8787/mcp",
        "https://0.0.0.0:8787/mcp",
        "https://0:8787/mcp",
    ],
)
def test_every_spelling_of_the_listening_address_leads_here(url: str) -> None:
    assert leads_here(url)
    assert leads_here(url, listen="0.0.0.0")
    assert leads_here(url, listen="::")
    assert leads_here(url, listen="localhost")
    assert leads_here(url, listen="::ffff:127.0.0.1")


@pytest.mark.parametrize(
    ("url", "listen"),
    [
        ("http://127.0.0.1:8788/mcp", "127.0.0.1"),
        ("http://127.0.0.2:8787/mcp", "127.0.0.1"),
        ("http://[::1]:8787/mcp", "127.0.0.1"),
        ("http://[::1]:8787/mcp", "0.0.0.0"),
        ("http://127.0.0.1:8787/mcp", "192.0.2.7"),
        ("https://192.0.2.1:8787/mcp", "0.0.0.0"),
        ("https://[2001:db8::1]:8787/mcp", "::"),
        ("https://mcp.example.com:8787/mcp", "0.0.0.0"),
        ("https://mcp.example.com/mcp", "127.0.0.1"),
    ],
)
def test_other_addresses_and_ports_are_other_servers(url: str, listen: str) -> None:
    assert not leads_here(url, listen)


@pytest.mark.parametrize(
    ("url", "listen"),
    [
        ("http://[::1]:8787/mcp", "::1"),
        ("http://[0:0:0:0:0:0:0:1]:8787/mcp", "::"),
        ("https://[::]:8787/mcp", "::"),
        ("http://127.9.9.9:8787/mcp", "0.0.0.0"),
        ("https://192.0.2.7:8787/mcp", "192.0.2.7"),
        ("https://proxy.example:8787/mcp", "proxy.example"),
    ],
)
def test_the_address_is_compared_with_what_the_proxy_listens_on(url: str, listen: str) -> None:
    assert leads_here(url, listen)


def test_an_interface_of_this_machine_leads_to_a_proxy_on_all_interfaces() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network interface besides loopback")
        own = sock.getsockname()[0]
    assert leads_here(f"https://{own}:8787/mcp", "0.0.0.0")
    assert not leads_here(f"https://{own}:8787/mcp", "127.0.0.1")


def test_the_public_url_leads_here() -> None:
    public = "https://proxy.example"
    assert leads_here("https://PROXY.example/mcp", public_url=public)
    assert leads_here("https://proxy.example.:443/a/mcp", public_url=public)
    assert not leads_here("https://proxy.example:8443/mcp", public_url=public)
    assert not leads_here("https://other.proxy.example/mcp", public_url=public)
    assert leads_here("https://localhost:8443/mcp", public_url="https://127.0.0.1:8443")


def test_each_server_is_named_by_its_key() -> None:
    found = loops.errors(
        settings("http://127.0.0.1:8787/mcp", "https://a.example", "http://localhost:8787"), LISTEN, None
    )
    assert [error.path for error in found] == ["servers.s0.url", "servers.s2.url"]
    assert found[0].problem.startswith("leads to this proxy itself (127.0.0.1:8787), in a loop")
    (alone,) = loops.errors(settings("http://127.0.0.1:8787/mcp", source=None), LISTEN, None)
    assert alone.path == "URL"


async def test_a_name_at_the_port_of_the_listener_is_looked_up() -> None:
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        if host == "nowhere.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return {"here.example": ("192.0.2.1", "127.0.0.1"), "mapped.example": ("::ffff:127.0.0.1",)}.get(host, ("::1",))

    names = ("here", "elsewhere", "nowhere", "mapped")
    urls = [f"https://{name}.example:8787/mcp" for name in names]
    with pytest.raises(ConfigurationError) as caught:
        await loops.check(
            settings(*urls, "https://other.example/mcp"), LISTEN, "http://127.0.0.1:8787", resolver=Resolver(resolve)
        )
    assert [error.path for error in caught.value.errors] == ["servers.s0.url", "servers.s3.url"]
    assert sorted(asked) == sorted(f"{name}.example" for name in names)


async def test_the_name_that_the_proxy_listens_at_is_looked_up() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return ("192.0.2.7",)

    listening, resolver = Address("proxy.example", 8787), Resolver(resolve)
    with pytest.raises(ConfigurationError, match=r"servers\.s0\.url"):
        await loops.check(settings("https://192.0.2.7:8787/mcp"), listening, "http://proxy.example", resolver=resolver)
    await loops.check(settings("https://192.0.2.8:8787/mcp"), listening, "http://proxy.example", resolver=resolver)


async def test_a_name_that_takes_long_to_look_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return ()

    monkeypatch.setattr(loops, "LOOKUP_TIMEOUT", 0.05)
    slow = settings("https://slow.example:8787/mcp")
    await loops.check(slow, LISTEN, "http://127.0.0.1:8787", resolver=Resolver(hang))
