"""The one HTTP client for OAuth documents and endpoints; everything it meets is hostile (design §5.2).

https only, or http to loopback; a name is resolved once, every address that it has is checked, and the very address
checked is dialled; no redirects, no cookies, no content encoding; bounded bytes and a total deadline. One exchange is
one connection: none can be stale when a token request needs it, and none that was opened under one server's policy
serves another.

It runs on httpcore2, the layer below httpx2: what httpx2 adds (redirects, cookies, decoding, .netrc, URLs in the
log) is what must not happen here.
"""

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpcore2

from mcp_auth_proxy.errors import AuthorizationServerUnavailable, ConfigHint, DocumentRefused
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.addresses import AddressPolicy

__all__ = ["AddressPolicy", "Fetcher", "Resolve", "Response", "resolve"]

DEADLINE = 10.0
"""Seconds for one exchange, from the look-up of the name to the last byte."""

CONNECT_TIMEOUT = 4.0
"""Seconds for one exchange to be connected, all addresses of the host together."""

MAX_BODY = 256 * 1024
"""Bytes of a response body."""

MAX_ADDRESSES = 6
"""Addresses of one host that are tried."""

# httpx2 logs URLs at INFO and httpcore2 headers at DEBUG: codes and tokens travel in both.
for _name in ("httpx2", "httpcore2"):
    logging.getLogger(_name).setLevel(logging.WARNING)

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port to addresses; raises OSError where there are none."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """Return the addresses of a host, in the order of the system's resolver. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True, slots=True)
class Response:
    """What a server answered. Header names are lower-case; a field that came several times is joined with commas."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    url: str


class _AddressRefused(Exception):
    """A host resolves to an address that the policy does not allow: nothing has been dialled."""


class _Dialler(httpcore2.AsyncNetworkBackend):
    """Resolves once, checks every address, and dials one that it checked: no second look-up can differ (T3)."""

    def __init__(self, policy: AddressPolicy, resolve: Resolve) -> None:
        self._policy = policy
        self._resolve = resolve
        self._sockets = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError):
            raise httpcore2.ConnectError("its name can't be resolved") from None
        for address in addresses:
            if kind := self._policy.refusal(host, port, address):
                raise _AddressRefused(f"{host} leads to {address}, a {kind} address")
        tried = addresses[:MAX_ADDRESSES]
        failure: Exception = httpcore2.ConnectError("its name has no address")
        for address in tried:
            try:
                return await self._sockets.connect_tcp(address, port, timeout=(timeout or DEADLINE) / len(tried))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure


class Fetcher:
    """Carries the requests of all OAuth steps. One object serves the whole process."""

    def __init__(
        self,
        *,
        ca_bundle: Path | None = None,
        resolve: Resolve = resolve,
        deadline: float = DEADLINE,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Trust the system's store, ``SSL_CERT_FILE`` and ``ca_bundle``. ``deadline`` is in seconds.

        Raises OSError where ``ca_bundle`` can't be read (ssl.SSLError where it holds no certificate).
        """
        self._ssl = ssl.create_default_context()
        if ca_bundle is not None:
            self._ssl.load_verify_locations(cafile=ca_bundle)
        self._resolve = resolve
        self._deadline = deadline
        self._proxy = environ.get("https_proxy") or environ.get("HTTPS_PROXY") or ""
        self._no_proxy = environ.get("no_proxy") or environ.get("NO_PROXY") or ""

    async def aclose(self) -> None:
        """Nothing is held between exchanges; here so that owners need not know that."""

    async def get(self, url: str, *, document: str, policy: AddressPolicy) -> Response:
        """Read a document. Raises DocumentRefused, or AuthorizationServerUnavailable.

        ``document`` is its name in words, for errors. Any status but a redirect is returned.
        """
        return await self._exchange("GET", url, [], None, document=document, policy=policy)

    async def options(self, url: str, *, document: str, policy: AddressPolicy) -> Response:
        """Ask what an endpoint takes, which has no effect there (RFC 9110 §9.3.7). Raises as ``get`` does."""
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

        Where it fails after bytes may have left, ``maybe_processed`` of AuthorizationServerUnavailable is True.
        Nothing is posted by http but to loopback, whatever the policy.
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
        parts = _check(url, method, document, policy)
        origin = parts.origin
        sent = False

        async def trace(event: str, info: Mapping[str, object]) -> None:
            nonlocal sent
            sent = sent or event == "http11.send_request_headers.started"

        def unavailable(reason: str) -> AuthorizationServerUnavailable:
            return AuthorizationServerUnavailable(
                f"The {document} at {url} can't be had: {reason}.", maybe_processed=sent and body is not None
            )

        try:
            async with (
                asyncio.timeout(self._deadline),
                self._connections(parts, policy) as connections,
                connections.stream(
                    method,
                    httpcore2.URL(
                        scheme=origin.scheme.encode(),
                        host=origin.host.encode(),
                        port=origin.port,
                        target=parts.target,
                    ),
                    headers=_headers(parts, headers),
                    content=body,
                    extensions={"timeout": {"connect": CONNECT_TIMEOUT}, "trace": trace},
                ) as response,
            ):
                return await _read(response, url, document)
        except _AddressRefused as refused:
            raise DocumentRefused(
                document,
                url,
                f"{refused}; if that is meant, list the host in the key authorization.allow_private",
                hint=ConfigHint("authorization.allow_private", origin.host),
            ) from None
        except httpcore2.ConnectTimeout:
            raise unavailable("no connection in time") from None
        except TimeoutError:
            raise unavailable(f"no complete answer within {self._deadline:g} s") from None
        except (httpcore2.NetworkError, httpcore2.ProxyError, OSError) as error:
            raise unavailable(_reason(error)) from None
        except httpcore2.ProtocolError:
            raise unavailable("the connection broke off, or the answer is not HTTP") from None

    def _connections(self, parts: urls.Url, policy: AddressPolicy) -> httpcore2.AsyncConnectionPool:
        """Return what carries one exchange: a direct connection, or one through the proxy of the environment."""
        if not self._proxy or parts.origin.scheme == "http" or _bypasses(self._no_proxy, parts.origin.host):
            dialler = _Dialler(policy, self._resolve)
            return httpcore2.AsyncConnectionPool(ssl_context=self._ssl, max_connections=1, network_backend=dialler)
        # The proxy resolves names; what is an address in any spelling is still checked here.
        _check_literal(parts, policy)
        proxy = urlsplit(self._proxy if "://" in self._proxy else f"http://{self._proxy}")
        credentials = (unquote(proxy.username), unquote(proxy.password or "")) if proxy.username else None
        return httpcore2.AsyncHTTPProxy(
            f"{proxy.scheme}://{proxy.netloc.rpartition('@')[2]}",
            proxy_auth=credentials,
            ssl_context=self._ssl,
            max_connections=1,
        )


def _check(url: str, method: str, document: str, policy: AddressPolicy) -> urls.Url:
    hint: ConfigHint | None = None
    try:
        origin = urls.parse(url).origin
        may_be_http = policy.allows_http(origin.host, origin.port)
        if urls.is_loopback(origin.host) and not may_be_http:
            hint = ConfigHint("authorization.allow_private", origin.host)
        return urls.check(url, http_loopback=may_be_http, http=may_be_http and method == "GET")
    except ValueError as problem:
        key = "; if that is meant, list the host in the key authorization.allow_private" if hint else ""
        shown = url if url.isprintable() else ""
        raise DocumentRefused(document, shown, f"its URL {problem}{key}", hint=hint) from None


def _check_literal(parts: urls.Url, policy: AddressPolicy) -> None:
    host, port = parts.origin.host, parts.origin.port
    address = host
    if ":" not in address:
        try:
            # inet_aton reads 0x7f.1 and 2130706433 as the system's resolver does.
            address = socket.inet_ntoa(socket.inet_aton(address))
        except OSError:
            if urls.is_loopback(host):
                address = "127.0.0.1"
            else:
                return
    if kind := policy.refusal(host, port, address):
        raise _AddressRefused(f"{host} is {address}, a {kind} address")


def _headers(parts: urls.Url, headers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        ("Host", parts.origin.authority),
        ("Accept", "application/json"),
        ("Accept-Encoding", "identity"),
        ("User-Agent", "mcp-auth-proxy"),
        ("Connection", "close"),
        *headers,
    ]


async def _read(response: httpcore2.Response, url: str, document: str) -> Response:
    headers: dict[str, str] = {}
    for raw_name, raw_value in response.headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if 300 <= response.status < 400:
        raise DocumentRefused(document, url, f"it answers {response.status}, and redirects are not followed")
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise DocumentRefused(document, url, "it is compressed, which was not asked for", "RFC 9110 §12.5.3")
    body = bytearray()
    async for chunk in response.aiter_stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise DocumentRefused(document, url, f"it is longer than {MAX_BODY // 1024} KiB")
    return Response(status=response.status, headers=headers, body=bytes(body), url=url)


def _reason(error: Exception) -> str:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        detail = text.partition("CERTIFICATE_VERIFY_FAILED] ")[2].partition(" (_ssl.c")[0]
        return f"{detail}; a private authority's certificate goes into the key outbound.ca_bundle"
    return text.rstrip(".") or "the connection failed"


def _bypasses(no_proxy: str, host: str) -> bool:
    """Whether NO_PROXY names the host: as itself, as a domain above it, or as ``*``. Loopback never goes by proxy."""
    if urls.is_loopback(host):
        return True
    entries = (entry.strip().lower().lstrip(".") for entry in no_proxy.split(","))
    return any(entry and (entry == "*" or host == entry or host.endswith(f".{entry}")) for entry in entries)
