"""The session of revisions before 2026-07-28: begun by the client, and again by the bridge if the server ends it."""

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from mcp_auth_proxy.cli.stdio_bridge.channel import Channel, field, read_messages
from mcp_auth_proxy.cli.stdio_bridge.lines import LineWriter, OutputClosed
from mcp_auth_proxy.cli.stdio_bridge.messages import ClientMessage, is_answer, key_of, mapping, read_json
from mcp_auth_proxy.errors import McpAuthProxyError, UpstreamProtocolError, excerpt
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.rpc import events
from mcp_auth_proxy.rpc.event_parser import EventParser
from mcp_auth_proxy.rpc.mirrored_fields import Fields

logger = logging.getLogger(__name__)

RETRY = 1.0
"""Seconds until a stream is opened again, unless the server says otherwise."""

LONGEST_RETRY = 30.0

CLOSE_TIMEOUT = 1.0
"""Seconds for the DELETE of a session. Clients kill a program that does not end within some seconds."""

_VERSION = re.compile(r"[!-~]{1,64}")


@dataclass(slots=True, eq=False)
class Session:
    """A session at the server, or what there is if the server keeps none."""

    initialize: ClientMessage | None = None
    initialized: bytes = b""
    """The client's own ``initialize`` and ``notifications/initialized``."""
    id: bytes = b""
    version: str = ""

    @property
    def fields(self) -> Fields:
        """The fields of every request in this session."""
        fields: Fields = [(b"mcp-session-id", self.id)] if self.id else []
        if self.version:
            fields.append((b"mcp-protocol-version", self.version.encode()))
        return fields

    def note_result(self, message: object) -> None:
        """Take the revision from the answer to ``initialize``."""
        version = mapping(mapping(message).get("result")).get("protocolVersion")
        if isinstance(version, str) and _VERSION.fullmatch(version):
            self.version = version


class Sessions:
    """Keeps the session that the client believes to be in."""

    def __init__(
        self, channel: Channel, output: LineWriter, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    ) -> None:
        """``spawn`` runs something in the background until the bridge ends."""
        self._channel = channel
        self._output = output
        self._spawn = spawn
        self.current = Session()
        self._renewing = asyncio.Lock()
        self._listener: asyncio.Task[None] | None = None

    def begin(self, message: ClientMessage, response: Response) -> Session:
        """Note that the client's ``initialize`` was answered; its result is still to be read."""
        if self.current.id:
            self._spawn(self._delete(self.current))
        self.current = Session(message, id=field(response, b"mcp-session-id"))
        return self.current

    def initialized(self, message: ClientMessage) -> None:
        """Note that the client's ``notifications/initialized`` was sent, and listen to the server from now on."""
        self.current.initialized = message.content
        self._listen()

    async def renew(self, ended: Session) -> Session:
        """Return a session instead of one that the server has ended; all who ask share it.

        Raises McpAuthProxyError if the server begins none.
        """
        async with self._renewing:
            if self.current is not ended:
                return self.current
            if ended.initialize is None:
                raise UpstreamProtocolError("The server knows no such session.")
            logger.info("the server has ended the session; it is initialized again")
            session = await self._open(ended.initialize)
            if ended.initialized:
                session.initialized = ended.initialized
                (await self._channel.send(b"POST", session.fields, ended.initialized)).close()
            self.current = session
            self._listen()
            return session

    async def close(self) -> None:
        """End the session at the server."""
        if self._listener is not None:
            self._listener.cancel()
        session, self.current = self.current, Session()
        if session.id:
            await self._delete(session)

    async def _open(self, initialize: ClientMessage) -> Session:
        response = await self._channel.send(b"POST", [], initialize.content, harmless=True)
        session = Session(initialize, id=field(response, b"mcp-session-id"))
        (request,) = initialize.requests
        try:
            async for data in read_messages(response, EventParser()):
                message = _read(data)
                if not is_answer(message):
                    await self._output.write(events.one_line(data))
                elif "error" in message:
                    reason = excerpt(str(mapping(message["error"]).get("message", "")))
                    raise UpstreamProtocolError(f"The session has ended, and can't be begun again: {reason}")
                elif key_of(message.get("id")) == request.key:
                    session.note_result(message)
                    return session
        finally:
            response.close()
        raise UpstreamProtocolError(
            f"The session has ended, and initialize was answered {response.status} without a result."
        )

    async def _delete(self, session: Session) -> None:
        with contextlib.suppress(McpAuthProxyError, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                (await self._channel.send(b"DELETE", session.fields)).close()

    # The stream of messages that answer nothing

    def _listen(self) -> None:
        if self._listener is not None and self._listener is not asyncio.current_task():
            self._listener.cancel()
        self._listener = self._spawn(self._follow(self.current))

    async def _follow(self, session: Session) -> None:
        """Pass on what the server says by itself, on a GET stream that is opened again when it breaks."""
        parser, opened, pause = EventParser(), False, RETRY
        while True:
            try:
                response = await self._channel.send(b"GET", session.fields + resumption(parser), urgent=False)
                try:
                    if response.status == 200 and events.is_stream(response.headers):
                        opened = True
                        async for data in read_messages(response, parser):
                            pause = RETRY
                            await self.pass_on(data)
                    elif response.status == 404 and opened and session.id:
                        await self.renew(session)
                        return
                    elif response.status < 500 and response.status != 429:
                        # Many servers have no such stream (405).
                        return
                finally:
                    response.close()
            except McpAuthProxyError as error:
                logger.debug("the stream of the server broke: %s", error)
            except OutputClosed:
                return
            await asyncio.sleep(max(pause, parser.retry or 0.0))
            pause = min(2 * pause, LONGEST_RETRY)
            parser = resumed(parser)

    async def pass_on(self, data: bytes) -> None:
        """Write a message of the server for the client, if it is JSON."""
        if _read(data) is not None:
            await self._output.write(events.one_line(data))


def resumption(parser: EventParser) -> Fields:
    """Return the field that continues a stream behind the last event that was read of it."""
    return [(b"last-event-id", parser.last_id)] if parser.last_id else []


def resumed(before: EventParser) -> EventParser:
    """Return a parser for the stream that continues another one."""
    parser = EventParser(last_id=before.last_id)
    parser.retry = before.retry
    return parser


def _read(data: bytes) -> Any:
    """Return a message of the server; None if it is not JSON, which is logged."""
    try:
        return read_json(data)
    except ValueError:
        logger.warning("a message of the server was dropped, because it is not JSON")
        return None
