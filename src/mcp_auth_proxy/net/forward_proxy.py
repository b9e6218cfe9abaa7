"""The forward proxy of the environment: ``HTTPS_PROXY``, and ``NO_PROXY`` for hosts that are reached directly.

``NO_PROXY`` has no standard. This is the common ground of curl, Go and Python: entries are separated by commas or
spaces, and each is ``*``, a domain (``corp.example``, ``.corp.example`` and ``*.corp.example`` are the same: the domain
and everything below it), an address or a network in CIDR form, with or without ``:port``.
"""

import asyncio
import base64
import logging
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import unquote, urlsplit

from mcp_auth_proxy.errors import ConfigError, ConfigurationError, UpstreamUnreachable
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.http_head import encode_head
from mcp_auth_proxy.net.urls import Origin

logger = logging.getLogger(__name__)

HEAD_LIMIT = 16 * 1024
"""Bytes of the response to CONNECT."""


@dataclass(frozen=True, slots=True)
class ForwardProxy:
    """A forward proxy that is used with CONNECT (RFC 9110 §9.3.6)."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"the proxy {self.host}:{self.port} (HTTPS_PROXY)"

    async def connect(self, sock: socket.socket, origin: Origin) -> None:
        """Turn a socket connected to the proxy into a tunnel to the origin. Raises UpstreamUnreachable."""
        loop = asyncio.get_running_loop()
        lines = [f"CONNECT {origin} HTTP/1.1", f"Host: {origin}"]
        if self.authorization:
            lines.append(f"Proxy-Authorization: {self.authorization}")
        await loop.sock_sendall(sock, encode_head([line.encode("ascii") for line in lines]))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = await loop.sock_recv(sock, 4096)
            head += data
            # Nothing may follow the head: in TLS the client speaks first.
            if not data or len(head) > HEAD_LIMIT or b"\r\n\r\n" in head[:-4]:
                raise UpstreamUnreachable(f"{self} gave no proper answer to CONNECT")
        status = re.match(rb"HTTP/1\.[01] (\d{3})[ \r]", head)
        if status is None or not status[1].startswith(b"2"):
            answer = status[1].decode() if status else "with something that is not HTTP"
            raise UpstreamUnreachable(f"{self} answered {answer}")


@dataclass(frozen=True, slots=True)
class Exemption:
    """An entry of ``NO_PROXY``: a network, a domain with everything below it, or ``*``; for one port, or for any."""

    domain: str = ""
    network: IPv4Network | IPv6Network | None = None
    port: int | None = None

    def matches(self, origin: Origin, address: IPv4Address | IPv6Address | None) -> bool:
        """Return whether the origin is exempt; ``address`` is its host if that is an IP address."""
        if self.port is not None and self.port != origin.port:
            return False
        if self.domain == "*":
            return True
        if self.network is not None or address is not None:
            return self.network is not None and address is not None and address in self.network
        host = origin.host.removesuffix(".")
        return host == self.domain or host.endswith(f".{self.domain}")


@dataclass(frozen=True, slots=True)
class ForwardProxies:
    """Decide which origins are reached through a proxy."""

    https: ForwardProxy | None
    exempt: tuple[Exemption, ...]

    def towards(self, origin: Origin) -> ForwardProxy | None:
        """Return the proxy to use, or None to connect directly.

        Loopback and plain http are always direct: http servers are on loopback, or allowed by name in the
        configuration.
        """
        if self.https is None or origin.scheme != "https" or urls.is_loopback(origin.host):
            return None
        address = _address(origin.host)
        if any(entry.matches(origin, address) for entry in self.exempt):
            return None
        return self.https


def from_environment(environ: Mapping[str, str]) -> ForwardProxies:
    """Read ``HTTPS_PROXY`` and ``NO_PROXY``; the lower-case names take precedence, as in curl.

    Entries of ``NO_PROXY`` that can't match anything are ignored; one line in the log names them. Raises
    ConfigurationError if ``HTTPS_PROXY`` can't be used.
    """
    proxy = _read_proxy(_variable(environ, "https_proxy"))
    exempt: list[Exemption] = []
    ignored: list[str] = []
    for text in filter(None, re.split(r"[\s,]+", _variable(environ, "no_proxy"))):
        entry = _read_exemption(text.lower())
        if entry is not None:
            exempt.append(entry)
        else:
            # The entry may be a proxy URL, put here by mistake, with its password.
            ignored.append(repr(text.rpartition("@")[2][:100]))
    if ignored:
        logger.warning(
            "NO_PROXY: ignored, because they can't match anything: %s "
            "(an entry is *, a domain, an address or a network such as 10.0.0.0/8, with or without :port)",
            ", ".join(ignored),
        )
    return ForwardProxies(proxy, tuple(exempt))


def _variable(environ: Mapping[str, str], name: str) -> str:
    return (environ.get(name) or environ.get(name.upper()) or "").strip()


def _read_proxy(url: str) -> ForwardProxy | None:
    if not url:
        return None
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme != "http" or not host:
        # The value may contain a password, so it is not shown.
        raise ConfigurationError([ConfigError("", "HTTPS_PROXY in the environment must be like http://host:port")])
    credentials = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        credentials = "Basic " + base64.b64encode(pair.encode()).decode()
    return ForwardProxy(host, port or 80, credentials)


def _read_exemption(text: str) -> Exemption | None:
    """Parse an entry in lower case; None if nothing can match it."""
    port: int | None = None
    if text.count(":") == 1 or "]:" in text:
        text, _, digits = text.rpartition(":")
        if not re.fullmatch(r"[0-9]{1,5}", digits) or not 1 <= int(digits) <= 65535:
            return None
        port = int(digits)
    if text == "*":
        return Exemption(domain="*", port=port)
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    try:
        # A zone identifier is not part of any host of a URL.
        return None if "%" in text else Exemption(network=ip_network(text, strict=False), port=port)
    except ValueError:
        domain = text.lstrip("*").lstrip(".").removesuffix(".")
    # A name can't end in a number: "10." and "192.168" are meant as networks, but are not written as such.
    if not urls.is_host(domain) or domain.rpartition(".")[2].isdigit():
        return None
    return Exemption(domain=domain, port=port)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
