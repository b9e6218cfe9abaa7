"""Check Host and Origin of every request, so that no web page can reach the proxy through a browser."""

from mcp_auth_proxy.config.settings import Address, InboundSettings
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.web.cors import AllowedOrigins

PROBES = frozenset({b"/healthz", b"/readyz", b"/metrics"})
_FROM_ELSEWHERE = frozenset({b"cross-site", b"same-site"})
_REMEDY = " If scripts of that site should use the MCP servers, add its origin to inbound.allowed_origins."

Headers = list[tuple[bytes, bytes]]


class Guard:
    """Check requests against the names of the proxy. Accepted values are cached, since there are few."""

    def __init__(self, *, listen: Address, public_url: str, inbound: InboundSettings) -> None:
        self._loopback = urls.is_loopback(listen.host)
        self._port = listen.port
        public_origin = urls.parse_origin(public_url)
        assert public_origin is not None
        self._public_origin = public_origin
        # The port None means any port.
        self._names: set[tuple[str, int | None]] = {(public_origin.host, None)}
        self._names.update(filter(None, map(urls.split_authority, inbound.allowed_hosts)))
        self.allowed_origins = AllowedOrigins(inbound.allowed_origins)
        """Whose pages may reach the MCP endpoints, and nothing else."""
        self._good_hosts: set[bytes] = set()
        self._good_origins: set[bytes] = set()

    def refusal(self, path: bytes, headers: Headers, *, endpoint: bool, page_write: bool) -> tuple[int, str] | None:
        """Return status and reason if a request must be refused, else None.

        ``endpoint``: the request is for an MCP endpoint. Pages of other sites must not reach it, not even with a GET,
        which browsers send without Origin, unless their origin is allowed. ``page_write``: the request is for another
        route and may change something; then only the proxy's own pages may send it.
        """
        origins = 0
        allowed = from_elsewhere = False
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
                allowed = endpoint and value in self.allowed_origins
                good = allowed or value in self._good_origins or self._origin_is_good(value)
                if origins > 1 or not good:
                    return 403, "Requests from this web origin are not served." + (_REMEDY if endpoint else "")
            elif endpoint and name == b"sec-fetch-site" and value in _FROM_ELSEWHERE:
                from_elsewhere = True
        if from_elsewhere and not allowed:
            return 403, "Requests from pages of other sites are not served." + _REMEDY
        if not host:
            return 400, "The request has no Host."
        if page_write and not self._is_own(headers, host):
            return 403, "Only this proxy's own pages may make changes."
        return None

    def knows(self, host: bytes) -> bool:
        """Return whether this Host was accepted before: a request without Origin and Fetch Metadata can be served."""
        return host in self._good_hosts

    def _is_own(self, headers: Headers, host: bytes) -> bool:
        """Return whether a write comes from one of our own pages, or not from a web page (Origin, Fetch Metadata)."""
        for name, value in headers:
            if name == b"origin" and value not in (b"http://" + host, b"https://" + host):
                # Behind another proxy, Host may be an internal name.
                if urls.parse_origin(value.decode("latin-1")) != self._public_origin:
                    return False
            elif name == b"sec-fetch-site" and value not in (b"same-origin", b"none"):
                return False
        return True

    def _host_is_good(self, path: bytes, value: bytes) -> bool:
        authority = urls.split_authority(value.decode("latin-1"))
        if authority is None:
            return False
        # DNS rebinding can't forge a loopback name: the browser sends the attacker's name as Host.
        if urls.is_loopback(authority[0]) or self._is_named(*authority):
            self._remember(self._good_hosts, value)
            return True
        # Kubernetes probes have the address of the pod as Host. On loopback they can't come from outside.
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
            # Another port of this machine is another origin, whose page may run anybody's script.
            good = origin == self._public_origin or (urls.is_loopback(name) and port == self._port)
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
