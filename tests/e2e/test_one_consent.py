"""However many clients and processes ask for one account on one store: one flow, one window, one registration."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import RealMcpServer
from fakes.headless import Browser, consent
from fakes.mcp_client import PlainClient
from fakes.proxy import ProxyProcess, proxy_process, run_command, serving, until, write_config

EACH = 6
"""Clients of each of two proxies: twelve in all."""

ROUNDS = 3
"""How often it is tried, each time with another account."""


class Windows:
    """A ``$BROWSER`` that writes down what it is to open."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "opened"
        self._script = folder / "browser"
        self._script.write_text(f'#!/bin/sh\necho "$1" >> {self._file}\n')
        self._script.chmod(0o755)
        self.env = {"BROWSER": str(self._script), "SSH_CONNECTION": None}

    @property
    def opened(self) -> list[str]:
        return self._file.read_text().split() if self._file.exists() else []


@asynccontextmanager
async def two_proxies(
    folder: Path, url: str, windows: Windows, *, one_public_url: bool
) -> AsyncIterator[tuple[list[str], list[ProxyProcess]]]:
    """Run two proxies on one store; yield their origins, and the processes."""
    origins = [f"http://127.0.0.1:{port}" for port in free_ports(2)]
    authorization = {"open_browser": "auto", "wait": "20s"}
    config = write_config(folder, {"notes": url}, authorization=authorization)
    if one_public_url:
        config.write_text(f"{config.read_text()}public_url: {origins[0]}\n")
    async with AsyncExitStack() as stack:
        started = (
            serving("--config", str(config), "--listen", urlsplit(origin).netloc, env=windows.env, ready_at=origin)
            for origin in origins
        )
        yield origins, [await stack.enter_async_context(each) for each in started]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in socks]


@pytest.fixture
def windows(tmp_path: Path) -> Windows:
    return Windows(tmp_path)


@pytest.mark.parametrize("one_public_url", [False, True])
async def test_twelve_clients_of_two_processes_open_one_window(
    tmp_path: Path,
    real_mcp_server: RealMcpServer,
    authorization_server: FakeAuthorizationServer,
    windows: Windows,
    one_public_url: bool,
) -> None:
    """It takes some seconds: what is tried is a race, so it is tried several times, with real processes."""
    started = two_proxies(tmp_path, real_mcp_server.url, windows, one_public_url=one_public_url)
    async with started as (origins, proxies), AsyncExitStack() as stack:
        for number in range(1, ROUNDS + 1):
            addresses = [f"{origin}/notes@work-{number}/mcp" for origin in origins for _ in range(EACH)]
            clients = [await stack.enter_async_context(PlainClient(address)) for address in addresses]
            calls = [asyncio.create_task(client.initialize()) for client in clients]
            await until(lambda n=number: len(windows.opened) == n, "a window")  # type: ignore[misc]
            assert (await consent(windows.opened[-1])).status_code == 200
            replies = await asyncio.gather(*calls)
            print(
                [r.message for r in replies if "result" not in r.message][:3],
                [("result" in r.message) for r in replies],
                number,
            )
            [print(p.log) for p in proxies]
            assert all("result" in reply.message for reply in replies)
            assert len(windows.opened) == number
            # One registration for each account, and one flow, whose link both processes have.
            assert authorization_server.registrations == number
            assert {link for proxy in proxies for link in proxy.links} == set(windows.opened)


async def test_login_opens_no_second_window_and_the_first_if_the_proxy_has_none(
    tmp_path: Path, real_mcp_server: RealMcpServer, windows: Windows
) -> None:
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    config = write_config(
        tmp_path, {"notes": real_mcp_server.url}, listen=listen, authorization={"open_browser": "auto", "wait": "20s"}
    )
    login = ("login", "--config", str(config), "--wait", "1s")
    no_desktop = {"BROWSER": None, "DISPLAY": None, "WAYLAND_DISPLAY": None, "SSH_CONNECTION": None}
    async with proxy_process(config, listen=listen, env=windows.env) as proxy, proxy.client("notes") as client:
        call = asyncio.create_task(client.initialize())
        await until(lambda: windows.opened, "a window")
        code, out, _ = await run_command(*login, "notes", env=windows.env)
        assert (code, windows.opened[0] in out) == (1, True)
        assert len(windows.opened) == 1
        await consent(windows.opened[0])
        assert "result" in (await call).message
    async with proxy_process(config, listen=listen, env=no_desktop) as proxy, proxy.client("notes@work") as client:
        call = asyncio.create_task(client.initialize())
        link = await proxy.next_link()
        await run_command(*login, "notes@work", env=windows.env)
        await until(lambda: windows.opened[1:] == [link], "the window of login")
        call.cancel()


async def test_the_callback_of_a_killed_proxy_lands_at_the_next_one(
    tmp_path: Path, real_mcp_server: RealMcpServer, authorization_server: FakeAuthorizationServer, windows: Windows
) -> None:
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    config = write_config(
        tmp_path, {"notes": real_mcp_server.url}, listen=listen, authorization={"open_browser": "auto", "wait": "20s"}
    )
    async with Browser() as browser:
        async with proxy_process(config, listen=listen, env=windows.env) as proxy, proxy.client("notes") as client:
            call = asyncio.create_task(client.initialize())
            await until(lambda: windows.opened, "a window")
            callback = await browser.stop_before(windows.opened[0])
            await proxy.stop(signal.SIGKILL)
            await asyncio.gather(call, return_exceptions=True)
        async with proxy_process(config, listen=listen, env=windows.env) as proxy, proxy.client("notes") as client:
            again = asyncio.create_task(client.initialize())
            assert await proxy.next_link() == windows.opened[0]
            assert (await browser.follow(callback, until="/oauth/connected/notes")).status_code == 200
            assert "result" in (await again).message
    assert len(windows.opened) == 1
    assert (authorization_server.registrations, authorization_server.authorizations) == (1, 1)
