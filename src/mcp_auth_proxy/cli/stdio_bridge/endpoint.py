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

    async def endpoint(self) -> Endpoint:
        """Return where to send to. Raises McpAuthProxyError if there is no proxy."""

    async def replace(self, failed: Endpoint) -> bool:
        """Note that nothing is reached there; return whether another attempt may succeed."""


class RemoteEndpoint:
    """A proxy that runs elsewhere."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def endpoint(self) -> Endpoint:
        return self._endpoint

    async def replace(self, failed: Endpoint) -> bool:
        return False
