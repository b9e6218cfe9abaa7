"""Open connections: look up the name, try its addresses, ask a forward proxy, start TLS.

Upstreams and OAuth documents are both dialed here. An address policy applies to the latter, whose URLs come from the
network: every address that the resolver answers with is checked, and a checked address is dialed, so that no second
look-up can lead elsewhere (DNS rebinding).
"""

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import TypeVar

from mcp_auth_proxy.errors import UpstreamUnreachable
from mcp_auth_proxy.net import forward_proxy, tls
from mcp_auth_proxy.net.addresses import AddressPolicy
from mcp_auth_proxy.net.forward_proxy import ForwardProxy
from mcp_auth_proxy.net.resolver import Resolve, Resolver, resolve
from mcp_auth_proxy.net.urls import Origin

PROXIED_LOOKUP_TIMEOUT = 3.0
"""Seconds to look up a name before it is left to a forward proxy that is trusted with it."""

MAX_ADDRESSES = 6
"""Addresses of one host that are tried."""

STAGGER = 0.25
"""Seconds that an address is tried alone before the next is tried in parallel (RFC 8305 §8)."""

KEEP_ALIVE = ((("TCP_KEEPIDLE", "TCP_KEEPALIVE"), 60), (("TCP_KEEPINTVL",), 15), (("TCP_KEEPCNT",), 4))
"""TCP keep-alive, in seconds: a vanished peer is noticed within two minutes. Event streams have no other time-out."""

SocketAddress = tuple[str, int] | tuple[str, int, int, int]

Protocol = TypeVar("Protocol", bound=asyncio.BaseProtocol)


class Dialer:
    """Open connections. A process has one dialer: one TLS context, one ``resolver``, one reading of the environment.

    Raises ConfigurationError if ``ca_bundle`` or the proxy in ``environ`` can't be used.
    """

    def __init__(
        self,
        *,
        ca_bundle: Path | None = None,
        environ: Mapping[str, str] = os.environ,
        resolve: Resolve = resolve,
        trust_proxy: bool = False,
    ) -> None:
        """``trust_proxy``: leave names that can't be looked up here to the forward proxy."""
        self._proxies = forward_proxy.from_environment(environ)
        self.resolver = Resolver(resolve)
        self._trust_proxy = trust_proxy
        # The trust store takes megabytes, so it is loaded when it is needed; but a bad ca_bundle is reported at once.
        self._tls = tls.client_context(ca_bundle) if ca_bundle else None

    async def open(
        self,
        origin: Origin,
        protocol_factory: Callable[[socket.socket], Protocol],
        *,
        timeout: float,
        connect_timeout: float | None = None,
        policy: AddressPolicy | None = None,
    ) -> Protocol:
        """Connect to the origin and return the protocol that ``protocol_factory`` made for the socket.

        ``timeout`` is in seconds, for everything: look-up, forward proxy, TCP and TLS. ``connect_timeout`` bounds what
        comes after the look-up. Raises UpstreamUnreachable, whose text is the reason and no more, and AddressRefused if
        ``policy`` is against it.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        proxy = self._proxies.towards(origin)
        owner = _owner(origin, policy)
        if proxy is not None and policy is not None:
            await self._check_proxied(origin, policy, owner, timeout)
        host, port = (origin.host, origin.port) if proxy is None else (proxy.host, proxy.port)
        addresses = await self.resolver.look_up(host, port, owner=owner, timeout=timeout)
        if proxy is None and policy is not None:
            policy.check(origin, addresses)
        if connect_timeout is not None and loop.time() + connect_timeout < deadline:
            timeout, deadline = connect_timeout, loop.time() + connect_timeout
        try:
            async with asyncio.timeout_at(deadline):
                if proxy is None:
                    sock = await _connect_first(addresses, port)
                else:
                    sock = await _tunnel(proxy, addresses, origin)
                return await self._start(sock, origin, protocol_factory, timeout)
        except TimeoutError:
            reason = f"no connection within {timeout:g} s"
        except ssl.SSLError as error:
            reason = tls.failure_reason(error)
        except OSError as error:
            reason = _reason(error)
        except UpstreamUnreachable as error:
            reason = str(error)
        self.resolver.expire(host, owner=owner)
        raise UpstreamUnreachable(reason)

    async def _check_proxied(self, origin: Origin, policy: AddressPolicy, owner: str, timeout: float) -> None:
        """Check an origin that a forward proxy is to be asked for: it would look up the name for us, and not check."""
        policy.check_literal(origin)
        # Without a name server here no answer may come: time has to be left for the proxy, or for an error of ours.
        limit = min(timeout / 2, PROXIED_LOOKUP_TIMEOUT) if self._trust_proxy else timeout / 2
        try:
            addresses = await self.resolver.look_up(origin.host, origin.port, owner=owner, timeout=limit)
        except UpstreamUnreachable as error:
            if self._trust_proxy:
                return
            raise UpstreamUnreachable(
                f"{error}, so its address can't be checked; if only the proxy of HTTPS_PROXY can look it up, and "
                "refuses private addresses, set the key outbound.trust_proxy"
            ) from None
        policy.check(origin, addresses)

    async def _start(
        self, sock: socket.socket, origin: Origin, protocol_factory: Callable[[socket.socket], Protocol], timeout: float
    ) -> Protocol:
        """Start the protocol on a connected socket, in TLS for https."""
        loop = asyncio.get_running_loop()
        protocol = protocol_factory(sock)
        try:
            if origin.scheme == "https":
                if self._tls is None:
                    self._tls = tls.client_context(None)
                await loop.create_connection(
                    lambda: protocol,
                    sock=sock,
                    ssl=self._tls,
                    server_hostname=origin.host.removesuffix("."),
                    ssl_handshake_timeout=timeout,
                    ssl_shutdown_timeout=1.0,
                )
            else:
                await loop.create_connection(lambda: protocol, sock=sock)
        except BaseException:  # also if cancelled during the TLS handshake
            # The transport owns the descriptor by now and closes it: closing it here could hit another's.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            raise
        return protocol


def _owner(origin: Origin, policy: AddressPolicy | None) -> str:
    """Return whose look-up it is: that of an upstream, or of the upstream whose documents are fetched.

    They count separately: documents that name hosts without an answer do not stop the upstream itself.
    """
    if policy is None or policy.own is None:
        return str(origin)
    host, port = policy.own
    return f"{Origin(origin.scheme, host, port)} (documents)"


async def _tunnel(proxy: ForwardProxy, addresses: Sequence[str], origin: Origin) -> socket.socket:
    try:
        sock = await _connect_first(addresses, proxy.port)
    except OSError as error:
        raise UpstreamUnreachable(f"{proxy} did not answer: {_reason(error)}") from None
    try:
        await proxy.connect(sock, origin)
    except BaseException:  # also if cancelled: nobody else closes the socket
        sock.close()
        raise
    return sock


async def _connect_first(addresses: Sequence[str], port: int) -> socket.socket:
    """Return a connected socket; addresses are tried in turn, in parallel if one is slow (RFC 8305). Raises OSError."""
    waiting = _alternate_families(addresses)[:MAX_ADDRESSES]
    attempts: set[asyncio.Task[socket.socket]] = set()
    failure: OSError = OSError(errno.EHOSTUNREACH, "its name has no address")
    try:
        while waiting or attempts:
            if waiting:
                attempts.add(asyncio.ensure_future(_connect(waiting.pop(0), port)))
            done, attempts = await asyncio.wait(
                attempts, timeout=STAGGER if waiting else None, return_when=asyncio.FIRST_COMPLETED
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
    """Close the socket of an attempt that succeeded just as it was cancelled."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


def _alternate_families(addresses: Sequence[str]) -> list[str]:
    """Mix IPv6 and IPv4, beginning with the family of the first address (RFC 8305 §4)."""
    first = [address for address in addresses if (":" in address) == (":" in addresses[0])]
    other = [address for address in addresses if (":" in address) != (":" in addresses[0])]
    mixed: list[str] = []
    while first or other:
        mixed += first[:1] + other[:1]
        first, other = first[1:], other[1:]
    return mixed


async def _connect(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(sock)
        await asyncio.get_running_loop().sock_connect(sock, _socket_address(address, port))
    except BaseException:  # also if cancelled: nobody else closes the socket
        sock.close()
        raise
    return sock


def keep_alive(sock: socket.socket) -> None:
    """Let the kernel notice that a peer has vanished; connections inherit it from a listening socket."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for names, value in KEEP_ALIVE:
        option = next((getattr(socket, name) for name in names if hasattr(socket, name)), None)
        if option is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _socket_address(address: str, port: int) -> SocketAddress:
    parsed = ip_address(address)
    if not isinstance(parsed, IPv6Address):
        return address, port
    return address.partition("%")[0], port, 0, int(parsed.scope_id or 0)


def _reason(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionError):
        return "the connection was closed while it was being made"
    return (error.strerror or "network error").lower()
