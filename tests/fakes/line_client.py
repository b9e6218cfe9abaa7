"""A client that speaks in lines: to a bridge in this event loop, or to the program."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fakes.proxy import PROGRAM, until
from mcp_auth_proxy.cli.stdio_bridge.bridge import Bridge
from mcp_auth_proxy.cli.stdio_bridge.channel import Channel
from mcp_auth_proxy.cli.stdio_bridge.endpoint import Endpoint, RemoteEndpoint
from mcp_auth_proxy.cli.stdio_bridge.lines import LineReader, LineWriter
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.dial import Dialer

Json = dict[str, Any]
INFO = {"name": "lines", "version": "1"}
META = "io.modelcontextprotocol"
MODERN_META = {
    f"{META}/protocolVersion": "2026-07-28",
    f"{META}/clientInfo": INFO,
    f"{META}/clientCapabilities": {},
}


class LineClient:
    """Writes lines and collects those that come back; each must be JSON."""

    def __init__(self, write: Callable[[bytes], None], close: Callable[[], None]) -> None:
        self._write = write
        self.close = close
        """End the input of the bridge."""
        self.received: list[Any] = []
        self.ended = asyncio.Event()

    def take(self, line: bytes) -> None:
        self.received.append(json.loads(line))

    def raw(self, line: bytes) -> None:
        self._write(line + b"\n")

    def send(self, method: str, params: Json | None = None, *, id: Any = None, modern: bool = False) -> None:
        """Write a request, or a notification if there is no id."""
        message: Json = {"jsonrpc": "2.0", "method": method}
        if id is not None:
            message["id"] = id
        if modern:
            params = {"_meta": MODERN_META, **(params or {})}
        if params is not None:
            message["params"] = params
        self.raw(json.dumps(message).encode())

    def call(self, tool: str = "echo", *, id: Any, modern: bool = False, **arguments: Any) -> None:
        self.send("tools/call", {"name": tool, "arguments": arguments}, id=id, modern=modern)

    async def initialize(self, version: str = "2025-11-25") -> Json:
        params = {"protocolVersion": version, "capabilities": {}, "clientInfo": INFO}
        self.send("initialize", params, id="init")
        answer = await self.answer("init")
        self.send("notifications/initialized")
        return answer

    def answers(self, id: Any) -> list[Json]:
        found = [each for line in self.received for each in (line if isinstance(line, list) else [line])]
        return [each for each in found if "method" not in each and each.get("id") == id]

    async def answer(self, id: Any, timeout: float = 20) -> Json:
        """Wait for the answer to a request."""
        await until(lambda: self.answers(id), f"an answer to {id!r}; received {self.received}", timeout)
        return self.answers(id)[0]

    def notifications(self, method: str) -> list[Json]:
        return [line for line in self.received if isinstance(line, dict) and line.get("method") == method]


@asynccontextmanager
async def bridge_to(
    url: str, *, limit: int = 2**20, may_read: asyncio.Event | None = None
) -> AsyncIterator[LineClient]:
    """Run a bridge in this event loop, over pipes, straight to an MCP endpoint.

    ``may_read``: nothing that the bridge writes is read before it is set.
    """
    parsed = urls.parse(url)
    source = RemoteEndpoint(Endpoint(parsed.origin, parsed.target))
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    channel = Channel(source, Dialer(environ={}))
    bridge = Bridge(channel, LineWriter(their_out), limit=limit)
    closed: list[int] = []

    def close() -> None:
        if not closed:
            closed.append(our_out)
            os.close(our_out)

    client = LineClient(lambda data: _write_all(our_out, data), close)
    reading = asyncio.create_task(_collect(client, our_in, may_read))
    running = asyncio.create_task(bridge.run(LineReader(their_in, limit=limit)))
    running.add_done_callback(lambda _: client.ended.set())
    try:
        yield client
        close()
        async with asyncio.timeout(20):
            await running
    finally:
        close()
        running.cancel()
        await asyncio.wait({running})
        await bridge.aclose()
        await channel.aclose()
        os.close(their_out)
        await reading
        os.close(their_in)


async def _collect(client: LineClient, descriptor: int, may_read: asyncio.Event | None) -> None:
    if may_read is not None:
        await may_read.wait()
    reader = LineReader(descriptor, limit=2**26)
    async for line in reader:
        assert isinstance(line, bytes)
        client.take(line)
    os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class BridgeProcess(LineClient):
    """``mcp-auth-proxy stdio`` as a process; ``err`` is what it wrote to stderr."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        super().__init__(process.stdin.write, process.stdin.close)
        self.process = process
        self.err = ""
        self.reading: asyncio.Future[Any] | None = None

    @property
    def links(self) -> list[str]:
        return re.findall(r"http://\S+/connect/\S+", self.err)

    async def wait(self, timeout: float = 20) -> int:
        """Wait for the end; return the exit code."""
        code = await asyncio.wait_for(self.process.wait(), timeout)
        assert self.reading is not None
        return code

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.take(line)

    async def read_err(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.err += line.decode(errors="replace")


@asynccontextmanager
async def bridge_process(*arguments: str, env: dict[str, str] | None = None) -> AsyncIterator[BridgeProcess]:
    """Run ``stdio`` with these arguments until the block ends."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *PROGRAM,
        "stdio",
        *arguments,
        env={**os.environ, **(env or {})},
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        limit=2**26,
    )
    bridge = BridgeProcess(process)
    bridge.reading = asyncio.gather(bridge.read(), bridge.read_err())
    try:
        yield bridge
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        # The proxy that it started holds no end of these pipes.
        await bridge.reading
