"""Hear what other processes have written, by NOTIFY, and what time it is, on a connection of its own."""

import asyncio
import contextlib
import logging

import psycopg
from psycopg import Notify

from mcp_auth_proxy.config.settings import PostgresqlUrl
from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.store.postgresql.clock import ServerClock
from mcp_auth_proxy.store.postgresql.connection import Connection
from mcp_auth_proxy.store.postgresql.pool import PAUSE, Pool

KEEPALIVE = 5.0
"""Seconds between two looks whether the connection lives, and at the clock of the server."""

RETRY = 0.2
"""Seconds between two looks whether a server that is away is back."""

FALLBACK = 30.0
"""Seconds after which something counts as written, in case that a notification was lost between us and the server."""

_LISTENING = "SELECT count(*) AS number FROM pg_listening_channels() AS channel WHERE channel = :channel"
_POOLED = (
    "store: a connection to %s no longer listens. If that is a pooler such as PgBouncer, it must be in session mode: "
    "until then, what other processes write is noticed late"
)
logger = logging.getLogger(__name__)


class Listener:
    """Count the writes of other processes, from ``start`` to ``close``."""

    def __init__(self, pool: Pool, clock: ServerClock, url: PostgresqlUrl, *, channel: str, own: str) -> None:
        """``own`` is what notifications of this process say."""
        self._pool = pool
        self._clock = clock
        self._url = url
        self._channel = channel
        self._own = own
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._failure: StoreUnavailable | None = None
        self._has_warned = False
        self._has_told = False
        """Whether the last line about the server says that it is away."""
        self.writes = 0
        """Increases whenever another process has written, or may have."""

    async def listening(self) -> int:
        """Return ``writes`` once the connection listens. Raises StoreUnavailable if it can't be made now."""
        if self._task is None:
            self._task = asyncio.create_task(self._listen())
            # Until the first attempt to connect has come to an end.
            await self._ready.wait()
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        return self.writes

    async def close(self) -> None:
        """Stop listening. May be called again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _listen(self) -> None:
        while True:
            try:
                await self._connected()
            except StoreUnavailable as error:
                self._tell_of(error)
                self._failure = error
            self._ready.set()
            # The pool does not connect more often than it wants to.
            await asyncio.sleep(RETRY if self._has_told else PAUSE)

    def _tell_of(self, error: StoreUnavailable) -> None:
        """Log once that the server is away, if the first attempt to connect again has failed too."""
        if self._failure is not None and not self._has_told:
            self._has_told = True
            logger.error("%s Until it is back, tokens that are valid are used, and none is renewed.", error)

    async def _connected(self) -> None:
        """Listen until the connection is lost. Raises StoreUnavailable then."""
        connection = await self._pool.connect()
        try:
            connection.raw.add_notify_handler(self._note)
            await connection.command(f"LISTEN {self._channel}")
            # Whatever was written while nobody listened.
            self.writes += 1
            self._failure = None
            self._ready.set()
            if self._has_told:
                self._has_told = False
                logger.info("store: %s works again", self._url)
            looks = 0
            while True:
                await self._wait(connection)
                await connection.measure(self._clock)
                await self._check(connection)
                looks += 1
                if looks * KEEPALIVE >= FALLBACK:
                    looks, self.writes = 0, self.writes + 1
        finally:
            await connection.close()

    async def _wait(self, connection: Connection) -> None:
        """Take notifications for KEEPALIVE seconds, or until the connection ends. Silence costs nothing."""
        loop, descriptor = asyncio.get_running_loop(), connection.raw.fileno()
        ended = asyncio.Event()

        def readable() -> None:
            pgconn = connection.raw.pgconn
            try:
                pgconn.consume_input()
                while (found := pgconn.notifies()) is not None:
                    self._hear(found.relname.decode(), found.extra.decode())
            except psycopg.Error:
                loop.remove_reader(descriptor)
                ended.set()

        loop.add_reader(descriptor, readable)
        try:
            # What came together with the answer to a statement makes the socket not readable again.
            readable()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KEEPALIVE):
                    await ended.wait()
        finally:
            loop.remove_reader(descriptor)

    async def _check(self, connection: Connection) -> None:
        rows = (await connection.run(_LISTENING, {"channel": self._channel})).rows
        if not rows[0]["number"]:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(_POOLED, self._url)
            raise StoreUnavailable("The connection no longer listens.")

    def _note(self, notification: Notify) -> None:
        self._hear(notification.channel, notification.payload)

    def _hear(self, channel: str, payload: str) -> None:
        if channel == self._channel and payload != self._own:
            self.writes += 1
