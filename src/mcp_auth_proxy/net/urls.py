"""Parse http(s) URLs, hosts and web origins. All other modules use these definitions.

OAuth compares an issuer and a resource character by character (RFC 8414 §3.3), so callers also keep the text of a URL:
nothing here returns a normalized URL to use instead.
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote

MAX_LENGTH = 2048
"""Characters of a URL in a document from the network."""

DEFAULT_PORTS = {"http": 80, "https": 443}

_PRINTABLE = re.compile(r"[!-\[\]-~]+")
# RFC 3986 §2. Parsers disagree on the other printable characters: quotes, <>, ^, ` and {|}.
_URI_CHARACTERS = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
_URL = re.compile(r"(https?)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(#.*)?", re.IGNORECASE | re.ASCII)
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([0-9a-z._-]+))(?::([0-9]{0,5}))?", re.IGNORECASE | re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.?")
_PATH_SAFE = "/%:@!$&'()*+,;=-._~"
_LOOPBACK_V4 = ipaddress.IPv4Network("127.0.0.0/8")
_LOOPBACK_V6 = ipaddress.IPv6Address("::1")


class Origin(NamedTuple):
    """Scheme, host and port (RFC 6454 §4). ``host`` is in lower case, without brackets. ``str`` is ``host:port``."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self._bracketed_host}:{self.port}"

    @property
    def authority(self) -> str:
        """The value of a Host field: the default port is left out (RFC 9110 §7.2)."""
        return self._bracketed_host if self.port == DEFAULT_PORTS[self.scheme] else str(self)

    @property
    def serialized(self) -> str:
        """The value of an Origin field: ``scheme://authority`` (RFC 6454 §6.2)."""
        return f"{self.scheme}://{self.authority}"

    @property
    def _bracketed_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


@dataclass(frozen=True, slots=True)
class Url:
    """An http(s) URL without userinfo and fragment. ``path`` and ``query`` are as written."""

    origin: Origin
    path: str
    query: str

    @property
    def target(self) -> bytes:
        """The request target in origin-form (RFC 9112 §3.2.1)."""
        target = quote(self.path or "/", safe=_PATH_SAFE)
        if self.query:
            target += "?" + quote(self.query, safe=_PATH_SAFE + "?")
        return target.encode("ascii")


def parse(url: str) -> Url:
    """Parse an http(s) URL. Raises ValueError, whose text continues "the URL …" and never repeats the URL."""
    if not url.isascii():
        raise ValueError("must be ASCII: write an international host name in its xn-- form")
    if not _PRINTABLE.fullmatch(url):
        raise ValueError("must not contain spaces, control characters or backslashes")
    found = _URL.fullmatch(url)
    if found is None:
        raise ValueError("must be an http:// or https:// URL")
    scheme, authority, path, query, fragment = found.groups()
    if "@" in authority:
        raise ValueError("must not contain a user name or password")
    if fragment is not None:
        raise ValueError("must not have a fragment (#…)")
    origin = parse_origin(f"{scheme}://{authority}")
    if origin is None or origin.port == 0 or authority.endswith(":"):
        raise ValueError("is not a URL: its host or port can't be read")
    return Url(origin, path, query or "")


def check(url: str, *, http_loopback: bool, http: bool = False) -> Url:
    """Parse a URL from the network that is to be fetched, or that a browser is to be sent to (RFC 6749 §3.1).

    It must be https, or http on loopback if ``http_loopback`` allows that, or http anywhere if ``http`` does. Raises
    ValueError as ``parse`` does.
    """
    if len(url) > MAX_LENGTH:
        raise ValueError(f"must not be longer than {MAX_LENGTH} characters")
    parsed = parse(url)
    if not _URI_CHARACTERS.fullmatch(url):
        raise ValueError("must not contain characters that a URL has to percent-encode (RFC 3986 §2)")
    if parsed.origin.scheme == "http" and not http and not (http_loopback and is_loopback(parsed.origin.host)):
        raise ValueError("must be https, or http on loopback for a server on loopback")
    return parsed


def parse_origin(text: str) -> Origin | None:
    """Parse a web origin, the value of an Origin field (RFC 6454 §7). None if it is not an http(s) origin."""
    scheme, _, authority = text.partition("://")
    scheme = scheme.lower()
    found = split_authority(authority)
    if scheme not in DEFAULT_PORTS or found is None:
        return None
    host, port = found
    return Origin(scheme, host, DEFAULT_PORTS[scheme] if port is None else port)


def split_authority(text: str) -> tuple[str, int | None] | None:
    """Split ``host`` or ``host:port``, the value of a Host field (RFC 9110 §7.2).

    Return the host in lower case and without brackets, and the port, None if there is none. Return None for anything
    else: no userinfo, no list, no zone identifier.
    """
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return None
    address, name, digits = found.groups()
    host = (address or name).lower()
    port = int(digits) if digits else None
    if not is_host(host) or (address and ":" not in address) or (port is not None and port > 65535):
        return None
    return host, port


def is_host(text: str) -> bool:
    """Return whether a text is a host name or an IP address, IPv6 without brackets and zone identifier."""
    if ":" not in text:
        return len(text) <= 253 and _NAME.fullmatch(text) is not None
    try:
        return ipaddress.IPv6Address(text).scope_id is None
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Return whether a host, without brackets and port, leads to this machine and to no other.

    These are ``localhost`` and the names below it, with or without a trailing dot, 127.0.0.0/8, ::1, and 127.0.0.0/8
    mapped into IPv6. Other spellings of an address (``127.1``, ``0x7f.1``) are read differently by different programs
    and are not accepted.

    The answer also decides which Host fields are accepted on a loopback listener, so it must not contain a name that
    somebody else can point at this machine (DNS rebinding). ``*.localhost`` is safe there: RFC 6761 §6.3 reserves it,
    nobody can register a name below it, and resolvers must not ask the DNS for it.
    """
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return address == _LOOPBACK_V6
        address = address.ipv4_mapped
    return address in _LOOPBACK_V4


def raw_origin(url: str) -> str:
    """Return scheme and authority of an absolute URL as they are written, for strings that are compared."""
    scheme, separator, rest = url.partition("://")
    return scheme.lower() + separator + re.split(r"[/?#]", rest, maxsplit=1)[0]
