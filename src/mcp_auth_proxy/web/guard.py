"""Checks Host and Origin of every request, so that no web page can reach the proxy through a browser."""

import ipaddress
import re
from urllib.parse import urlsplit

from mcp_auth_proxy.config.settings import Address, InboundSettings

PROBES = frozenset({b"/healthz", b"/readyz", b"/metrics"})
_FROM_ELSEWHERE = frozenset({b"cross-site", b"same-site"})
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

_DEFAULT_PORTS = {"http": 80, "https": 443}

_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([0-9a-z._-]+))(?::([0-9]{0,5}))?")
"""``host`` with or without a port (RFC 9110 §7.2), in lower case. No user information, no list."""

Headers = list[tuple[bytes, bytes]]


class Guard:
    """Checks requests against the names of the proxy. Accepted values are cached, since there are few."""

    def __init__(self, *, listen: Address, public_url: str, inbound: InboundSettings) -> None:
        self._loopback = is_loopback(listen.host)
        self._port = listen.port
        public = urlsplit(public_url)
        self._public_origin = (public.scheme, public.hostname or "", public.port or _DEFAULT_PORTS[public.scheme])
        # The port None means any port.
        self._names: set[tuple[str, int | None]] = {(self._public_origin[1], None)}
        self._names.update(filter(None, map(_authority, inbound.allowed_hosts)))
        self._good_hosts: set[bytes] = set()
        self._good_origins: set[bytes] = set()

    def refusal(self, path: bytes, headers: Headers, *, endpoint: bool, page_write: bool) -> tuple[int, str] | None:
        """Return status and reason if a request must be refused, else None.

        ``endpoint``: the request is for an MCP endpoint. Pages of other sites must not reach it, not even with a GET,
        which browsers send without Origin. ``page_write``: the request is for another route and may change something;
        then only the proxy's own pages may send it.
        """
        origins = 0
        host = b""
        for name, value in headers:
            if name == b"host":
                host = value
                if value not in self._good_hosts and not self._host_is_good(path, value):
                    shown = value.decode("latin-1")[:100]
                    return 421, (
                        f"Host {shown!r} is not a name of this proxy. If it should be, add it to "
                        f"inbound.allowed_hosts or set public_url."
                    )
            elif name == b"origin":
                origins += 1
                if origins > 1 or (value not in self._good_origins and not self._origin_is_good(value)):
                    return 403, "Requests from this web origin are not served."
            elif endpoint and name == b"sec-fetch-site" and value in _FROM_ELSEWHERE:
                return 403, "Requests from pages of other sites are not served."
        if not host:
            return 400, "The request has no Host."
        if page_write and not self._is_own(headers, host):
            return 403, "Only this proxy's own pages may make changes."
        return None

    def knows(self, host: bytes) -> bool:
        """Whether this Host was accepted before. Then a request without Origin and Fetch Metadata can be served."""
        return host in self._good_hosts

    def _is_own(self, headers: Headers, host: bytes) -> bool:
        """Whether a write comes from one of our own pages, or not from a web page (Origin, Fetch Metadata)."""
        for name, value in headers:
            if name == b"origin" and value not in (b"http://" + host, b"https://" + host):
                # Behind another proxy, Host may be an internal name.
                if _origin(value) != self._public_origin:
                    return False
            elif name == b"sec-fetch-site" and value not in (b"same-origin", b"none"):
                return False
        return True

    def _host_is_good(self, path: bytes, value: bytes) -> bool:
        authority = _authority(value.decode("latin-1"))
        if authority is None:
            return False
        # DNS rebinding can't forge a loopback name: the browser sends the attacker's name as Host.
        if is_loopback(authority[0]) or self._is_named(*authority):
            self._remember(self._good_hosts, value)
            return True
        # Kubernetes probes have the address of the pod as Host. On loopback they can't come from outside.
        return not self._loopback and path in PROBES

    def _is_named(self, name: str, port: int | None) -> bool:
        ports = (None, port) if port is not None else (None, *_DEFAULT_PORTS.values())
        return any((name, port) in self._names for port in ports)

    def _origin_is_good(self, value: bytes) -> bool:
        origin = _origin(value)
        if origin is None:
            return False
        _, name, port = origin
        if self._loopback:
            # Another port of this machine is another origin, whose page may run anybody's script.
            good = origin == self._public_origin or (is_loopback(name) and port == self._port)
        else:
            good = self._is_named(name, port)
        if good:
            self._remember(self._good_origins, value)
        return good

    @staticmethod
    def _remember(values: set[bytes], value: bytes) -> None:
        if len(values) >= 100:
            # There are never that many real values, so a client is inventing them.
            values.clear()
        values.add(value)


def is_loopback(host: str) -> bool:
    """Whether a host name or address (no brackets, no port) means this machine."""
    if host.lower() in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _authority(value: str) -> tuple[str, int | None] | None:
    """Return the name in lower case and without brackets, and the port where there is one; None for anything else."""
    found = _AUTHORITY.fullmatch(value.lower())
    if found is None:
        return None
    address, name, digits = found.groups()
    port = int(digits) if digits else None
    return None if port is not None and port > 65535 else (address or name, port)


def _origin(value: bytes) -> tuple[str, str, int] | None:
    """Return scheme, name and port of a web origin (RFC 6454 §6.1); None where it is not one of http or https."""
    scheme, _, rest = value.decode("latin-1").partition("://")
    authority = _authority(rest)
    scheme = scheme.lower()
    if scheme not in _DEFAULT_PORTS or authority is None:
        return None
    return scheme, authority[0], authority[1] or _DEFAULT_PORTS[scheme]
