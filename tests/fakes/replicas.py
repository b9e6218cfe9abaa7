"""Several ``serve`` processes on one store, which share one public URL, and what can happen to each of them."""

import asyncio
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from fakes.headless import Browser
from fakes.mcp_client import McpResponse, PlainClient
from fakes.proxy import Environment, Json, ProxyProcess, serving, write_config

ACCOUNT_LINK = "/connect/"


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listened at a moment ago."""
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in socks]


@dataclass(kw_only=True)
class Replica:
    """One process, which may be killed and started again at the same address."""

    config: Path
    origin: str
    env: Environment = field(default_factory=dict)
    process: ProxyProcess | None = None
    log: str = ""
    """What earlier processes at this address have written."""
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start(self) -> None:
        """Start a process, and wait until it is ready."""
        listen = urlsplit(self.origin).netloc
        started = serving("--config", str(self.config), "--listen", listen, env=self.env, ready_at=self.origin)
        self.process = await self._stack.enter_async_context(started)

    async def stop(self, sign: signal.Signals = signal.SIGKILL) -> None:
        """End the process with a signal."""
        if self.process is not None:
            await self.process.stop(sign)
            self.log += self.process.log
            self.process = None
        await self._stack.aclose()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let the process stand still (SIGSTOP) until the block ends."""
        assert self.process is not None
        self.process.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.process.send_signal(signal.SIGCONT)

    def here(self, url: str) -> str:
        """Return a URL of the proxy with the address of this replica."""
        return self.origin + url.removeprefix("{}://{}".format(*urlsplit(url)[:2]))

    def client(self, server: str, **options: Any) -> PlainClient:
        return PlainClient(f"{self.origin}/{server}/mcp", **options)

    async def call(self, server: str, **options: Any) -> McpResponse:
        """Call the tool that returns its text, on a new connection."""
        async with self.client(server, **options) as client:
            return await client.call("echo", text="in")

    async def is_connected(self, server: str, **options: Any) -> bool:
        """Return whether a call succeeds."""
        message = (await self.call(server, **options)).message
        result = message.get("result", {})
        return "content" in result and not result.get("isError")

    async def get(self, path: str, **headers: str) -> httpx2.Response:
        async with httpx2.AsyncClient(trust_env=False, timeout=20) as client:
            return await client.get(f"{self.origin}{path}", headers=headers)

    async def request(self, method: str, path: str, *, key: str, **options: Any) -> httpx2.Response:
        """Call the API with a key."""
        async with httpx2.AsyncClient(trust_env=False, timeout=20) as client:
            headers = {"authorization": f"Bearer {key}", **options.pop("headers", {})}
            return await client.request(method, f"{self.origin}{path}", headers=headers, **options)

    async def consent(self, link: str, *, callback: "Replica | None" = None) -> httpx2.Response:
        """Open a link here and consent; the callback lands on ``callback``, or here."""
        async with Browser() as browser:
            back = await browser.stop_before(self.here(link))
            return await browser.open((callback or self).here(back))

    @property
    def everything(self) -> str:
        """What all processes at this address have written."""
        return self.log + (self.process.log if self.process is not None else "")


@asynccontextmanager
async def replicas(
    folder: Path,
    count: int,
    servers: Mapping[str, str | Json],
    *,
    env: Environment | None = None,
    **sections: Any,
) -> AsyncIterator[list[Replica]]:
    """Run ``count`` processes on one store until the block ends; ``sections`` are those of the configuration."""
    ports = free_ports(count)
    # A web server in front would have it; no test needs one.
    sections.setdefault("public_url", f"http://127.0.0.1:{ports[0]}")
    config = write_config(folder, servers, **sections)
    made = [Replica(config=config, origin=f"http://127.0.0.1:{port}", env=env or {}) for port in ports]
    try:
        await asyncio.gather(*(replica.start() for replica in made))
        yield made
    finally:
        for replica in made:
            if replica.process is not None and replica.process.process.returncode is None:
                replica.process.process.send_signal(signal.SIGCONT)
            await replica.stop()


class Load:
    """Clients that call all replicas all the time, for several accounts; what goes wrong is counted."""

    def __init__(self, replicas: list[Replica], accounts: list[str], chance: random.Random) -> None:
        self._replicas = replicas
        self._accounts = accounts
        self._chance = chance
        self.answered = 0
        self.unreachable = 0
        self.later: list[str] = []
        """Errors that say that it can be tried again."""
        self.lost: list[str] = []
        """Answers that ask the user to authorize again: none is expected."""
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def running(self, *, each: int = 2) -> AsyncIterator["Load"]:
        """Run ``each`` clients of every replica until the block ends."""
        self._tasks = [asyncio.create_task(self._ask(replica)) for replica in self._replicas for _ in range(each)]
        try:
            yield self
        finally:
            for task in self._tasks:
                task.cancel()
            ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error

    async def _ask(self, replica: Replica) -> None:
        while True:
            account = self._chance.choice(self._accounts)
            try:
                async with replica.client(account) as client:
                    client.http.timeout = httpx2.Timeout(15)
                    for _ in range(20):
                        self._note(replica, account, await client.call("echo", text="in"))
                        await asyncio.sleep(0.02)
            except (httpx2.HTTPError, AttributeError):
                # The second is anyio's, for a connection that is reset as soon as it is open.
                self.unreachable += 1
                await asyncio.sleep(0.1)

    def _note(self, replica: Replica, account: str, reply: McpResponse) -> None:
        if "error" not in reply.message and not reply.message.get("result", {}).get("isError"):
            self.answered += 1
        elif ACCOUNT_LINK in str(reply.message):
            self.lost.append(f"{time.strftime('%X')} {account} at {replica.origin}: {reply.message}")
        else:
            self.later.append(str(reply.message))


class Chaos:
    """Kill, freeze and restart replicas at random moments; at least one is left alone at any time.

    ``grace``: seconds in which the authorization server takes a refresh token again. Nobody can know of a frozen
    process whether it holds the answer to a refresh, so one that is to be killed is not frozen for nearly as long.
    """

    def __init__(
        self, replicas: list[Replica], chance: random.Random, *, longest_freeze: float = 3.0, grace: float = 10.0
    ) -> None:
        self._replicas = replicas
        self._chance = chance
        self._longest_freeze = longest_freeze
        self._grace = grace
        self.events: list[str] = []
        """What was done when."""
        self.kills = 0
        self.freezes = 0
        self.restarts = 0

    async def run(self, seconds: float) -> None:
        """Do harm for so long; then all replicas run again."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        spared = self._chance.randrange(len(self._replicas))
        while loop.time() < ends:
            victims = [replica for number, replica in enumerate(self._replicas) if number != spared]
            count = self._chance.randint(1, len(victims))
            await asyncio.gather(*(self._harm(replica) for replica in self._chance.sample(victims, count)))
            spared = self._chance.randrange(len(self._replicas))

    async def _harm(self, replica: Replica) -> None:
        chance = self._chance
        await asyncio.sleep(chance.uniform(0, 0.5))
        assert replica.process is not None
        what = chance.choice(["kill", "kill", "freeze", "freeze", "frozen to death", "restart"])
        if what in ("freeze", "frozen to death"):
            self.freezes += 1
            self._note(what, replica)
            with replica.frozen():
                if what == "freeze":
                    await asyncio.sleep(chance.uniform(0.05, self._longest_freeze))
                    self._note("goes on", replica)
                else:
                    await asyncio.sleep(chance.uniform(0.05, min(self._longest_freeze, self._grace / 3)))
                    self.kills += 1
                    await self._stop(replica, signal.SIGKILL)
                    await self._start(replica)
            return
        self.kills += what == "kill"
        self.restarts += what == "restart"
        await self._stop(replica, signal.SIGKILL if what == "kill" else signal.SIGTERM)
        await asyncio.sleep(chance.uniform(0, 0.5))
        await self._start(replica)

    async def _stop(self, replica: Replica, sign: signal.Signals) -> None:
        self._note(sign.name, replica)
        await replica.stop(sign)

    async def _start(self, replica: Replica) -> None:
        await replica.start()
        self._note("started", replica)

    def _note(self, what: str, replica: Replica) -> None:
        self.events.append(f"{time.time():.3f} {replica.origin} {what}")
