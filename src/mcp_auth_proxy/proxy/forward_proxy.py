"""The forward proxy that the environment may name for https upstreams: ``HTTPS_PROXY`` and ``NO_PROXY``."""

import asyncio
import base64
import contextlib
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from mcp_auth_proxy.errors import ConfigurationError, Fault, UpstreamUnreachable
from mcp_auth_proxy.proxy.origin import Origin

HEAD_LIMIT = 16 * 1024


@dataclass(frozen=True, slots=True)
class ForwardProxy:
    """A forward proxy that is asked to CONNECT (RFC 9110 §9.3.6)."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"the proxy {self.host}:{self.port} (HTTPS_PROXY)"


XXX
async def _connect_through(sock: socket.socket, proxy: ForwardProxy, origin: Origin) -> None:
    loop = asyncio.get_running_loop()
    lines = [f"CONNECT {origin} HTTP/1.1", f"Host: {origin}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    await loop.sock_sendall(sock, "\r\n".join([*lines, "", ""]).encode("ascii"))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        data = await loop.sock_recv(sock, 4096)
        head += data
        # Nothing may follow the head: in TLS it is the client that speaks first.
        if not data or len(head) > HEAD_LIMIT or b"\r\n\r\n" in head[:-4]:
            raise UpstreamUnreachable(f"{origin} can't be reached: {proxy} gave no proper answer to CONNECT.")
    status = re.match(rb"HTTP/1\.[01] (\d{3})[ \r]", head)
    if status is None or not status[1].startswith(b"2"):
        code = status[1].decode() if status else "something that is not HTTP"
        raise UpstreamUnreachable(f"{origin} can't be reached: {proxy} answered {code}.")


def _variable(environ: Mapping[str, str], name: str) -> str:
    """Lower case first, as curl and Python have it."""
    return (environ.get(name) or environ.get(name.upper()) or "").strip()


def _proxy_from(url: str) -> ForwardProxy | None:
    if not url:
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme != "http" or not host:
        # The value may hold a password: it is not shown.
        raise ConfigurationError([Fault("", "HTTPS_PROXY in the environment must be like http://host:port")])
    credentials = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        credentials = "Basic " + base64.b64encode(pair.encode()).decode()
    return ForwardProxy(host, port or 80, credentials)


def _bypassed(origin: Origin, no_proxy: tuple[str, ...]) -> bool:
    """Whether NO_PROXY names the origin: ``*``, a domain with or without dot, an address, a network, with a port."""
    address = _ip(origin.host)
    if origin.host == "localhost" or (address is not None and address.is_loopback):
        return True
    for entry in no_proxy:
        if entry == "*":
            return True
        name, colon, port = entry.rpartition(":")
        if colon and port.isdigit() and (":" not in name or name.startswith("[")):
            if int(port) != origin.port:
                continue
            entry = name
        entry = entry.strip("[]").lstrip("*").lstrip(".")
        if address is not None:
            with contextlib.suppress(ValueError):
                if address in ipaddress.ip_network(entry, strict=False):
                    return True
        elif entry and (origin.host == entry or origin.host.endswith("." + entry)):
            return True
    return False


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


