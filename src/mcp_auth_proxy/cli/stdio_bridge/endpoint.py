"""Where requests go."""

from dataclasses import dataclass
from typing import Protocol

from mcp_auth_proxy.net.urls import Origin


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is at a proxy."""

    origin: Origin
    target: bytes

    def __str__(self) -> str:
        return f"{self.origin.scheme}://{self.origin.authority}"


class ProxySource(Protocol):
    """Knows the proxy to use."""

    is_local: bool
    """Whether the proxy is a process of this machine, with nothing in between."""

    async def endpoint(self, *, urgent: bool = True) -> Endpoint:
        """Return where to send to. Raises McpAuthProxyError if there is no proxy.

        ``urgent``: a request waits for it. Otherwise a proxy that others have to start is not waited for.
        """

    async def replace(self, failed: Endpoint) -> bool:
        """Note that nothing is reached there; return whether another attempt may succeed."""


class RemoteEndpoint:
    """A proxy that runs elsewhere."""

    is_local = False

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def endpoint(self, *, urgent: bool = True) -> Endpoint:
        return self._endpoint

    async def replace(self, failed: Endpoint) -> bool:
        return False
