"""Connections to upstreams: addresses, proxies on the way, and TLS, each within one deadline."""

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path

from mcp_auth_proxy.errors import ConfigError, ConfigurationError, UpstreamUnreachable
from mcp_auth_proxy.net import forward_proxy
from mcp_auth_proxy.net.forward_proxy import ForwardProxy
from mcp_auth_proxy.net.http_connection import Connection
from mcp_auth_proxy.net.urls import Origin

STAGGER = 0.25
"""Seconds that one address is tried alone before the next is tried beside it (RFC 8305 §8)."""

KEEP_ALIVE = ((("TCP_KEEPIDLE", "TCP_KEEPALIVE"), 60), (("TCP_KEEPINTVL",), 15), (("TCP_KEEPCNT",), 4))
"""A peer that vanished is noticed within two minutes: streams have no other limit (design §4.8)."""

HOST_MISMATCH = 62
"""X509_V_ERR_HOSTNAME_MISMATCH of OpenSSL; 64 is its counterpart for addresses."""

Address = tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]


class Dialer:
    """Opens connections. TLS is checked against the system's trust store, ``SSL_CERT_FILE`` and ``ca_bundle``."""

    def __init__(self, *, ca_bundle: Path | None, timeout: float, environ: Mapping[str, str]) -> None:
        self._timeout = timeout
        self._ca_bundle = ca_bundle
        self._proxies = forward_proxy.from_environment(environ)
        # The trust store costs some megabytes: loaded with the first https upstream, but a wrong file is told at once.
        self._tls = _tls_context(self._ca_bundle) if self._ca_bundle else None

    async def open(self, origin: Origin, make: Callable[[socket.socket], Connection]) -> Connection:
        """Return a connection to the origin. Raises UpstreamUnreachable, whose text names address and reason."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._open(origin, make)
        except TimeoutError:
            reason = f"no connection within {self._timeout:g} s"
        except ssl.SSLCertVerificationError as error:
            reason = _certificate_reason(error)
        except ssl.SSLError as error:
            reason = f"TLS failed ({(error.reason or 'unknown reason').lower().replace('_', ' ')})"
        except OSError as error:
            reason = _network_reason(error, origin.host)
        raise UpstreamUnreachable(f"{origin} can't be reached: {reason}.")

    async def _open(self, origin: Origin, make: Callable[[socket.socket], Connection]) -> Connection:
        loop = asyncio.get_running_loop()
        if origin.scheme == "https" and self._tls is None:
            self._tls = _tls_context(None)
        proxy = self._proxies.towards(origin)
        sock = await self._dial_through(proxy, origin) if proxy else await _dial(origin.host, origin.port)
        connection = make(sock)
        try:
            if origin.scheme == "https":
                await loop.create_connection(
                    lambda: connection,
                    sock=sock,
                    ssl=self._tls,
                    server_hostname=origin.host,
                    ssl_handshake_timeout=self._timeout,
                    ssl_shutdown_timeout=1.0,
                )
            else:
                await loop.create_connection(lambda: connection, sock=sock)
        except BaseException:
            # The transport owns the descriptor by now and closes it: closing it twice could hit another's.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            raise
        return connection

    async def _dial_through(self, proxy: ForwardProxy, origin: Origin) -> socket.socket:
        try:
            sock = await _dial(proxy.host, proxy.port)
        except OSError as error:
            reason = _network_reason(error, proxy.host)
            raise UpstreamUnreachable(f"{origin} can't be reached: {proxy} did not answer: {reason}.") from None
        try:
            await proxy.connect(sock, origin)
        except BaseException:
            sock.close()
            raise
        return sock


async def _dial(host: str, port: int) -> socket.socket:
    """Return a connected socket: addresses in turn, the next beside a slow one, families mixed (RFC 8305)."""
    addresses = await _resolve(host, port)
    attempts: set[asyncio.Task[socket.socket]] = set()
    failure: OSError = OSError(errno.EHOSTUNREACH, "no address")
    try:
        while addresses or attempts:
            if addresses:
                attempts.add(asyncio.ensure_future(_connect(*addresses.pop(0))))
            done, attempts = await asyncio.wait(
                attempts, timeout=STAGGER if addresses else None, return_when=asyncio.FIRST_COMPLETED
            )
            connected = [task.result() for task in done if task.exception() is None]
            for spare in connected[1:]:
                spare.close()
            if connected:
                return connected[0]
            for task in done:
                error = task.exception()
                assert isinstance(error, OSError)
                failure = error
        raise failure
    finally:
        for task in attempts:
            task.cancel()
            task.add_done_callback(_close_late)


def _close_late(task: asyncio.Task[socket.socket]) -> None:
    """An attempt that won in the very moment of its cancellation."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


async def _resolve(host: str, port: int) -> list[Address]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    addresses: list[Address] = [(family, sockaddr) for family, _, _, _, sockaddr in found]  # type: ignore[misc]
    first = [address for address in addresses if address[0] == addresses[0][0]]
    other = [address for address in addresses if address[0] != addresses[0][0]]
    mixed: list[Address] = []
    while first or other:
        mixed += first[:1] + other[:1]
        first, other = first[1:], other[1:]
    return mixed


async def _connect(family: socket.AddressFamily, address: tuple[str, int] | tuple[str, int, int, int]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for names, value in KEEP_ALIVE:
            option = next((getattr(socket, name) for name in names if hasattr(socket, name)), None)
            if option is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _tls_context(ca_bundle: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_bundle is not None:
        try:
            context.load_verify_locations(cafile=ca_bundle)
        except OSError as error:
            reason = "it holds no PEM certificate" if isinstance(error, ssl.SSLError) else error.strerror
            raise ConfigurationError(
                [ConfigError("outbound.ca_bundle", f"{ca_bundle} can't be used: {reason}")]
            ) from None
    return context


def _certificate_reason(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in (HOST_MISMATCH, HOST_MISMATCH + 2):
        return "its certificate is for another name"
    detail = str(error.verify_message or "unknown issuer")
    return f"its certificate is not trusted ({detail}; outbound.ca_bundle names further authorities)"


def _network_reason(error: OSError, host: str) -> str:
    if isinstance(error, socket.gaierror):
        if error.errno == socket.EAI_AGAIN:
            return f"the name {host} can't be looked up now"
        return f"the name {host} was not found"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionError):
        return "the connection was closed while it was being made"
    return (error.strerror or "network error").lower()
