"""How a user learns that an authorization is needed: the link in the log at once, and a browser opened once."""

import asyncio
import json
import re
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.proxy import link_in, proxy_process, run_command, until, write_config
from mcp_auth_proxy import __version__

CANARY = "$(touch canary)`touch canary`;touch canary&|touch canary"


class BrowserScript:
    """The program in ``$BROWSER``: it records how it is called, and then does ``more``."""

    def __init__(self, folder: Path, more: str = "") -> None:
        self._record = folder / "opened"
        self.path = folder / "browser"
        self.path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$#" "$@" >> {self._record}\n{more}\n')
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)
        self.env: dict[str, str | None] = {
            "BROWSER": str(self.path),
            "CI": None,
            "SSH_CONNECTION": None,
            "DISPLAY": None,
            "WAYLAND_DISPLAY": None,
        }

    @property
    def calls(self) -> list[str]:
        """The argument of each call; it must have been the only one."""
        lines = self._record.read_text().splitlines() if self._record.exists() else []
        assert lines[::2] == ["1"] * (len(lines) // 2)
        return lines[1::2]


async def configured(servers: Servers, folder: Path, **authorization: Any) -> Path:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    return write_config(folder, {"notes": upstream.url}, authorization=authorization)


@pytest.mark.parametrize("level", ["warning", "info"])
async def test_the_link_is_logged_as_soon_as_the_flow_starts(servers: Servers, tmp_path: Path, level: str) -> None:
    config = await configured(servers, tmp_path, wait="30s")
    async with proxy_process(config, "--log-level", level) as proxy, proxy.client("notes") as client:
        call = asyncio.create_task(client.call("echo", text="held"))
        link = await proxy.next_link()
        assert link in proxy.err
        assert not call.done()
        await consent(link)
        assert (await call).text == "held"
        assert await proxy.stop() == 0
    assert len(proxy.links) == 1


async def test_with_json_logs_each_line_on_stderr_is_json_and_one_has_the_link(
    servers: Servers, tmp_path: Path
) -> None:
    config = await configured(servers, tmp_path, wait="0s")
    assert (await run_command("logout", "notes", "--config", str(config)))[0] == 0  # the key is created and announced
    async with proxy_process(config, "--log-format", "json") as proxy, proxy.client("notes") as client:
        link = link_in((await client.call("echo", text="x")).message)
        await until(lambda: link in proxy.err)
        await consent(link)
        assert await proxy.stop() == 0
    assert proxy.out == ""
    entries = [json.loads(line) for line in proxy.err.splitlines()]
    said = [entry["message"] for entry in entries]
    assert [line for line in said if "listening" in line] == [
        f"mcp-auth-proxy {__version__} is listening at {proxy.origin} with 1 server"
    ]
    assert said.count("server notes is ready") == 1
    assert all({"time", "level", "logger", "message"} <= set(entry) for entry in entries)
    assert [entry["level"] for entry in entries if link in entry["message"]] == ["warning"]


@pytest.mark.parametrize("choice", ["auto", "always"])
async def test_the_browser_is_opened_once_for_each_flow_with_only_the_link(
    servers: Servers, tmp_path: Path, choice: str
) -> None:
    script = BrowserScript(tmp_path)
    config = await configured(servers, tmp_path, wait="0s", open_browser=choice)
    async with proxy_process(config, env=script.env) as proxy, proxy.client("notes") as client:
        replies = [await client.call("echo", text="x") for _ in range(3)]
        (link,) = {link_in(reply.message) for reply in replies}
        await until(lambda: script.calls)
        await consent(link)
        assert (await client.call("echo", text="in")).text == "in"
        assert await proxy.stop() == 0
    assert script.calls == [link]
    assert re.fullmatch(rf"{proxy.origin}/connect/notes\?flow=[\w-]+", link)


@pytest.mark.parametrize(
    ("choice", "env"),
    [("never", {}), ("auto", {"SSH_CONNECTION": "10.0.0.1 1 10.0.0.2 22"}), ("auto", {"BROWSER": None})],
)
async def test_no_browser_is_opened_if_nobody_would_see_it(
    servers: Servers, tmp_path: Path, choice: str, env: dict[str, str | None]
) -> None:
    script = BrowserScript(tmp_path)
    config = await configured(servers, tmp_path, wait="0s", open_browser=choice)
    async with proxy_process(config, env={**script.env, **env}) as proxy, proxy.client("notes") as client:
        for _ in range(3):
            await client.call("echo", text="x")
        await proxy.next_link()
        assert await proxy.stop() == 0
    assert script.calls == []


async def test_a_browser_that_does_not_start_is_logged_and_the_link_still_works(
    servers: Servers, tmp_path: Path
) -> None:
    config = await configured(servers, tmp_path, wait="5s", open_browser="always")
    env = {**BrowserScript(tmp_path).env, "BROWSER": "/nonexistent/browser", "TERM": None}
    async with proxy_process(config, env=env) as proxy, proxy.client("notes") as client:
        call = asyncio.create_task(client.call("echo", text="by hand"))
        await until(lambda: "open the link by hand" in proxy.err)
        await consent(proxy.links[0])
        assert (await call).text == "by hand"


async def test_a_browser_that_stays_in_the_foreground_does_not_delay_the_end_of_serve(
    servers: Servers, tmp_path: Path
) -> None:
    script = BrowserScript(tmp_path, "exec sleep 25 >/dev/null 2>&1")
    config = await configured(servers, tmp_path, wait="0s", open_browser="always")
    async with proxy_process(config, env=script.env) as proxy, proxy.client("notes") as client:
        await client.call("echo", text="x")
        await until(lambda: script.calls)
        begun = time.monotonic()
        assert await proxy.stop() == 0
    assert time.monotonic() - begun < 5


async def test_an_authorization_endpoint_with_shell_words_in_it_starts_nothing(
    servers: Servers, tmp_path: Path
) -> None:  # T6
    issuer = await servers.authorization_server()
    issuer.metadata_changes = {"authorization_endpoint": f"{issuer.issuer}/{CANARY.replace(' ', '%20')}"}
    upstream = await servers.mcp_server(issuer)
    script = BrowserScript(tmp_path)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization={"wait": "0s", "open_browser": "always"})
    async with proxy_process(config, env=script.env) as proxy, proxy.client("notes") as client:
        reply = await client.call("echo", text="x")
        assert reply.status == 200
        if proxy.links:
            await until(lambda: script.calls)
            page = await client.http.get(proxy.links[0])
            assert page.status_code in (303, 502)
        assert await proxy.stop() == 0
    assert not any("$" in call or "touch" in call for call in script.calls)
    assert not list(tmp_path.glob("canary*"))
    assert not Path("canary").exists()
