"""The fast path: forward a request inside the transports' callbacks, without creating a task.

A request takes it if its token and an idle upstream connection are ready and the proxy itself need not act on its body.
That is the usual case, and it costs half. If the response is a challenge or a redirect, or fails, a ``RequestHandler``
continues from there: nothing is sent twice.
"""

import time
from typing import Literal, Protocol

from mcp_auth_proxy.errors import UpstreamError, UpstreamPoolTimeout
from mcp_auth_proxy.models import AccessToken, Caller
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.http_connection import HttpConnection
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy.headers import encoded_response_fields, is_event_stream, response_headers
from mcp_auth_proxy.proxy.pings import Pings, may_be_pinged
from mcp_auth_proxy.proxy.quota import STOPPED
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.upstream_client import build_head, is_redirect, note_nonce
from mcp_auth_proxy.rpc.messages import needs_inspection

MAX_BODY = 64 * 1024
"""Bytes of request body. With a larger one, the cost of a task hardly matters."""


End = Literal["disconnected", "draining", "removed", "refused"]
"""Why a request is ended early: its client is gone, the proxy shuts down, its server was removed, or its caller may no
longer call."""


class FastPathOwner(Protocol):
    """The object that keeps track of the requests on the fast path."""

    pings: Pings

    def finished(self, request: "FastPathRequest") -> None:
        """Forget a request: it has its response, or its client is gone."""

    def record(self, route: Route, request: ClientRequest, started_at: float) -> None:
        """Count and log a request whose response is complete, or whose client is gone."""

    def keep(self, request: "FastPathRequest", size: int) -> bool:
        """Count bytes that wait for the client; return False if there is no memory for them."""

    def release(self, request: "FastPathRequest") -> None:
        """Give back the memory of a request: its body is not needed any more, or its client has read."""

    def broke_off(self, request: "FastPathRequest", error: UpstreamError) -> None:
        """Count and log a response that ended too early."""

    def fall_back(self, request: "FastPathRequest") -> None:
        """Continue in a handler: the response needs more than forwarding."""


def is_eligible(content: bytes, limit: int) -> bool:
    """Return whether a request with this body may take the fast path; ``limit`` bytes are allowed."""
    return len(content) <= MAX_BODY and len(content) <= limit and not needs_inspection(content)


class FastPathRequest:
    """One POST on the fast path. It is the ``ResponseWaiter`` that the upstream connection gives the response to."""

    __slots__ = (
        "_connection",
        "_events",
        "_owner",
        "_streaming",
        "caller",
        "ending",
        "error",
        "kept",
        "request",
        "response",
        "route",
        "size",
        "started_at",
        "token",
    )

    _connection: HttpConnection

    def __init__(
        self, owner: FastPathOwner, route: Route, request: ClientRequest, caller: Caller, token: AccessToken | None
    ) -> None:
        self._owner = owner
        self._streaming = False
        self._events = False
        """The response is an event stream, counted as open."""
        self.route = route
        self.request = request
        self.caller = caller
        self.token = token
        self.size = 0
        """Bytes of the body, as long as the owner counts them."""
        self.kept = 0
        """Bytes that wait for the client and that the owner counts."""
        self.response: Response | None = None
        self.error: UpstreamError | None = None
        """Why there is no response."""
        self.ending: End | None = None
        """Why the handler that goes on from here has to end the request."""
        self.started_at = time.monotonic()

    def head(self, length: int) -> bytes:
        """Return the head of the upstream request, for a body of ``length`` bytes. Raises SessionNotFound."""
        route = self.route
        return build_head(route, b"POST", route.target, self.request.fields, self.token, length)

    def send(self, connection: HttpConnection, head: bytes, body: bytes) -> None:
        """Send the request on a connection that is ready."""
        self._connection = connection
        self.request.on_disconnect = self._on_disconnect
        connection.send(self, head, body, bodiless=False, timeout=self.route.server.upstream_timeout)

    @property
    def waiting(self) -> bool:
        """Whether the upstream has not answered yet."""
        return self.response is None and self.error is None

    def end(self, reason: End) -> None:
        """End the request early: with an error if its response has not begun, else with a final chunk if possible."""
        if not self.request.started:
            # A handler answers, if none is about to do so already.
            self.ending = reason
            if self.waiting:
                self._connection.fail(UpstreamPoolTimeout("The request was ended."))
            return
        if self.response is not None:
            self.response.close()
        if self._streaming:
            self._finish()
        else:
            self._abort()

    # The upstream connection's side

    def done(self) -> bool:
        return self.response is not None or self.error is not None

    def set_result(self, response: Response) -> None:
        self.response = response
        status = response.status
        if status == 401 or status == 403 or is_redirect(status):
            self._fall_back()
            return
        if self.token is not None and self.token.signer is not None:
            note_nonce(self.token, response)
        if response.whole:
            self._owner.finished(self)
            self.request.respond(status, encoded_response_fields(response.fields, self.route.rules), response.take())
            self._owner.record(self.route, self.request, self.started_at)
        elif response.broken:
            # Nothing of it is with the client yet, so the client can be told.
            self._fall_back()
        else:
            self._stream(response)

    def set_exception(self, exception: UpstreamError) -> None:
        self.error = exception
        self._fall_back()

    def _fall_back(self) -> None:
        self.request.on_disconnect = None
        self._owner.fall_back(self)

    # A response that comes in parts

    def _stream(self, response: Response) -> None:
        self._streaming = response.content_length is None
        if is_event_stream(response.fields):
            self._events = True
            self.route.metrics.open_streams.inc()
        else:
            # Events may be far apart; any other body must be complete in time.
            response.expire_after(self.route.server.upstream_timeout)
        request = self.request
        request.release_body()
        self._owner.release(self)
        if self._streaming:
            request.start_nowait(response.status, encoded_response_fields(response.fields, self.route.rules))
        else:
            request.start_nowait(response.status, response_headers(response.headers, self.route.rules))
        if self._events and may_be_pinged(response):
            self._owner.pings.watch(request)
        if not response.ready:
            request.write_nowait(b"")
        response.consume(self._on_data, self._on_end)

    def _on_data(self, data: bytes) -> None:
        request, response = self.request, self.response
        assert response is not None
        if response.whole:
            self._finish(data)
            return
        request.write_nowait(data)
        if request.may_write:
            return
        if not self._owner.keep(self, STOPPED):
            response.close()
            self._abort()
            return
        response.pause()
        request.on_writable = self._on_writable

    def _on_writable(self) -> None:
        self._owner.release(self)
        if self.response is not None:
            self.response.resume()

    def _on_end(self, error: UpstreamError | None) -> None:
        if error is None:
            self._finish()
            return
        # The head was sent before. Without a final chunk the client notices that the response is incomplete.
        self._owner.broke_off(self, error)
        self._abort()

    def _abort(self) -> None:
        self._owner.finished(self)
        self.request.abort()
        self._record()

    def _finish(self, data: bytes = b"") -> None:
        if not self.request.complete:
            self._owner.finished(self)
            self.request.on_write = None
            self.request.write_nowait(data, last=True)
            self._record()

    def _record(self) -> None:
        if self._events:
            self.route.metrics.open_streams.dec()
            self._owner.pings.forget(self.request)
        self._owner.record(self.route, self.request, self.started_at)

    def _on_disconnect(self) -> None:
        if self.response is None:
            if self.error is not None:
                return
            self._connection.abort()
        else:
            self.response.close()
        self._owner.finished(self)
        self._record()
