"""Standard input, from which ``login --paste`` reads addresses."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence

from mcp_auth_proxy.cli.terminal import complain
from mcp_auth_proxy.errors import AddressRefused, McpAuthProxyError
from mcp_auth_proxy.oauth import pasted_address

STDIN = 0
_CHUNK = 4096

NOTHING_PASTED = (
    "No address was pasted. Run the command again where it can read one: in a terminal, or with the address in a file "
    "(< FILE)."
)

Params = Mapping[str, Sequence[str]]


class PastedLines:
    """The lines of a file descriptor. A thread reads them: a terminal, a pipe and a file all need to be waited for."""

    def __init__(self, descriptor: int = STDIN) -> None:
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()
        # A daemon, and no buffered file: the command may end while it still waits for a line.
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    async def next(self) -> str | None:
        """Return the next line, None at the end. Of a line that is too long, enough is left to be refused."""
        line = await self._lines.get()
        if line is None:
            self._lines.put_nowait(None)
        return line

    def _read(self) -> None:
        line = b""
        while chunk := self._chunk():
            *ended, line = (line + chunk).split(b"\n")
            for each in ended:
                self._put(each)
            line = line[: pasted_address.MAX_LENGTH + 1]
        if line:
            self._put(line)
        self._put(None)

    def _chunk(self) -> bytes:
        try:
            return os.read(self._descriptor, _CHUNK)
        except OSError:
            # Standard input is closed.
            return b""

    def _put(self, line: bytes | None) -> None:
        text = None if line is None else line.decode("utf-8", "replace")
        try:
            self._loop.call_soon_threadsafe(self._lines.put_nowait, text)
        except RuntimeError:
            # The loop is closed: nobody waits any more.
            return


async def read_addresses(lines: PastedLines, redirect_uri: str, use: Callable[[Params], Awaitable[None]]) -> None:
    """Give the pasted addresses to ``use``, until it takes one: it raises AddressRefused for those that it does not.

    Raises McpAuthProxyError if there are no more, and what else ``use`` raises.
    """
    while (line := await lines.next()) is not None:
        if not line.strip():
            continue
        try:
            await use(pasted_address.read(line, redirect_uri))
        except AddressRefused as refused:
            complain(str(refused), "Paste the address again:")
            continue
        return
    raise McpAuthProxyError(NOTHING_PASTED)
