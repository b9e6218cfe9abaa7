"""The command that the suite tests: the proxy in front of the scenario's server, and a plain MCP client.

``python -m conformance.client [--direct | --unheld] URL``. The client is the SDK's, without its OAuth. Links are
followed automatically; the suite's authorization servers redirect at once. The exit code is 0 if everything succeeded.
``--direct`` omits the proxy, to distinguish errors of the client from those of the proxy. ``--unheld`` makes the proxy
answer with the link at once instead of holding requests; the client then starts again.
"""

import asyncio
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
from mcp import Client

from conformance.actions import act, fill_defaults
from conformance.scenarios import SERVER, Scenario, write_configuration

DEADLINE = 25.0
"""Seconds; less than the suite's 30, whose time-out ends only the shell and then waits for the pipes."""

HELD, UNHELD = "20s", "0s"
"""How long the proxy holds a request while the user authorizes."""

MOST_STARTS = 6
"""Maximum number of starts of a client that is answered with links."""

LINK_TIMEOUT = 3.0
"""Seconds within which a link must be found in the proxy's output and followed to its end."""

_LISTENING = re.compile(r"is listening at (http\S+)")
_LINK = re.compile(r"http://\S+/connect/\S+")


def main() -> None:
    asyncio.run(run(Scenario.current(sys.argv[-1]), set(sys.argv[1:-1])))


async def run(scenario: Scenario, options: set[str]) -> None:
    """Run one scenario to its end, within the deadline."""
    async with asyncio.timeout(DEADLINE):
        if "--direct" in options:
            await use(scenario.url, scenario)
        elif "--unheld" in options:
            async with proxy_before(scenario, UNHELD) as proxy:
                await use_until_connected(proxy, scenario)
        else:
            async with proxy_before(scenario, HELD) as proxy:
                await use(await proxy.url, scenario)


async def use(url: str, scenario: Scenario) -> None:
    """Connect a plain client to the URL, and make the calls of the scenario."""
    async with Client(url, mode=scenario.mode, elicitation_callback=fill_defaults) as client:
        await act(client, scenario)


async def use_until_connected(proxy: "Proxy", scenario: Scenario) -> None:
    """Do as ``use`` does, again after each link that was followed."""
    for _ in range(MOST_STARTS - 1):
        proxy.visited.clear()
        try:
            return await use(await proxy.url, scenario)
        except Exception as error:
            sys.stderr.write(f"client: {error!r}\n")
            await asyncio.wait_for(proxy.visited.wait(), LINK_TIMEOUT)
    return await use(await proxy.url, scenario)


@asynccontextmanager
async def proxy_before(scenario: Scenario, wait: str) -> AsyncIterator["Proxy"]:
    """Run ``mcp-auth-proxy serve`` until the block ends."""
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        config = write_configuration(scenario, Path(folder), wait)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mcp_auth_proxy", "serve", "--config", str(config)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        proxy = Proxy(process)
        try:
            yield proxy
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()
            await proxy.close()


class Proxy:
    """A running proxy. Its output is searched for links and copied to stderr, which the suite keeps."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.visited = asyncio.Event()
        self._process = process
        self._browsers: set[asyncio.Task[None]] = set()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            line = raw.decode(errors="replace")
            sys.stderr.write(f"proxy: {line}")
            if not self.url.done() and (found := _LISTENING.search(line)):
                self.url.set_result(f"{found[1]}/{SERVER}/mcp")
            for link in _LINK.findall(line):
                self._browsers.add(asyncio.create_task(self._follow(link)))
        if not self.url.done():
            self.url.set_exception(RuntimeError("the proxy did not start"))

    async def _follow(self, link: str) -> None:
        """Open a link and follow its redirects to the callback's page."""
        async with httpx2.AsyncClient(follow_redirects=True, trust_env=False, timeout=10) as browser:
            page = await browser.get(link)
        sys.stderr.write(f"browser: {page.url.path} answered {page.status_code}\n")
        self.visited.set()

    async def close(self) -> None:
        """Wait for the end of the output; cancel the browsers that have not finished."""
        await self._reading
        for browser in self._browsers:
            browser.cancel()
        await asyncio.gather(*self._browsers, return_exceptions=True)


if __name__ == "__main__":
    main()
