"""Every instrument of ``/metrics``, to be imported from any layer (docs/observability.md).

The labels: ``server`` is a configured name; requests for unknown servers are not counted. ``kind`` of a request is its
HTTP method, which in MCP says what the request is for: ``post`` (calls and notifications), ``get`` (a stream for
messages of the server: its duration is the time it was open), ``delete`` (the end of a session) and ``other``.
"""

import platform

from mcp_auth_proxy import __version__
from mcp_auth_proxy.observability import process
from mcp_auth_proxy.observability.instruments import (
    Computed,
    Counter,
    Gauge,
    Registry,
    Requests,
    RequestSeries,
    Value,
)

CLIENT_GONE = 499
"""The status of a request whose client went away before it was answered, as in the logs of nginx."""

ADHOC = "adhoc"
"""The label of all ad-hoc servers together: their names begin with it, and anybody may make some."""

registry = Registry()

requests = Requests(
    registry,
    "mcp_auth_proxy_requests_total",
    "Finished requests to MCP endpoints. Status 499: the client went away before it was answered.",
    ("server", "kind"),
    duration_name="mcp_auth_proxy_request_duration_seconds",
    duration_text="Seconds from the head of a request to the end of its answer, waiting for consent included.",
    bounds=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
waiting_for_consent = Gauge(
    registry, "mcp_auth_proxy_requests_waiting_for_consent", "Requests held until a user authorizes.", ("server",)
)
buffered_bytes = Computed(
    registry,
    "mcp_auth_proxy_buffered_bytes",
    "Bytes that requests keep, of their bodies and for clients that are slow to read (limits.memory).",
)
held_requests = Computed(
    registry,
    "mcp_auth_proxy_held_requests",
    "Requests that wait for a user, or for the proxy's own requests to an authorization server (limits.held).",
)
open_streams = Gauge(registry, "mcp_auth_proxy_open_streams", "Event streams that are being sent.", ("server",))
upstream_failures = Counter(
    registry,
    "mcp_auth_proxy_upstream_failures_total",
    "Requests without a complete answer of their upstream: unreachable, timeout, protocol (a broken response) or pool "
    "(no connection came free).",
    ("server", "kind"),
)
upstream_connections = Computed(
    registry, "mcp_auth_proxy_upstream_connections", "Connections to upstreams, active or idle.", ("origin", "state")
)
inbound_connections = Computed(registry, "mcp_auth_proxy_inbound_connections", "Connections of clients.")
closed_connections = Counter(
    registry,
    "mcp_auth_proxy_inbound_connections_closed_total",
    "Connections of clients that the proxy did not want: evicted (to make room for others), refused (no room) or slow "
    "(a request was not complete in time).",
    ("reason",),
)
tokens = Computed(
    registry,
    "mcp_auth_proxy_tokens",
    "Tokens in memory: valid, renewing (in progress) or expired.",
    ("state",),
)
refreshes = Counter(
    registry,
    "mcp_auth_proxy_refreshes_total",
    "Renewals of grants: renewed, failed (to be tried again) or ended (the grant is over).",
    ("server", "outcome"),
)
flows = Counter(
    registry,
    "mcp_auth_proxy_flows_total",
    "Authorizations by users: started, completed or failed.",
    ("server", "outcome"),
)
store_failures = Counter(
    registry,
    "mcp_auth_proxy_store_failures_total",
    "Failures of the store: unavailable (locked, read-only, full, damaged) or decryption (a value does not open).",
    ("kind",),
)
reloads = Counter(
    registry,
    "mcp_auth_proxy_config_reloads_total",
    "Times the configuration was read again: applied, unchanged or rejected (it has errors).",
    ("outcome",),
)
last_reload_successful = Gauge(
    registry,
    "mcp_auth_proxy_config_last_reload_successful",
    "1 if the configuration file can be used as it is, 0 if it has errors and the proxy keeps the one before.",
)
last_reload_successful.labels().value = 1
build_info = Computed(
    registry, "mcp_auth_proxy_build_info", "The running version, and its Python; always 1.", ("version", "python")
)
build_info.add_source(lambda: {(__version__, platform.python_version()): 1})

process_start_time = Computed(
    registry, "process_start_time_seconds", "Start of the process, in seconds since 1970-01-01 UTC."
)
process_start_time.add_source(process.start_time)
process_cpu = Computed(
    registry, "process_cpu_seconds_total", "Seconds of CPU used, in user and system mode.", kind="counter"
)
process_cpu.add_source(process.cpu_seconds)
process_memory = Computed(registry, "process_resident_memory_bytes", "Resident memory, in bytes.")
process_memory.add_source(process.resident_memory)
process_files = Computed(registry, "process_open_fds", "Open file descriptors.")
process_files.add_source(process.open_files)
process_max_files = Computed(registry, "process_max_fds", "Limit on open file descriptors.")
process_max_files.add_source(process.max_files)


def server_label(name: str) -> str:
    """Return the label of a server by its name."""
    return ADHOC if name.startswith(f"{ADHOC}-") else name


class ServerMetrics:
    """The children with one server's name, each looked up at its first use and then kept. Every route has one.

    They are slots that stay empty until then: 10,000 servers cost little, and a used slot is a plain attribute.
    """

    __slots__ = ("_server", "delete", "get", "open_streams", "other", "post", "waiting_for_consent")

    post: RequestSeries
    get: RequestSeries
    delete: RequestSeries
    other: RequestSeries
    open_streams: Value
    waiting_for_consent: Value

    def __init__(self, server: str) -> None:
        self._server = server

    def __getattr__(self, name: str) -> RequestSeries | Value:
        child: RequestSeries | Value
        match name:
            case "post" | "get" | "delete" | "other":
                child = requests.labels(self._server, name)
            case "open_streams":
                child = open_streams.labels(self._server)
            case "waiting_for_consent":
                child = waiting_for_consent.labels(self._server)
            case _:
                raise AttributeError(name)
        setattr(self, name, child)
        return child

    def of_method(self, method: bytes) -> RequestSeries:
        """Return the series that counts requests with this HTTP method."""
        match method:
            case b"POST":
                return self.post
            case b"GET":
                return self.get
            case b"DELETE":
                return self.delete
        return self.other

    def upstream_failed(self, kind: str) -> None:
        """Count a request without a complete answer of its upstream."""
        upstream_failures.labels(self._server, kind).inc()
