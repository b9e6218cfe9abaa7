"""The official clients of MCP as programs (``tests/clients``), which ``make clients`` installs."""

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from conftest import CLIENTS, CLIENTS_PYTHON, MADE, SEARCH

Event = dict[str, Any]

PROGRAMS = {
    "python-1": "python_1.py",
    "python-2": "python_2.py",
    "typescript-1": "typescript_1.mjs",
    "typescript-2": "typescript_2.mjs",
}


class OfficialClient:
    """A client that runs. What it says is an event: connected, failed, tools, result, error, changed, asked, complete.

    ``seen`` are the events that were not waited for yet.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.seen: list[Event] = []

    async def next(self, *kinds: str) -> Event:
        """Wait, bounded, for the next event of these kinds; others are kept in ``seen``."""
        found = next((event for event in self.seen if event["event"] in kinds), None)
        if found is not None:
            self.seen.remove(found)
            return found
        async with asyncio.timeout(30):
            while True:
                line = await self._out.readline()
                assert line, f"the client has ended, and said {self.seen}"
                event: Event = json.loads(line)
                if event["event"] in kinds:
                    return event
                self.seen.append(event)

    async def tools(self) -> list[str]:
        """Return the names of the tools that it lists now."""
        await self._do({})
        names: list[str] = (await self.next("tools"))["names"]
        return names

    async def call(self, tool: str, **arguments: object) -> Event:
        """Return what it gets for a call: a result or an error."""
        await self.begin_call(tool, **arguments)
        return await self.next("result", "error")

    async def begin_call(self, tool: str, **arguments: object) -> None:
        """Call a tool; ``next`` returns what comes of it."""
        await self._do({"tool": tool, "arguments": arguments})

    async def end(self) -> None:
        """Let it close its session and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert await asyncio.wait_for(self._process.wait(), 20) == 0

    @property
    def _out(self) -> asyncio.StreamReader:
        assert self._process.stdout is not None
        return self._process.stdout

    async def _do(self, command: Event) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        await self._process.stdin.drain()


@asynccontextmanager
async def official_client(
    name: str, url: str, *, era: str = "legacy", action: str = "none"
) -> AsyncIterator[OfficialClient]:
    """Run a client until the block ends, and see that it is alive then.

    ``era``: which revision it asks for (legacy, auto, or a later revision). ``action``: what its user does if asked to
    open a link; none: it can't ask.
    """
    program = PROGRAMS[name]
    runner: str | None = sys.executable if name == "python-2" else str(CLIENTS_PYTHON)
    if program.endswith(".mjs"):
        runner = shutil.which("node", path=os.pathsep.join([*MADE, SEARCH]))
    assert runner is not None
    process = await asyncio.create_subprocess_exec(
        runner,
        str(CLIENTS / program),
        url,
        era,
        action,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    try:
        client = OfficialClient(process)
        yield client
        await client.end()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
