"""One line of the client on its way to the server, and the answers on their way back."""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mcp_auth_proxy.cli.stdio_bridge.channel import Channel, read_messages
from mcp_auth_proxy.cli.stdio_bridge.lines import LineWriter
from mcp_auth_proxy.cli.stdio_bridge.messages import (
    ClientMessage,
    Request,
    error_line,
    is_answer,
    key_of,
    mapping,
    read_json,
)
from mcp_auth_proxy.cli.stdio_bridge.sessions import LONGEST_RETRY, RETRY, Session, Sessions, resumed, resumption
from mcp_auth_proxy.cli.stdio_bridge.tools import Tools
from mcp_auth_proxy.errors import McpAuthProxyError, UpstreamProtocolError
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.rpc import events
from mcp_auth_proxy.rpc.answers import CALLER_REFUSED, NOT_FOUND, UPSTREAM_FAILED
from mcp_auth_proxy.rpc.encoding import encode
from mcp_auth_proxy.rpc.event_parser import EventParser
from mcp_auth_proxy.rpc.mirrored_fields import HEADER_MISMATCH

logger = logging.getLogger(__name__)

MAX_RESUMPTIONS = 6
"""Attempts to continue a stream that bring nothing, one after the other."""

AFTER_ANSWER = 1.0
"""Seconds that a response has to end after the last answer in it; its connection is then used again."""

LISTEN = "subscriptions/listen"
_ACKNOWLEDGED = "notifications/subscriptions/acknowledged"
_CODES = {401: CALLER_REFUSED, 403: CALLER_REFUSED, 404: NOT_FOUND}


@dataclass(frozen=True, slots=True)
class Context:
    """What all exchanges share."""

    channel: Channel
    output: LineWriter
    sessions: Sessions
    tools: Tools


class Exchange:
    """A line with requests: sent once, until each of them has its answer. Cancelling closes it."""

    def __init__(self, context: Context, message: ClientMessage) -> None:
        self._context = context
        self.message = message
        self._waiting: dict[str, Request] = {request.key: request for request in message.requests}
        self._parser = EventParser()
        self._session: Session | None = None
        """That of this ``initialize``, if it is one."""
        self._acknowledged = False

    async def run(self) -> None:
        """Send the line and pass on what comes back; a request that gets no answer is answered with an error."""
        try:
            if self.message.method == LISTEN and self.message.version:
                await self._subscribe()
            else:
                await self._pass_on_all(await self._send())
                await self._resume()
            await self._answer_rest(UPSTREAM_FAILED, "The response of the server ended without an answer.")
        except McpAuthProxyError as error:
            await self._answer_rest(UPSTREAM_FAILED, str(error))

    # Sending

    async def _send(self) -> Response:
        return await (self._send_modern() if self.message.version else self._send_in_session())

    async def _send_in_session(self) -> Response:
        """Send the line in the session; if the server has ended that, once more in a new one."""
        message, sessions = self.message, self._context.sessions
        if message.method == "initialize":
            response = await self._post([])
            self._session = sessions.begin(message, response)
            return response
        session = sessions.current
        response = await self._post(session.fields)
        if response.status == 404 and session.id:
            response.close()
            response = await self._post((await sessions.renew(session)).fields)
        return response

    async def _send_modern(self) -> Response:
        """Send a request of 2026-07-28; if its fields were refused, once more after the tools were listed."""
        message, tools = self.message, self._context.tools
        fields = tools.fields(message)
        response = await self._post(fields)
        if response.status != 400 or message.method != "tools/call":
            return response
        refusal = [data async for data in read_messages(response, EventParser())]
        response.close()
        with suppress(ValueError):
            if mapping(mapping(read_json(b"".join(refusal))).get("error")).get("code") == HEADER_MISMATCH:
                await tools.refresh(message)
                if (again := tools.fields(message)) != fields:
                    return await self._post(again)
        for data in refusal:
            await self._pass_on_failure(400, data)
        return response

    async def _post(self, fields: list[tuple[bytes, bytes]]) -> Response:
        message = self.message
        return await self._context.channel.send(b"POST", fields, message.content, harmless=message.harmless)

    # Receiving

    async def _pass_on_all(self, response: Response) -> None:
        """Pass on the messages of a response. Returns once it ends, or soon after the last answer in it.

        A stream that breaks off returns too, if it can be resumed.
        """
        stream = events.is_stream(response.headers)
        try:
            async with asyncio.timeout(None) as timeout:
                async for data in read_messages(response, self._parser):
                    if response.status < 400 or stream:
                        await self._pass_on(data)
                    else:
                        await self._pass_on_failure(response.status, data)
                    if not self._waiting and timeout.when() is None:
                        timeout.reschedule(asyncio.get_running_loop().time() + AFTER_ANSWER)
            if self._waiting and response.status >= 400:
                await self._pass_on_failure(response.status, b"")
        except TimeoutError:
            pass
        except UpstreamProtocolError:
            if self._waiting and not self._resumable:
                raise
        finally:
            response.close()

    async def _pass_on(self, data: bytes) -> None:
        """Pass on a message, or a batch of them, and note which requests it answers."""
        try:
            document = read_json(data)
        except ValueError:
            raise UpstreamProtocolError("The answer of the server is not JSON.") from None
        answered: list[str] = []
        changed = False
        for each in document if isinstance(document, list) else [document]:
            if is_answer(each):
                key = key_of(each.get("id"))
                answered.append(key)
                changed |= self._note_answer(self._waiting.get(key), each)
            elif mapping(each).get("method") == _ACKNOWLEDGED:
                if self._acknowledged:
                    # That of a stream which was opened again: the client knows only one.
                    return
                self._acknowledged = True
        await self._context.output.write(encode(document) if changed else events.one_line(data))
        for key in answered:
            self._waiting.pop(key, None)

    def _note_answer(self, request: Request | None, answer: dict[str, Any]) -> bool:
        """Learn from an answer, and return whether it was changed."""
        if self._session is not None:
            self._session.note_result(answer)
        if request is not None and request.method == "tools/list" and self.message.version:
            return self._context.tools.note(answer)
        return False

    async def _pass_on_failure(self, status: int, data: bytes) -> None:
        """Answer the requests with the error of an HTTP response whose status is one."""
        try:
            document = read_json(data)
        except ValueError:
            document = None
        error = mapping(document).get("error")
        if not isinstance(error, dict) or "code" not in error:
            text = f"The answer has the HTTP status {status}, and no JSON-RPC message."
            await self._answer_rest(_CODES.get(status, UPSTREAM_FAILED), text)
        elif key_of(mapping(document).get("id")) in self._waiting:
            await self._pass_on(data)
        else:
            # The id could not be read, or nobody has tried to: it is an answer all the same.
            for request in self._take_waiting():
                await self._context.output.write(encode({"jsonrpc": "2.0", "id": request.id, "error": error}))

    async def _answer_rest(self, code: int, text: str) -> None:
        for request in self._take_waiting():
            await self._context.output.write(error_line(request.id, code, text))

    def _take_waiting(self) -> list[Request]:
        waiting = list(self._waiting.values())
        self._waiting.clear()
        return waiting

    # Streams that break

    @property
    def _resumable(self) -> bool:
        """Whether a stream can be continued: 2026-07-28 has no such streams any more."""
        return bool(self._parser.last_id) and not self.message.version

    async def _resume(self) -> None:
        """Continue a stream that ended before all answers were in it, as often as the server has more of it.

        Raises McpAuthProxyError.
        """
        failures, pause = 0, RETRY
        while self._waiting and self._resumable and failures < MAX_RESUMPTIONS:
            self._parser = resumed(self._parser)
            await asyncio.sleep(max(pause, self._parser.retry or 0.0) if failures else self._parser.retry or pause)
            before, failures, pause = self._parser.last_id, failures + 1, min(2 * pause, LONGEST_RETRY)
            fields = self._context.sessions.current.fields + resumption(self._parser)
            try:
                response = await self._context.channel.send(b"GET", fields)
            except McpAuthProxyError as error:
                logger.debug("a stream can't be continued now: %s", error)
                continue
            if response.status == 200 and events.is_stream(response.headers):
                await self._pass_on_all(response)
                if self._parser.last_id != before:
                    failures, pause = 0, RETRY
            else:
                response.close()
                if response.status < 500:
                    return

    async def _subscribe(self) -> None:
        """Pass on a subscription, and subscribe again if the proxy ends: the client does not see it change.

        MCP 2026-07-28, "Subscriptions": a server that ends one closes the stream, or says so on standard output.
        """
        pause = RETRY
        while self._waiting:
            self._parser = EventParser()
            try:
                response = await self._send()
                await self._pass_on_all(response)
            except McpAuthProxyError as error:
                if not self._acknowledged:
                    raise
                logger.debug("a subscription broke: %s", error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_RETRY)
                continue
            for request in self._take_waiting():
                params = {"requestId": request.id, "reason": "The server has ended the subscription."}
                await self._context.output.write(
                    encode({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params})
                )
