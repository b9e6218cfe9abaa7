"""Which processes serve over a store. Only they are believed to be a running proxy: any program can take a port."""

from typing import Protocol

from mcp_auth_proxy.config.settings import Address, StoreSettings
from mcp_auth_proxy.store.sqlite import serving as sqlite


class Serving(Protocol):
    """What a process holds while it serves; it ends with the process. A database server has session locks for this."""

    def release(self) -> None:
        """Tell the others that this process no longer serves. May be called again."""


def hold(settings: StoreSettings, address: Address) -> Serving:
    """Tell other processes that this one serves the store at ``address``: a number, and the real port."""
    return sqlite.ServingLock(settings.path.resolve(), address)


def addresses(settings: StoreSettings) -> list[Address]:
    """Return the addresses of the processes that serve the store now."""
    return sqlite.served_addresses(settings.path.resolve())
