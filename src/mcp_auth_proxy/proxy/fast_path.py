"""A request that has only to be passed on, without a task: in the callbacks of the two connections that it concerns.

That is the usual case, and so it costs half: the token and an upstream connection are at hand, and the answer
comes whole. Whatever else turns up is for ``RequestHandler``, which goes on from here: nothing is sent
twice for it.
"""

from typing import Protocol

from mcp_auth_proxy.errors import UpstreamError, UpstreamPoolTimeout
from mcp_auth_proxy.models import AccessToken
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.http_connection import HttpConnection
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy.headers import request_head, response_headers
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.rpc import answers

SUBSCRIPTION_MARKER = b"subscriptions"
"""What is in the body of every ``subscriptions/listen``, however its encoder writes the slash."""

MAX_BODY = 64 * 1024
"""Bytes of request body. A larger one takes its time anyway."""


class FastPathOwner(Protocol):
    """Who knows the passages under way."""

    def finished(self, passage: "FastPathRequest") -> None:
        """It is over."""

    def fall_back(self, passage: "FastPathRequest") -> None:
        """It takes more than passing on: an exchange has to go on with it."""


def is_fast_path_eligible(body: bytes, limit: int) -> bool:
    """Whether nothing about a request's body concerns the proxy itself, with ``limit`` bytes allowed."""
    return (
        len(body) <= MAX_BODY
        and len(body) <= limit
        and b'"initialize"' not in body
        and SUBSCRIPTION_MARKER not in body
        and not answers.is_retry(body)
    )


class FastPathRequest:
    """One POST on its way; what its upstream connection gives the answer to."""

    __slots__ = ("_connection", "_keeper", "outcome", "reply", "route", "token")

    _connection: HttpConnection

    def __init__(self, keeper: FastPathOwner, route: Route, reply: ClientRequest, token: AccessToken | None) -> None:
        self._keeper = keeper
        self.route = route
        self.reply = reply
        self.token = token
        self.outcome: Response | UpstreamError | None = None
        """What the upstream answered, or why it did not; None until then."""

    def head(self, length: int) -> bytes:
        """Return the head of the request, for a body of so many bytes."""
        reply, route = self.reply, self.route
        authorization = proof = None
        if self.token is not None:
            authorization = self.token.header
            if self.token.prover is not None:
                proof = self.token.prover.prove(b"POST", route.target)
        return request_head(b"POST", route.target, route.host, reply.headers, authorization, length, proof)

    def begin(self, connection: HttpConnection, head: bytes, body: bytes) -> None:
        """Send the request."""
        self._connection = connection
        self.reply.on_gone = self._on_gone
        connection.send(self, head, body, bodiless=False, timeout=self.route.server.upstream_timeout)

    def end(self) -> None:
        """Give up waiting for the upstream, since the proxy shuts down."""
        if self.outcome is None:
            self._connection.fail(UpstreamPoolTimeout("the proxy is shutting down."))

    # What the upstream connection tells

    def done(self) -> bool:
        return self.outcome is not None

    def set_result(self, result: Response) -> None:
        self.outcome = result
        if result.whole and not _needs_more(result.status):
            if self.token is not None and self.token.prover is not None:
                self.token.prover.update_nonce(result.headers)
            self._keeper.finished(self)
            self.reply.answer(result.status, response_headers(result.headers), result.take())
        else:
            self._fall_back()

    def set_exception(self, exception: UpstreamError) -> None:
        self.outcome = exception
        self._fall_back()

    def _fall_back(self) -> None:
        self.reply.on_gone = None
        self._keeper.fall_back(self)

    def _on_gone(self) -> None:
        if self.outcome is None:
            self._connection.abort()
            self._keeper.finished(self)


def _needs_more(status: int) -> bool:
    """Whether an answer is for the proxy to act upon: challenges and redirects."""
    return status == 401 or status == 403 or 300 <= status < 400
