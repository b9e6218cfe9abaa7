"""The forward proxy that the environment may name for https upstreams: ``HTTPS_PROXY`` and ``NO_PROXY``."""

import asyncio
import base64
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from mcp_auth_proxy.errors import ConfigError, ConfigurationError, UpstreamUnreachable
from mcp_auth_proxy.net.urls import Origin

HEAD_LIMIT = 16 * 1024


@dataclass(frozen=True, slots=True)
class ForwardProxy:
    """A forward proxy that is asked to CONNECT (RFC 9110 §9.3.6)."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"the proxy {self.host}:{self.port} (HTTPS_PROXY)"

    async def connect(self, sock: socket.socket, origin: Origin) -> None:
        """Make a socket that is connected to the proxy one that leads to the origin. Raises UpstreamUnreachable."""
        loop = asyncio.get_running_loop()
        lines = [f"CONNECT {origin} HTTP/1.1", f"Host: {origin}"]
        if self.authorization:
            lines.append(f"Proxy-Authorization: {self.authorization}")
        await loop.sock_sendall(sock, "\r\n".join([*lines, "", ""]).encode("ascii"))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = await loop.sock_recv(sock, 4096)
            head += data
            # Nothing may follow the head: in TLS it is the client that speaks first.
            if not data or len(head) > HEAD_LIMIT or b"\r\n\r\n" in head[:-4]:
                raise UpstreamUnreachable(f"{origin} can't be reached: {self} gave no proper answer to CONNECT.")
        status = re.match(rb"HTTP/1\.[01] (\d{3})[ \r]", head)
        if status is None or not status[1].startswith(b"2"):
            answer = status[1].decode() if status else "something that is not HTTP"
            raise UpstreamUnreachable(f"{origin} can't be reached: {self} answered {answer}.")


@dataclass(frozen=True, slots=True)
class ForwardProxies:
    """Which way leads to which origin."""

    https: ForwardProxy | None
    exempt: tuple[str, ...]
    """The entries of NO_PROXY, in lower case."""

    def towards(self, origin: Origin) -> ForwardProxy | None:
        """Return the proxy to ask. Plain http goes direct: such upstreams are on loopback, or allowed by name."""
        if self.https is None or origin.scheme != "https" or self._exempts(origin):
            return None
        return self.https

    def _exempts(self, origin: Origin) -> bool:
        address = _ip(origin.host)
        if origin.host == "localhost" or (address is not None and address.is_loopback):
            return True
        return any(_matches(entry, origin, address) for entry in self.exempt)


def from_environment(environ: Mapping[str, str]) -> ForwardProxies:
    """Read ``HTTPS_PROXY`` and ``NO_PROXY``. Raises ConfigurationError on a proxy URL that is none."""
    exempt = _variable(environ, "no_proxy").lower().split(",")
    return ForwardProxies(
        _read_url(_variable(environ, "https_proxy")), tuple(entry.strip() for entry in exempt if entry.strip())
    )


def _variable(environ: Mapping[str, str], name: str) -> str:
    """Lower case first, as curl and Python have it."""
    return (environ.get(name) or environ.get(name.upper()) or "").strip()


def _read_url(url: str) -> ForwardProxy | None:
    if not url:
        return None
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme != "http" or not host:
        # The value may hold a password: it is not shown.
        raise ConfigurationError([ConfigError("", "HTTPS_PROXY in the environment must be like http://host:port")])
    credentials = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        credentials = "Basic " + base64.b64encode(pair.encode()).decode()
    return ForwardProxy(host, port or 80, credentials)


def _matches(entry: str, origin: Origin, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None) -> bool:
    """Whether an entry names the origin: ``*``, a domain with or without dot, an address or network; with a port."""
    if entry == "*":
        return True
    name, colon, port = entry.rpartition(":")
    if not (colon and port.isdigit() and (":" not in name or name.startswith("["))):
        name = entry
    elif int(port) != origin.port:
        return False
    name = name.strip("[]").lstrip("*").lstrip(".")
    if address is None:
        return bool(name) and (origin.host == name or origin.host.endswith("." + name))
    try:
        return address in ipaddress.ip_network(name, strict=False)
    except ValueError:
        return False


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
