"""One request of a client, from its body to the last byte of the upstream's answer.

send → 401/403 → broker → once more; held while a user authorizes; relayed raw, both ways.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mcp_auth_proxy.broker.broker import Broker
from mcp_auth_proxy.broker.pending import ChallengeHistory, PendingAuthorization
from mcp_auth_proxy.errors import (
    AuthorizationError,
    AuthorizationServerUnavailable,
    McpAuthProxyError,
    StoreError,
    UpstreamError,
    UpstreamPoolTimeout,
    UpstreamProtocolError,
    UpstreamTimeout,
)
from mcp_auth_proxy.models import AccessToken
from mcp_auth_proxy.net.client_request import WHEN_GONE
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.proxy.body import BodyTooLarge, ClientDisconnected, read_body
from mcp_auth_proxy.proxy.decoding import decoded
from mcp_auth_proxy.proxy.fast_path import SUBSCRIPTION_MARKER, FastPathRequest
from mcp_auth_proxy.proxy.headers import request_head, response_headers
from mcp_auth_proxy.proxy.redirects import MAX_REDIRECTS, is_redirect
from mcp_auth_proxy.proxy.redirects import target as redirect_target
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.sessions import Sessions
from mcp_auth_proxy.rpc import answers

logger = logging.getLogger(__name__)

COMMENT_INTERVAL = 5.0
"""Seconds between SSE comments on a held response: Python clients give up after 300 s of silence, others earlier."""

DISCOVER_WAIT = 8.0
"""Seconds that ``server/discover`` is held at most: clients probe with 10 s."""

RETRY_WAIT = 45.0
"""Seconds that a retry after ``input_required`` is held at least: answered at once, clients would spin."""

FLUSH_TIMEOUT = 1.0
"""Seconds that a client has, when its request is ended, to take what was sent to it before."""

MAX_SENDS = 10
"""A bound over all bounds on how often one request is sent."""

SSE = b"text/event-stream"

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ProxyContext:
    """What every exchange works with."""

    broker: Broker
    upstream: HttpClient
    sessions: Sessions
    troubles: OutageLog
    draining: asyncio.Future[None]
    """Done when the proxy begins to shut down."""
    body_limit: int
    wait: float
    """Seconds that a request is held at most while a user authorizes."""


class RequestHandler:
    """The state of one request under way."""

    __slots__ = (
        "__weakref__",
        "_action",
        "_body",
        "_initializes",
        "_means",
        "_receive",
        "_response",
        "_route",
        "_scope",
        "_send",
        "_sent",
        "_started",
        "_streaming",
        "ending",
        "listening",
        "task",
    )

    def __init__(
        self,
        means: ProxyContext,
        route: Route,
        scope: dict[str, Any],
        receive: Receive,
        send: Send,
        sent: FastPathRequest | None = None,
    ) -> None:
        """``sent``: the request has been sent once already, with this outcome. To be made in the task that runs it."""
        self._means = means
        self._route = route
        self._scope = scope
        self._receive = receive
        self._send = send
        self._body = b""
        self._action = ""
        self._initializes = False
        self._sent = sent
        self._response = sent.outcome if sent is not None and isinstance(sent.outcome, Response) else None
        self._started: Literal["", "relay", "events"] = ""
        self._streaming = False
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.ending: Literal["gone", "draining"] | None = None
        self.listening = False
        # Plain ASGI tells of a client that went away only to those who keep asking.
        scope["extensions"][WHEN_GONE](lambda: self.end("gone"))

    # The course of a request

    async def run(self) -> None:
        """Carry the request and answer it; errors become answers by their kind."""
        server = self._route.server.name
        try:
            self._body = await read_body(self._receive, self._scope["headers"], self._means.body_limit)
            await self._forward()
        except ClientDisconnected:
            return
        except BodyTooLarge as error:
            await self._answer_failure(413, str(error), answers.UPSTREAM_FAILED)
        except AuthorizationServerUnavailable as error:
            self._means.troubles.warn(server, str(error))
            await self._answer_failure(503, f"Server {server}: {error}", answers.UPSTREAM_FAILED, error.retry_after)
        except AuthorizationError as error:
            logger.warning("server %s: %s", server, error)
            await self._answer_refusal(f"Server {server} can't be authorized: {error}")
        except StoreError as error:
            logger.error("server %s: %s", server, error)
            await self._answer_failure(503, f"Server {server}: {error}", answers.UPSTREAM_FAILED, 5.0)
        except UpstreamProtocolError as error:
            if self._started == "relay":
                # The head is out: all that is left is to end without a final chunk, so that the client notices.
                logger.warning("server %s: the response broke off: %s", server, error)
                return
            self._means.troubles.warn(server, str(error))
            await self._answer_failure(502, f"Server {server}: {error}", answers.UPSTREAM_FAILED)
        except UpstreamPoolTimeout as error:
            self._means.troubles.warn(server, str(error))
            await self._answer_failure(503, f"Server {server}: {error}", answers.UPSTREAM_FAILED, 1.0)
        except UpstreamTimeout as error:
            self._means.troubles.warn(server, str(error))
            await self._answer_failure(504, f"Server {server}: {error}", answers.UPSTREAM_FAILED)
        except McpAuthProxyError as error:
            self._means.troubles.warn(server, str(error))
            await self._answer_failure(502, f"Server {server}: {error}", answers.UPSTREAM_FAILED)

    async def _forward(self) -> None:
        broker = self._means.broker
        account = self._route.account
        self._inspect_body()
        if self._sent is not None:
            token = self._sent.token
        else:
            token = await broker.token(account)
            pending = broker.pending(account) if token is None else None
            if pending is not None:
                token = await self._wait_for_consent(pending)
                if token is None:
                    return
        trail: ChallengeHistory | None = None
        for _ in range(MAX_SENDS):
            response = await self._send_upstream(token)
            if response.status != 401 and response.status != 403:
                await self._relay(response)
                return
            trail = trail or ChallengeHistory()
            verdict = await broker.challenged(
                account,
                status=response.status,
                challenge=_fields(response, b"www-authenticate"),
                nonce=_fields(response, b"dpop-nonce"),
                used=token,
                trail=trail,
            )
            if verdict is None:
                await self._relay(response)
                return
            response.close()
            if isinstance(verdict, PendingAuthorization):
                token = await self._wait_for_consent(verdict)
                if token is None:
                    return
            else:
                token = verdict
        raise AuthorizationError(f"Server {account.server} refuses every token that is renewed for it.")

    def _inspect_body(self) -> None:
        """Parse the two kinds of body that are for us too: ``initialize``, and a retry after ``input_required``."""
        body = self._body
        if answers.is_retry(body):
            self._body, self._action = answers.without_our_input(body)
        if len(body) < 65_536 and b'"initialize"' in body:
            messages, _ = answers.parse(body)
            self._initializes = any(m.method == "initialize" and m.url_elicitation for m in messages)

    # Upstream

    async def _send_upstream(self, token: AccessToken | None) -> Response:
        """Send the request, following redirects that stay on the origin (RFC 9110 §15.4.8, §15.4.9)."""
        route = self._route
        scope = self._scope
        method: bytes = scope["method"].encode("ascii")
        headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        if self._started == "events":
            # The head of the answer is out already, without a Content-Encoding.
            headers = [*((n, v) for n, v in headers if n != b"accept-encoding"), (b"accept-encoding", b"identity")]
        body = self._body
        target = route.target
        prover = token.prover if token else None
        for _ in range(MAX_REDIRECTS + 1):
            if self._sent is not None:
                response = self._sent_before(self._sent)
            else:
                head = request_head(
                    method,
                    target,
                    route.host,
                    headers,
                    token.header if token else None,
                    len(body) if body or method not in (b"GET", b"HEAD", b"DELETE", b"OPTIONS") else None,
                    prover.prove(method, target) if prover else None,
                )
                self.listening = method == b"GET"
                self._response = response = await self._means.upstream.send(
                    route.origin, head, body, method=method, head_timeout=route.server.upstream_timeout
                )
                self.listening = False
            if prover is not None:
                prover.update_nonce(response.headers)
            if not is_redirect(response):
                return response
            target = redirect_target(route, response)
            response.close()
        raise UpstreamProtocolError(f"it redirects more than {MAX_REDIRECTS} times.")

    def _sent_before(self, passage: FastPathRequest) -> Response:
        self._sent = None
        if isinstance(passage.outcome, UpstreamError):
            raise passage.outcome
        assert passage.outcome is not None
        return passage.outcome

    async def _relay(self, response: Response) -> None:
        """Pass the answer on as it comes, bytes unchanged."""
        is_events = _is_event_stream(response)
        if not is_events:
            # Events may be far apart, anything else has to come to its end.
            response.expire_after(self._route.server.upstream_timeout)
        if self._started == "events":
            await self._relay_as_events(response, is_events=is_events)
            return
        headers = response_headers(response.headers)
        self._note(response, headers)
        if self.listening and self._means.draining.done():
            self.end("draining")
        # Head and body in one piece where both are here; a body that is yet to come does not hold up the head.
        chunk = await response.read() if response.ready else b""
        self._started = "relay"
        send = self._send
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        self._body = b""
        while True:
            more = not response.complete
            await send({"type": "http.response.body", "body": chunk, "more_body": more})
            if not more:
                return
            chunk = await response.read()

    def _note(self, response: Response, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Keep what is needed of a response once its head is known."""
        if self._initializes:
            for name, value in headers:
                if name == b"mcp-session-id":
                    self._means.sessions.remember(self._route.server.name, value)
        # What has no length can be ended with a final chunk.
        self._streaming = b"content-length" not in dict(headers)
        self.listening = self._streaming and (self._scope["method"] == "GET" or self._subscribes())

    def _subscribes(self) -> bool:
        """MCP 2026-07-28: ``subscriptions/listen`` takes the place of the GET stream."""
        body = self._body
        if len(body) > 65_536 or SUBSCRIPTION_MARKER not in body:
            return False
        messages, _ = answers.parse(body)
        return any(message.method == "subscriptions/listen" for message in messages)

    async def _relay_as_events(self, response: Response, *, is_events: bool) -> None:
        """Pass the answer on in an event stream that has begun already, while the request was held."""
        if response.status == 200 and is_events:
            self.listening = self._scope["method"] == "GET" or self._subscribes()
            async for data in decoded(response):
                await self._event_bytes(data)
            await self._event_bytes(b"", last=True)
            return
        whole = bytearray()
        async for data in decoded(response):
            whole += data
            if len(whole) > self._means.body_limit:
                raise UpstreamProtocolError(
                    "its answer is too long to be put in an event stream that has begun already."
                )
        messages, _ = answers.parse(bytes(whole))
        if messages and messages[0].id is not None and response.status < 500:
            await self._event_bytes(answers.as_events([bytes(whole)]), last=True)
        elif response.status in (202, 204) or self._scope["method"] == "GET":
            await self._event_bytes(b"", last=True)
        else:
            await self._answer_failure(
                502, f"Server {self._route.server.name} answered HTTP {response.status}.", answers.UPSTREAM_FAILED
            )

    # Held while a user authorizes

    async def _wait_for_consent(self, pending: PendingAuthorization) -> AccessToken | None:
        """Wait for the user, bounded; None when the request has been answered instead.

        What waits in the meantime costs a timer and, where it may stream, a comment every five seconds.
        """
        means = self._means
        messages, _ = answers.parse(self._body)
        refusal = None if messages or not self._is_ours_to_read() else answers.refusal(self._body)
        if refusal is not None:
            # Nothing that a user could allow.
            await self._answer_failure(400, refusal[1], refusal[0])
            return None
        action = self._action
        if action in ("decline", "cancel"):
            raise AuthorizationError("the user declined to open the link.")
        limit = max(means.wait, RETRY_WAIT) if action else means.wait
        if any(message.method == "server/discover" for message in messages):
            limit = min(limit, DISCOVER_WAIT)
        may_stream = self._may_stream(messages)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        while True:
            left = deadline - loop.time()
            token = await pending.wait(min(COMMENT_INTERVAL, left), means.draining)
            if token is not None:
                return token
            if deadline <= loop.time() or means.draining.done():
                await self._answer_with_link(await means.broker.fresh_link(pending))
                return None
            if may_stream:
                await self._event_bytes(b": waiting for the user to authorize\n\n")

    def _is_ours_to_read(self) -> bool:
        """Whether there is a body, in JSON if it is as it should be: the server may know a coding of its own."""
        if self._scope["method"] != "POST":
            return False
        return not any(n == b"content-encoding" and v.lower() != b"identity" for n, v in self._scope["headers"])

    def _may_stream(self, messages: Sequence[answers.Message]) -> bool:
        """A session id travels in the response head, so ``initialize`` must wait for the upstream's."""
        accepts = any(SSE in value for name, value in self._scope["headers"] if name == b"accept")
        if self._scope["method"] == "GET":
            return accepts
        requests = [message for message in messages if message.is_request]
        return accepts and bool(requests) and all(message.method != "initialize" for message in requests)

    async def _answer_with_link(self, pending: PendingAuthorization) -> None:
        server = self._route.server.name
        session = next((v for n, v in self._scope["headers"] if n == b"mcp-session-id"), None)
        elicits = self._means.sessions.elicits(server, session)
        text = f"Server {server} needs your authorization. Open {pending.link} in a browser, then try again."
        if not self._has_request():
            await self._answer_failure(503, text, answers.AUTHORIZATION_REQUIRED, 5.0, link=pending.link)
            return
        answer = answers.answer_all(
            self._body,
            lambda message: answers.authorization_needed(
                message, server=server, link=pending.link, elicitation_id=pending.flow.id, session_elicits=elicits
            ),
            dict,
        )
        await self._answer(200, answer)

    # Answers of our own

    def _has_request(self) -> bool:
        return any(message.is_request for message in answers.parse(self._body)[0])

    async def _answer_refusal(self, text: str) -> None:
        """An authorization that failed: a JSON-RPC error over HTTP 200, since a 4xx means other things to clients."""
        status = 200 if self._has_request() else 502
        await self._answer_failure(status, text, answers.AUTHORIZATION_REQUIRED)

    async def _answer_failure(
        self, status: int, text: str, code: int, retry_after: float | None = None, link: str | None = None
    ) -> None:
        server = self._route.server.name

        def answer(message: answers.Message | None) -> answers.Json:
            return answers.failure(message, text, code=code, server=server, link=link)

        headers = [(b"retry-after", str(max(1, round(retry_after))).encode())] if retry_after is not None else []
        await self._answer(status, answers.answer_all(self._body, answer, lambda: answer(None)), headers)

    async def _answer(self, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        if self._started == "events":
            listens = self._scope["method"] == "GET"
            await self._event_bytes(b"" if listens else answers.as_events([body]), last=True)
            return
        self._started = "relay"
        head = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            *headers,
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": head})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _event_bytes(self, data: bytes, *, last: bool = False) -> None:
        """Send bytes of an event stream of our own, whose head goes out with the first."""
        if not self._started:
            self._started = "events"
            self._streaming = True
            head = [(b"content-type", SSE), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
            await self._send({"type": "http.response.start", "status": 200, "headers": head})
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    # Ends from outside

    def end(self, why: Literal["gone", "draining"]) -> None:
        """Stop the request; what it holds upstream is closed at once."""
        if self.ending is None:
            self.ending = why
            self.task.cancel()

    async def finish_early(self) -> None:
        """Give a stream its final chunk, so that the client sees an end and not a fault."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT):
                if not self._started:
                    text = f"Server {self._route.server.name}: the proxy is shutting down."
                    await self._answer_failure(503, text, answers.UPSTREAM_FAILED, 5.0)
                elif self._streaming:
                    await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def close(self) -> None:
        if self._response is not None:
            self._response.close()


def _fields(response: Response, name: bytes) -> list[bytes]:
    return [value for field, value in response.headers if field.lower() == name]


def _is_event_stream(response: Response) -> bool:
    return dict(response.headers).get(b"content-type", b"").lower().startswith(SSE)
