"""The guard before every route: Host and Origin, so that no web page can reach the proxy through a browser."""

from mcp_auth_proxy.config.settings import Address, InboundSettings
from mcp_auth_proxy.net import urls

PROBES = frozenset({b"/healthz", b"/readyz", b"/metrics"})
_FROM_ELSEWHERE = frozenset({b"cross-site", b"same-site"})

Headers = list[tuple[bytes, bytes]]


class Guard:
    """Judges requests by the names that the proxy is reached under; remembers good values, they are few."""

    def __init__(self, *, listen: Address, public_url: str, inbound: InboundSettings) -> None:
        self._loopback = urls.is_loopback(listen.host)
        self._port = listen.port
        public_origin = urls.parse_origin(public_url)
        assert public_origin is not None
        self._public_origin = public_origin
        # A name with the port None is good with any port.
        self._names: set[tuple[str, int | None]] = {(self._public_origin.host, None)}
        self._names.update(filter(None, map(urls.split_authority, inbound.allowed_hosts)))
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
        if not host:
            return 400, "The request names no Host."
        if page_write and not self._is_own(headers, host):
            return 403, "Only this proxy's own pages may ask for changes."
        return None

    def knows(self, host: bytes) -> bool:
        """Whether this Host was found good before, so that a request that no web page has sent may be served."""
        return host in self._good_hosts

    def _is_own(self, headers: Headers, host: bytes) -> bool:
        """Whether a write comes from no web page at all, or from one of ours (Origin, Fetch Metadata)."""
        for name, value in headers:
            if name == b"origin" and value not in (b"http://" + host, b"https://" + host):
                # Behind another proxy, Host may be the name that is used between the two.
                if urls.parse_origin(value.decode("latin-1")) != self._public_origin:
                    return False
            elif name == b"sec-fetch-site" and value not in (b"same-origin", b"none"):
                return False
        return True

    def _host_is_good(self, path: bytes, value: bytes) -> bool:
        authority = urls.split_authority(value.decode("latin-1"))
        if authority is None:
            return False
        # A loopback name can't be forged by DNS rebinding: the browser sends the name that it was led to.
        if urls.is_loopback(authority[0]) or self._is_named(*authority):
            self._remember(self._good_hosts, value)
            return True
        # Probes come with the address of the pod as Host. On loopback no probe comes from outside.
        return not self._loopback and path in PROBES

    def _is_named(self, name: str, port: int | None) -> bool:
        ports = (None, port) if port is not None else (None, *urls.DEFAULT_PORTS.values())
        return any((name, port) in self._names for port in ports)

    def _origin_is_good(self, value: bytes) -> bool:
        origin = urls.parse_origin(value.decode("latin-1"))
        if origin is None:
            return False
        _, name, port = origin
        if self._loopback:
            # Another port of this machine is another site: a page there may hold anybody's script.
            good = origin == self._public_origin or (urls.is_loopback(name) and port == self._port)
        else:
            good = self._is_named(name, port)
        if good:
            self._remember(self._good_origins, value)
        return good

    @staticmethod
    def _remember(values: set[bytes], value: bytes) -> None:
        if len(values) >= 100:
            # More than there are good ones: somebody makes them up.
            values.clear()
        values.add(value)
