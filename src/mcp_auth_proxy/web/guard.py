"""The guard before every route: Host and Origin, so that no web page can reach the proxy through a browser."""

import ipaddress
from urllib.parse import urlsplit

from mcp_auth_proxy.config.settings import Address, InboundSettings

PROBES = frozenset({b"/healthz", b"/readyz", b"/metrics"})
_FROM_ELSEWHERE = frozenset({b"cross-site", b"same-site"})
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

Headers = list[tuple[bytes, bytes]]


class Guard:
    """Judges requests by the names that the proxy is reached under; remembers good values, they are few."""

    def __init__(self, *, listen: Address, public_url: str, inbound: InboundSettings) -> None:
        self._loopback = is_loopback(listen.host)
        self._port = listen.port
        self._public_origin = _origin(public_url)
        self._names = {self._public_origin[1], *(name.lower() for name in inbound.allowed_hosts)}
        self._good_hosts: set[bytes] = set()
        self._good_origins: set[bytes] = set()

    def refusal(self, path: bytes, headers: Headers, *, endpoint: bool, page_write: bool) -> tuple[int, str] | None:
        """Return status and reason where a request must not be served, else None.

        ``endpoint``: it is for an MCP endpoint, where no other site's page has any business, not even with a GET, which
        browsers send without an Origin. ``page_write``: it is not, and would change something; then only our own pages
        may ask.
        """
        origins = 0
        host = b""
        for name, value in headers:
            if name == b"host":
                host = value
                if value not in self._good_hosts and not self._host_is_good(path, value):
                    shown = value.decode("latin-1")[:100]
                    return 421, (
                        f"Host {shown!r} is not one that this proxy is reached under. If it is right, add it to "
                        f"inbound.allowed_hosts or set public_url."
                    )
            elif name == b"origin":
                origins += 1
                if origins > 1 or (value not in self._good_origins and not self._origin_is_good(value)):
                    return 403, "Requests from this web origin are not served."
            elif endpoint and name == b"sec-fetch-site" and value in _FROM_ELSEWHERE:
                return 403, "Requests from pages of other sites are not served."
        if page_write and not self._is_own(headers, host):
            return 403, "Only this proxy's own pages may ask for changes."
        return None

    def _is_own(self, headers: Headers, host: bytes) -> bool:
        """Whether a write comes from no web page at all, or from one of ours (Origin, Fetch Metadata)."""
        for name, value in headers:
            if name == b"origin" and value not in (b"http://" + host, b"https://" + host):
                return False
            if name == b"sec-fetch-site" and value not in (b"same-origin", b"none"):
                return False
        return True

    def _host_is_good(self, path: bytes, value: bytes) -> bool:
        host = _host_name(value.decode("latin-1"))
        if host is None:
            return False
        if self._known(host):
            self._remember(self._good_hosts, value)
            return True
        # Probes come with the address of the pod as Host. On loopback no probe comes from outside.
        return not self._loopback and path in PROBES

    def _known(self, host: str) -> bool:
        # A loopback name can't be forged by DNS rebinding: the browser sends the name that it was led to.
        return host in self._names or is_loopback(host)

    def _origin_is_good(self, value: bytes) -> bool:
        try:
            scheme, host, port = _origin(value.decode("ascii"))
        except ValueError:
            return False
        good = (scheme, host, port) == self._public_origin or (
            # Another port of this machine is another site: a page there may hold anybody's script.
            scheme in ("http", "https")
            and (is_loopback(host) and port == self._port if self._loopback else host in self._names)
        )
        if good:
            self._remember(self._good_origins, value)
        return good

    @staticmethod
    def _remember(values: set[bytes], value: bytes) -> None:
        if len(values) < 100:
            values.add(value)


def is_loopback(host: str) -> bool:
    """Whether a host name or address (no brackets, no port) means this machine."""
    if host.lower() in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(value: str) -> str | None:
    """Return the name of a Host field without its port (RFC 9110 §7.2), None where it is not one."""
    if not value or any(char in value for char in "/?#@\\ \t,"):
        return None
    try:
        parts = urlsplit(f"//{value}")
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname


def _origin(value: str) -> tuple[str, str, int]:
    parts = urlsplit(value)
    if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
        raise ValueError("not an origin")
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
