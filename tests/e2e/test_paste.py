"""``login --paste``, ``--no-wait`` and ``--wait``: machines without a browser, and scripts."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest

from e2e.test_login import free_port, listen_of
from fakes.authorization_server import FakeAuthorizationServer
from fakes.headless import Browser, consent
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import proxy_process, run_command, write_config
from fakes.team import add_member

ADDRESS = re.compile(r"^  (http://\S+/authorize\?\S+)$", re.MULTILINE)


class Pasting:
    """``login --paste`` while it waits for an address."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.out = ""
        self.err = ""

    async def address(self) -> str:
        """The authorization server's own address, as soon as everything up to the prompt is printed."""
        assert self.process.stdout is not None
        async with asyncio.timeout(40):
            while "paste it here:" not in self.out:
                line = await self.process.stdout.readline()
                assert line, f"{self.out}{await self.errors()}"
                self.out += line.decode()
        found = ADDRESS.search(self.out)
        assert found, self.out
        return found[1]

    async def paste(self, *lines: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        await self.process.stdin.drain()

    async def errors(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()

    async def refusal(self) -> str:
        """The next line on stderr that says why an address is refused."""
        assert self.process.stderr is not None
        async with asyncio.timeout(20):
            async for raw in self.process.stderr:
                self.err += raw.decode()
                if raw.startswith((b"That ", b"This ")):
                    return raw.decode()
        raise AssertionError(self.err)

    async def end(self, *lines: str) -> tuple[int, str, str]:
        """Paste these lines and nothing more; return exit code, stdout, stderr."""
        out, err = await asyncio.wait_for(self.process.communicate("".join(f"{line}\n" for line in lines).encode()), 40)
        return self.process.returncode or 0, self.out + out.decode(), self.err + err.decode()


@asynccontextmanager
async def pasting(*arguments: str, **env: str) -> AsyncIterator[Pasting]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mcp_auth_proxy", "login", *arguments, "--paste"),
        env={**os.environ, **env},
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
    )
    try:
        yield Pasting(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def redirected(address: str) -> str:
    """Consent with a browser on another machine; return the address that it can't open."""
    async with Browser() as browser:
        return await browser.stop_before(address)


@pytest.fixture
def config(tmp_path: Path, mcp_server: FakeMcpServer) -> Path:
    return write_config(tmp_path, {"notes": mcp_server.url}, listen=f"127.0.0.1:{free_port()}")


async def test_an_address_is_pasted_where_no_proxy_runs_and_no_browser_is(
    config: Path, authorization_server: FakeAuthorizationServer, mcp_server: FakeMcpServer
) -> None:
    async with pasting("notes@work", "--config", str(config)) as setup:
        address = await setup.address()
        assert address.startswith(f"{authorization_server.issuer}/authorize?")
        assert "/connect/" not in setup.out
        # What the page of a link would say: which server, where it leads, and with which scopes.
        assert f"The server notes at {mcp_server.origin} sends you to {authorization_server.issuer}" in setup.out
        came = await redirected(address)
        # Each is named, and asked for again; nothing was used up.
        for bad, named in (
            ("no idea", "That is no address."),
            (address, "That address is not ours"),
            (came.replace("state=", "state=x"), "That address is not ours: it belongs to another authorization."),
            (came.partition("code=")[0], "That address is no complete answer"),
        ):
            await setup.paste(bad)
            assert named in await setup.refusal()
        code, out, err = await setup.end(f"  <{came}> ")
    assert code == 0, err
    assert out.splitlines()[-3:-1] == [
        "notes@work is connected.",
        f"MCP clients use it at http://{listen_of(config)}/notes@work/mcp",
    ]
    assert out.splitlines()[-1].startswith("It offers 3 tools: ")
    query = {name: value[0] for name, value in parse_qs(urlsplit(came).query).items()}
    assert query["code"] not in err
    assert query["state"] not in err
    assert (authorization_server.registrations, authorization_server.token_requests()) == (1, 1)
    # The next one is told that it is connected; after a logout, an address of before is named as used.
    code, out, _ = await run_command("login", "notes@work", "--paste", "--config", str(config))
    assert (code, "is stored already" in out) == (0, True)


async def test_without_an_address_the_command_fails(config: Path) -> None:
    async with pasting("notes", "--config", str(config)) as setup:
        await setup.address()
        code, _, err = await setup.end()
    assert (code, err.splitlines()[-1].startswith("error: No address was pasted.")) == (1, True)
    assert not list(config.parent.glob("proxy.db*"))


async def test_a_refusal_of_the_authorization_server_is_told(
    config: Path, authorization_server: FakeAuthorizationServer
) -> None:
    authorization_server.authorize_error = ("access_denied", "The user said no.")
    async with pasting("notes", "--config", str(config)) as setup:
        code, _, err = await setup.end(await redirected(await setup.address()))
    assert (code, "access_denied" in err.splitlines()[-1]) == (1, True)


async def test_a_running_proxy_leaves_the_callback_to_the_terminal(
    config: Path, authorization_server: FakeAuthorizationServer
) -> None:
    async with proxy_process(config, listen=listen_of(config)) as proxy:
        async with pasting("notes", "--config", str(config)) as setup:
            came = await redirected(await setup.address())
            assert came.startswith(f"{proxy.origin}/oauth/callback?")
            async with httpx2.AsyncClient(trust_env=False) as browser:
                page = await browser.get(came, headers={"accept": "text/html"})
            assert not page.has_redirect_location
            assert "paste it into the terminal" in page.text
            assert authorization_server.token_requests() == 0
            code, _, err = await setup.end(came)
        assert code == 0, err
        async with proxy.client("notes") as client:
            assert (await client.call("echo", text="pasted")).text == "pasted"
        assert (authorization_server.registrations, authorization_server.token_requests()) == (1, 1)
        # Used: named so by the proxy's page, and by the command.
        assert (await run_command("logout", "notes", "--config", str(config)))[0] == 0
        async with pasting("notes", "--config", str(config)) as setup:
            await setup.address()
            await setup.paste(came)
            assert "was used already" in await setup.refusal()
            assert (await setup.end())[0] == 1


async def test_an_address_is_pasted_for_somebody_and_through_the_api(
    authorization_server: FakeAuthorizationServer, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    anna = await add_member(tmp_path, "anna")
    keys: dict[str, Any] = {"inbound": {"mode": "api_key"}}
    config = write_config(tmp_path, {"notes": mcp_server.url}, listen=f"127.0.0.1:{free_port()}", **keys)
    async with proxy_process(config, listen=listen_of(config)) as proxy:
        async with pasting("notes@work", "--as", "anna", "--config", str(config)) as setup:
            code, out, err = await setup.end(await redirected(await setup.address()))
        assert code == 0, err
        far = ("--url", proxy.origin, "--api-key", "env:PROXY_KEY")
        async with pasting("notes@home", *far, PROXY_KEY=anna) as setup:
            came = await redirected(await setup.address())
            assert "The server notes at " in setup.out
            await setup.paste("no idea", came.replace("state=", "state=x"))
            assert "That is no address." in await setup.refusal()
            code, out, err = await setup.end(came)
        assert code == 0, err
        assert "That address is not ours: it belongs to another authorization." in err
        assert f"MCP clients use it at {proxy.origin}/notes@home/mcp" in out
        assert "It offers 3 tools: " in out
        for account in ("work", "home"):
            async with proxy.client(f"notes@{account}", headers={"authorization": f"Bearer {anna}"}) as client:
                assert (await client.call("echo", text=account)).text == account


async def test_a_link_is_printed_alone_and_nobody_waits(config: Path) -> None:
    async with proxy_process(config, listen=listen_of(config)) as proxy:
        code, out, err = await run_command("login", "notes", "--no-wait", "--config", str(config))
        assert code == 0, err
        assert re.fullmatch(rf"{proxy.origin}/connect/notes\?flow=\S+\n", out)
        assert "No proxy is running" not in err
        # The same link for whoever asks next.
        assert (await run_command("login", "notes", "--no-wait", "--config", str(config)))[1] == out
        assert (await consent(out.strip())).status_code == 200
        async with proxy.client("notes") as client:
            assert (await client.call("echo", text="later")).text == "later"
        code, out, err = await run_command("login", "notes", "--no-wait", "--config", str(config))
        assert (code, out, "notes is connected." in err) == (0, "", True)


async def test_a_link_that_needs_a_proxy_says_so(config: Path) -> None:
    code, out, err = await run_command("login", "notes", "--no-wait", "--config", str(config))
    assert (code, out.count("\n")) == (0, 1)
    assert "No proxy is running with this configuration." in err
    async with proxy_process(config, listen=listen_of(config)):
        assert (await consent(out.strip())).status_code == 200


async def test_a_bounded_wait_ends_with_1(config: Path) -> None:
    code, out, err = await run_command("login", "notes", "--wait", "500ms", "--config", str(config))
    assert (code, "/connect/notes?flow=" in out) == (1, True)
    assert err.splitlines()[-1] == "error: Nobody has authorized within 0.5 s. Run login again."


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--no-wait", "--paste"), "--no-wait can't be used with --paste"),
        (("--no-wait", "--wait", "1m"), "--no-wait can't be used with --paste or --wait"),
        (("--wait", "soon"), "must be a duration such as 45s"),
    ],
)
async def test_options_that_do_not_fit_are_a_usage_error(config: Path, options: tuple[str, ...], problem: str) -> None:
    code, _, err = await run_command("login", "notes", *options, "--config", str(config))
    assert (code, problem in err) == (2, True)
