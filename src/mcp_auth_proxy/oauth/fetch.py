"""The HTTP client for OAuth documents and endpoints. It treats every address and every response as hostile.

It uses https, or http on loopback. An address policy is applied to the addresses that a name is resolved to, before
any of them is dialed. Redirects, cookies and content codings are not supported; the bytes of a response and the time
of a request are bounded. Each request has a connection of its own: none can be stale when a token request needs it, and
none that was opened under the policy of one server is used for another.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from mcp_auth_proxy.errors import (
    AuthorizationServerUnavailable,
    ConfigHint,
    DocumentRefused,
    UpstreamError,
    UpstreamUnreachable,
    excerpt,
)
from mcp_auth_proxy.net import http_response, urls
from mcp_auth_proxy.net.addresses import AddressPolicy, AddressRefused
from mcp_auth_proxy.net.deadline import patient_timeout
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_connection import READ_SIZE, HttpConnection
from mcp_auth_proxy.net.http_head import HOPS, MAX_HOPS, encode_head
from mcp_auth_proxy.net.urls import Origin, Url

__all__ = ["AddressPolicy", "Fetcher", "Response", "sent_only_while"]

DEADLINE = 10.0
"""Seconds for one request, from the look-up of the name to the last byte of the response."""

CONNECT_TIMEOUT = 4.0
"""Seconds to connect once the name is looked up: all addresses of the host together, forward proxy and TLS."""

MAX_BODY = 256 * 1024
"""Bytes of a response body."""

_NO_TIMEOUT = 86_400.0
"""Seconds until a connection gives up by itself: later than any deadline."""

_may_send: ContextVar[Callable[[], bool] | None] = ContextVar("_may_send", default=None)
_paced: ContextVar[tuple[str, Callable[[], Awaitable[None]]] | None] = ContextVar("_paced", default=None)
_FIELD_VALUE = re.compile(r"[!-~]([ -~\t]*[!-~])?|")
"""A field value in ASCII (RFC 9110 §5.5): nothing in it ends a line."""


@dataclass(frozen=True, slots=True)
class Response:
    """The response to one request. Header names are in lower case; fields of the same name are joined with commas."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    url: str


@contextmanager
def sent_only_while(condition: Callable[[], bool]) -> Iterator[None]:
    """Send no request of the block once the condition does not hold any more: it fails as if the server were down.

    A process may be stopped between what it has checked and what it sends.
    """
    token = _may_send.set(condition)
    try:
        yield
    finally:
        _may_send.reset(token)


@contextmanager
def paced(url: str, wait: Callable[[], Awaitable[None]]) -> Iterator[None]:
    """Await ``wait`` right before each form of the block is posted to ``url``, once the connection is open."""
    token = _paced.set((url, wait))
    try:
        yield
    finally:
        _paced.reset(token)


class Fetcher:
    """Send the requests of all OAuth steps; one for the whole process. ``deadline`` is in seconds."""

    def __init__(self, dialer: Dialer | None = None, *, deadline: float = DEADLINE) -> None:
        self._dialer = dialer or Dialer()
        self._deadline = deadline
        self._owner = _SingleUse()

    async def aclose(self) -> None:
        """Let the connections of the last requests close."""
        await asyncio.sleep(0)

    async def get(
        self, url: str, *, headers: Sequence[tuple[str, str]] = (), document: str, policy: AddressPolicy
    ) -> Response:
        """Fetch a document. Raises DocumentRefused or AuthorizationServerUnavailable.

        ``document`` is its name in words, for errors. Any status but a redirect is returned.
        """
        return await self._exchange("GET", url, headers, None, document=document, policy=policy)

    async def options(self, url: str, *, document: str, policy: AddressPolicy) -> Response:
        """Ask what an endpoint accepts, which changes nothing there (RFC 9110 §9.3.7). Raises as ``get`` does."""
        return await self._exchange("OPTIONS", url, [], None, document=document, policy=policy)

    async def post(
        self,
        url: str,
        *,
        body: bytes,
        content_type: str,
        headers: Sequence[tuple[str, str]] = (),
        document: str,
        policy: AddressPolicy,
    ) -> Response:
        """Send a request to an endpoint, once. Raises as ``get`` does.

        If it fails after bytes may have left, ``maybe_processed`` of AuthorizationServerUnavailable is True. Nothing is
        posted by http except to loopback, whatever the policy says.
        """
        return await self._exchange(
            "POST", url, [("Content-Type", content_type), *headers], body, document=document, policy=policy
        )

    async def _exchange(
        self,
        method: str,
        url: str,
        headers: Sequence[tuple[str, str]],
        body: bytes | None,
        *,
        document: str,
        policy: AddressPolicy,
    ) -> Response:
        parsed = _check(url, method, document, policy)
        head = _request_head(method, parsed, headers, body)
        sent = timed_out = False
        try:
            async with patient_timeout(self._deadline):
                connection = await self._connect(parsed.origin, policy)
                try:
                    if body is not None and (pace := _paced.get()) is not None and pace[0] == url:
                        await pace[1]()
                        if connection.closed:
                            raise UpstreamUnreachable("it closed the connection before anything was sent")
                    if (may_send := _may_send.get()) is not None and not may_send():
                        raise UpstreamUnreachable("it took too long to connect, and nothing was sent")
                    sent = True
                    response = await connection.request(head, body or b"", method=method.encode(), timeout=_NO_TIMEOUT)
                    return await _read(response, url, document)
                finally:
                    connection.abort()
        except AddressRefused as refused:
            raise DocumentRefused(
                document,
                url,
                f"{refused}; if that is intended, list the host in the key authorization.allow_private",
                hint=ConfigHint("authorization.allow_private", parsed.origin.host),
            ) from None
        except TimeoutError:
            timed_out = True
            reason = f"no complete answer within {self._deadline:g} s"
        except UpstreamError as error:
            reason = str(error).removesuffix(".")
        raise AuthorizationServerUnavailable(
            f"Could not fetch the {document} from {excerpt(url)}: {reason}.",
            maybe_processed=sent and body is not None,
            timed_out=timed_out,
        )

    async def _connect(self, origin: Origin, policy: AddressPolicy) -> HttpConnection:
        connection = await self._dialer.open(
            origin,
            lambda sock: HttpConnection(self._owner, sock),
            timeout=self._deadline,
            connect_timeout=CONNECT_TIMEOUT,
            policy=policy,
        )
        if connection.closed:
            raise UpstreamUnreachable("it closed the connection at once")
        return connection


class _SingleUse:
    """The owner of connections that carry one request each."""

    name = ""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(READ_SIZE))

    def connection_released(self, connection: HttpConnection) -> None:
        connection.close()

    def connection_stale(self, connection: HttpConnection) -> None:
        """Do nothing: a connection that is used once is never stale."""

    def connection_closed(self, connection: HttpConnection, *, idle: bool) -> None:
        """Do nothing: the connection was not pooled."""


def _check(url: str, method: str, document: str, policy: AddressPolicy) -> Url:
    hint: ConfigHint | None = None
    try:
        origin = urls.parse(url).origin
        may_be_http = policy.allows_http(origin.host, origin.port)
        if urls.is_loopback(origin.host) and not may_be_http:
            hint = ConfigHint("authorization.allow_private", origin.host)
        return urls.check(url, http_loopback=may_be_http, http=may_be_http and method == "GET")
    except ValueError as problem:
        key = "; if that is intended, list the host in the key authorization.allow_private" if hint else ""
        shown = url if url.isprintable() else ""
        raise DocumentRefused(document, shown, f"its URL {problem}{key}", hint=hint) from None


def _request_head(method: str, url: Url, headers: Sequence[tuple[str, str]], body: bytes | None) -> bytes:
    fields = [
        ("Host", url.origin.authority),
        ("Accept", "application/json"),
        ("Accept-Encoding", "identity"),
        ("User-Agent", "mcp-auth-proxy"),
        ("Connection", "close"),
        # A document that leads to the endpoint of a proxy would come back here, and wait for itself: it is 508 there.
        (HOPS.decode(), str(MAX_HOPS)),
        *headers,
    ]
    if body is not None:
        fields.append(("Content-Length", str(len(body))))
    for name, value in fields:
        if not _FIELD_VALUE.fullmatch(value):
            raise ValueError(f"the value of {name} can't be sent in a header")
    lines = [f"{method} {url.target.decode('ascii')} HTTP/1.1", *(f"{name}: {value}" for name, value in fields)]
    return encode_head([line.encode("ascii") for line in lines])


async def _read(response: http_response.Response, url: str, document: str) -> Response:
    """Read the body up to its limit. Raises DocumentRefused, and UpstreamProtocolError if it breaks off."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in response.headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if 300 <= response.status < 400:
        raise DocumentRefused(document, url, f"it answers {response.status}, and redirects are not followed")
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise DocumentRefused(document, url, "it is compressed, which was not asked for", "RFC 9110 §12.5.3")
    body = bytearray()
    while not response.complete:
        body += await response.read()
        if len(body) > MAX_BODY:
            raise DocumentRefused(document, url, f"it is longer than {MAX_BODY // 1024} KiB")
    return Response(status=response.status, headers=headers, body=bytes(body), url=url)
