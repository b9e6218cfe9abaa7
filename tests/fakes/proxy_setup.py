"""One issuer, one server ``notes`` and the proxy in front of it, with a clock that a test can advance."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.mcp_client import McpResponse, PlainClient
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import RunningProxy, link_in, running_proxy
from mcp_auth_proxy.broker.backoff import LONGEST


class Clock:
    """The proxy's clock: the system time plus ``ahead`` seconds."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self._stopped_at: float | None = None

    def __call__(self) -> float:
        return (self._stopped_at or time.time()) + self.ahead

    def stop(self) -> None:
        """Let time pass only if a test advances it, however slow the machine is."""
        self._stopped_at = time.time()


@dataclass(kw_only=True)
class ProxySetup:
    """The running parts; ``client`` speaks to the server ``notes`` through the proxy."""

    issuer: FakeAuthorizationServer
    upstream: FakeMcpServer
    proxy: RunningProxy
    client: PlainClient
    clock: Clock

    async def ask(self, text: str = "x") -> McpResponse:
        """Call the tool that returns its text."""
        return await self.client.call("echo", text=text)

    async def link(self) -> str:
        """Return the link with which a request is answered."""
        return link_in((await self.ask()).message)

    def skip_pause(self) -> None:
        """Advance the clock to the end of the pause after the last failures, if the server asked for none itself."""
        self.clock.ahead += LONGEST

    async def connect(self) -> None:
        """Authorize as a user would; for setups in which requests do not wait for consent."""
        page = await consent(await self.link())
        assert page.status_code == 200, page.text
        assert (await self.ask("connected")).text == "connected"


async def ask_many(setup: ProxySetup, count: int) -> list[McpResponse]:
    """Make ``count`` tool calls at once, each with its number as text."""
    return await asyncio.gather(*(setup.ask(str(number)) for number in range(count)))


def texts(replies: list[McpResponse]) -> list[str]:
    return [reply.text for reply in replies]


def numbered(count: int) -> list[str]:
    """Return the texts that ``ask_many`` should return."""
    return [str(number) for number in range(count)]


@asynccontextmanager
async def proxy_setup(
    servers: Servers,
    folder: Path,
    *,
    wait: str = "0s",
    issuer: Mapping[str, Any] | None = None,
    upstream: Mapping[str, Any] | None = None,
    oauth: Mapping[str, Any] | None = None,
    client: Mapping[str, Any] | None = None,
    **sections: Any,
) -> AsyncIterator[ProxySetup]:
    """Run issuer, server and proxy until the block ends.

    ``issuer``, ``upstream`` and ``client`` are options of the fakes; ``oauth`` is that section of the server;
    ``sections`` are further sections of the configuration.
    """
    authority = await servers.authorization_server(**{"auto_consent": True, **(issuer or {})})
    server = await servers.mcp_server(authority, **(upstream or {}))
    clock = Clock()
    sections.setdefault("authorization", {"wait": wait})
    config = {"url": server.url, **({"oauth": dict(oauth)} if oauth else {})}
    async with (
        running_proxy(folder, {"notes": config}, clock=clock, **sections) as proxy,
        proxy.client("notes", **(client or {})) as plain,
    ):
        yield ProxySetup(issuer=authority, upstream=server, proxy=proxy, client=plain, clock=clock)
