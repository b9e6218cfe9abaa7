"""The command that the suite tests: the proxy before the scenario's server, and a plain MCP client through it.

``python -m conformance.client [--direct] URL``. The client is the SDK's, without its OAuth; links are followed as a
user would who has consented before: the suite's authorization servers redirect at once. Exit code 0 when all went
well. ``--direct`` leaves the proxy out, to tell a fault of the client from one of the proxy.
"""

import asyncio
import json
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import yaml
from mcp import Client

from conformance.scenarios import SERVER, Scenario, act, configuration, fill_defaults

DEADLINE = 25.0
"""Seconds; under the suite's 30, whose time-out ends the shell only and then waits for the pipes."""

_LISTENING = re.compile(r"is listening at (http\S+)")
_LINK = re.compile(r"http://\S+/connect/\S+")


def main() -> None:
    scenario = Scenario(
        name=os.environ["MCP_CONFORMANCE_SCENARIO"],
        url=sys.argv[-1],
        version=os.environ.get("MCP_CONFORMANCE_PROTOCOL_VERSION", "2025-11-25"),
        context=json.loads(os.environ.get("MCP_CONFORMANCE_CONTEXT", "{}")),
    )
    direct = "--direct" in sys.argv
    asyncio.run(run_scenario(scenario, direct=direct))


async def run_scenario(scenario: Scenario, *, direct: bool) -> None:
    """Run one scenario to its end, within the deadline."""
    async with asyncio.timeout(DEADLINE):
        if direct:
            await use(scenario.url, scenario)
            return
        async with proxy_before(scenario) as origin:
            await use(f"{origin}/{SERVER}/mcp", scenario)


async def use(url: str, scenario: Scenario) -> None:
    """Connect a plain client to the URL, and do what the scenario asks for."""
    async with Client(url, mode=scenario.mode, elicitation_callback=fill_defaults) as client:
        await act(client, scenario)


@asynccontextmanager
async def proxy_before(scenario: Scenario) -> AsyncIterator[str]:
    """Run ``mcp-auth-proxy serve`` until the block ends; yield where it listens. Its links are followed at once."""
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        document, files = configuration(scenario)
        for name, text in files.items():
            Path(folder, name).write_text(text)
        config = Path(folder, "mcp-auth-proxy.yaml")
        config.write_text(yaml.safe_dump(document))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mcp_auth_proxy", "serve", "--config", str(config)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = Output(process)
        try:
            yield await output.origin
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()
            await output.close()


class Output:
    """What the proxy prints: kept for whoever reads the suite's results, and watched for links."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.origin: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._process = process
        self._visits: set[asyncio.Task[None]] = set()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            line = raw.decode(errors="replace")
            sys.stderr.write(f"proxy: {line}")
            if not self.origin.done() and (found := _LISTENING.search(line)):
                self.origin.set_result(found[1])
            for link in _LINK.findall(line):
                self._visits.add(asyncio.create_task(consent(link)))
        if not self.origin.done():
            self.origin.set_exception(RuntimeError("the proxy did not start"))

    async def close(self) -> None:
        """Wait for all that was printed; give up the visits that are not over."""
        await self._reading
        for visit in self._visits:
            visit.cancel()
        await asyncio.gather(*self._visits, return_exceptions=True)


async def consent(link: str) -> None:
    """Open the link and follow where it leads, to the callback's page."""
    async with httpx2.AsyncClient(follow_redirects=True, trust_env=False, timeout=10) as browser:
        page = await browser.get(link)
    sys.stderr.write(f"browser: {page.url.path} answered {page.status_code}\n")


if __name__ == "__main__":
    main()
