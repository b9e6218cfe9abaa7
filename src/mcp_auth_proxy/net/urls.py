"""Which URLs are acceptable in OAuth documents, and what their parts are.

URLs stay the strings that they came as: an issuer or a resource is compared by its characters (RFC 8414 §3.3),
so nothing here returns a normalised URL in their place.
"""

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

MAX_LENGTH = 2048
"""Characters of a URL."""

DEFAULT_PORTS = {"http": 80, "https": 443}

# RFC 3986 §2, without the characters that it leaves out and that parsers disagree on: space, quotes, <>, \, ^, `, {|}.
_ALLOWED = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
_LOOPBACK_V4 = ipaddress.IPv4Network("127.0.0.0/8")
_LOOPBACK_V6 = ipaddress.IPv6Address("::1")
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of an http(s) URL. ``host`` is lower-case, without brackets; ``target`` is path and query, raw."""

    scheme: str
    host: str
    port: int
    target: str
    path: str
    query: str
    fragment: bool
    userinfo: bool

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """Host and port as they stand in a Host header: the default port is left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def split(url: str) -> Parts:
    """Return the parts of an http(s) URL. Raises ValueError, saying in words what is wrong with it."""
    if len(url) > MAX_LENGTH:
        raise ValueError(f"it is longer than {MAX_LENGTH} characters")
    if not _ALLOWED.fullmatch(url):
        raise ValueError("it has characters that a URL may not have")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("it is not a valid URL") from None
    if parts.scheme not in DEFAULT_PORTS:
        raise ValueError("it is not an https URL")
    if port == 0 or not _is_host(host):
        raise ValueError("it has no valid host")
    return Parts(
        scheme=parts.scheme,
        host=host,
        port=port or DEFAULT_PORTS[parts.scheme],
        target=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
        path=parts.path,
        query=parts.query,
        fragment="#" in url,
        userinfo="@" in parts.netloc,
    )


def check(url: str, *, http_loopback: bool, http: bool = False) -> Parts:
    """Return the parts of a URL that may be asked, or that a browser may be sent to.

    It must be https, or http on loopback where ``http_loopback`` allows that, or http anywhere where ``http`` does;
    with no userinfo and no fragment (RFC 6749 §3.1). Raises ValueError, saying in words what is wrong.
    """
    parts = split(url)
    if parts.userinfo:
        raise ValueError("it has a user name or password in it")
    if parts.fragment:
        raise ValueError("it has a fragment")
    if parts.scheme == "http" and not http and not (http_loopback and is_loopback(parts.host)):
        raise ValueError("it is http; only https is accepted, or http on loopback for a server on loopback")
    return parts


def is_loopback(host: str) -> bool:
    """Whether a host is a loopback name (RFC 6761 §6.3) or a loopback address in its usual spelling."""
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address in _LOOPBACK_V4 or address == _LOOPBACK_V6


def origin(url: str) -> str:
    """Return scheme and authority of a URL as they are written, without a trailing slash."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _is_host(host: str) -> bool:
    if ":" not in host:
        return len(host) <= 253 and _NAME.fullmatch(host) is not None
    try:
        return ipaddress.IPv6Address(host).scope_id is None
    except ValueError:
        return False
