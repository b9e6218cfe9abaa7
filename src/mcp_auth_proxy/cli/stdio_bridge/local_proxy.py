"""The proxy of this machine: one that runs already, or one that the bridge starts for itself and for others."""

import asyncio
import contextlib
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from mcp_auth_proxy.cli.stdio_bridge import lease
from mcp_auth_proxy.cli.stdio_bridge.endpoint import Endpoint
from mcp_auth_proxy.cli.stdio_bridge.log_output import write_or_drop
from mcp_auth_proxy.config.settings import Settings, reachable
from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.net.urls import Origin
from mcp_auth_proxy.store import serving
from mcp_auth_proxy.store.sqlite.serving import Served

logger = logging.getLogger(__name__)

START_TIMEOUT = 30.0
"""Seconds that a proxy has to start. It takes half a second on an idle machine."""

LOOK = 0.01
"""Seconds between two looks whether it has started."""

GRACE = 3.0
"""Seconds that a proxy which a bridge has not started has to come back: its user, or a service manager, may restart it.
Its port would be taken otherwise."""

PAUSE = 2.0
"""Seconds after a start that failed, in which it is not tried again: the requests that come then fail alike."""


class LocalProxy:
    """Finds the proxy that serves a store, or starts one. Belongs to one event loop."""

    is_local = True

    def __init__(self, settings: Settings, *, target: bytes, url: str | None, options: Sequence[str]) -> None:
        """``target`` is the server's path at the proxy; ``url`` is that of the only server, if there is no file.

        ``options`` of ``serve`` start such a proxy.
        """
        self._store = settings.store
        self._target = target
        self._only = "" if url is None else serving.server_mark(url)
        self._options = options
        self._endpoint: Endpoint | None = None
        self._last: Served | None = None
        self._looking = asyncio.Lock()
        self._bridges: lease.Lease | None = None
        self._failure: McpAuthProxyError | None = None
        self._failed_at = 0.0
        self._children: list[subprocess.Popen[bytes]] = []
        self._begun: tuple[lease.Lease, subprocess.Popen[bytes]] | None = None
        """The lease of whoever starts a proxy, and the proxy that this bridge has started but not seen ready yet."""

    def begin(self) -> None:
        """Start a proxy if that is sure to be needed: it then starts while this program still does.

        What stands in the way is left to ``endpoint``.
        """
        with contextlib.suppress(McpAuthProxyError, OSError):
            bridges = lease.of_bridges(self._store, self._only)
            if not bridges.try_lock(alone=False):
                bridges.close()
                return
            self._bridges = bridges
            starting = lease.of_start(self._store, self._only)
            if starting.try_lock(alone=True) and self._running() is None:
                self._begun = starting, self._spawn()
            else:
                starting.close()

    async def endpoint(self, *, urgent: bool = True) -> Endpoint:
        """Return where the server is. Raises McpAuthProxyError if there is no proxy and none can be started."""
        if self._endpoint is None and not urgent and self._may_come_back and self._running() is None:
            raise McpAuthProxyError("The proxy has ended.")
        if self._endpoint is None:
            async with self._looking:
                if self._endpoint is None:
                    self._endpoint = await self._find()
        return self._endpoint

    @property
    def _may_come_back(self) -> bool:
        """Whether a proxy that has ended is in the hands of others."""
        return self._last is not None and not self._last.for_bridges

    async def replace(self, failed: Endpoint) -> bool:
        if self._endpoint is failed:
            logger.info("the proxy at %s has ended", failed)
            self._endpoint = None
        return True

    async def _find(self) -> Endpoint:
        if self._failure is not None and time.monotonic() - self._failed_at < PAUSE:
            raise self._failure
        self._children = [child for child in self._children if child.poll() is None]
        try:
            if self._bridges is None:
                bridges = lease.of_bridges(self._store, self._only)
                await lease.lock(bridges, alone=False)
                self._bridges = bridges
            found = (await self._again() if self._begun is None else None) or await self._start()
        except McpAuthProxyError as error:
            logger.error("%s", error)
            self._failure, self._failed_at = error, time.monotonic()
            raise
        self._failure, self._last = None, found
        address = reachable(found.address)
        return Endpoint(Origin("http", address.host, address.port), self._target)

    async def _again(self) -> Served | None:
        """Return a process that serves the store; if one has ended that may come back, give it some time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + GRACE if self._may_come_back else 0.0
        while True:
            if (found := self._running()) is not None or loop.time() >= deadline:
                return found
            await asyncio.sleep(LOOK)

    def _running(self) -> Served | None:
        """Return a process that serves the store, and this server."""
        return next((each for each in serving.processes(self._store) if each.only == self._only), None)

    async def _start(self) -> Served:
        """Start a proxy, or wait for one that another bridge starts. Raises McpAuthProxyError."""
        if self._begun is not None:
            (starting, child), self._begun = self._begun, None
            try:
                return await self._started(child)
            finally:
                starting.close()
        starting = lease.of_start(self._store, self._only)
        try:
            while not starting.try_lock(alone=True):
                await asyncio.sleep(LOOK)
                if (found := self._running()) is not None:
                    return found
            if (found := self._running()) is not None:
                return found
            return await self._started(self._spawn())
        finally:
            starting.close()

    def _spawn(self) -> subprocess.Popen[bytes]:
        # -P: a folder of the same name where the client was started is no program of ours. The proxy serves other
        # bridges too, so it must not end with the process group of this one.
        command = [sys.executable, "-P", "-m", "mcp_auth_proxy", "serve", "--for-bridges", *self._options]
        logger.info("no proxy is running with the store %s: one is started", self._store.shown)
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._children.append(child)
        return child

    async def _started(self, child: subprocess.Popen[bytes]) -> Served:
        assert child.stderr is not None
        relay = threading.Thread(target=_relay, args=(child.stderr,), name="log", daemon=True)
        relay.start()
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if (found := self._running()) is not None:
                return found
            if (code := child.poll()) is not None:
                # What it says about the reason.
                await asyncio.to_thread(relay.join, 1.0)
                raise McpAuthProxyError(
                    f"The proxy could not be started: it ended with exit code {code}. Its reason is in the log of this "
                    "program, on standard error."
                )
            await asyncio.sleep(LOOK)
        child.terminate()
        raise McpAuthProxyError(f"The proxy that was started is not ready after {START_TIMEOUT:g} s.")


def _relay(source: IO[bytes]) -> None:
    """Copy the log of the proxy to standard error, for as long as both processes live."""
    while data := os.read(source.fileno(), select.PIPE_BUF):
        write_or_drop(data)
