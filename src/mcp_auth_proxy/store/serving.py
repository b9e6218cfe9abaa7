"""Which processes serve over a store. Only they are believed to be a running proxy: any program can take a port."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Protocol

from mcp_auth_proxy.config.settings import Address, StoreSettings
from mcp_auth_proxy.store.local_files import existing_local_path, local_path
from mcp_auth_proxy.store.sqlite import serving as sqlite
from mcp_auth_proxy.store.sqlite.serving import Served

logger = logging.getLogger(__name__)

__all__ = ["Served", "Serving", "addresses", "hold", "processes", "server_mark"]


class Serving(Protocol):
    """What a process holds while it serves; it ends with the process."""

    def set_keys(self, keys: Sequence[str], /) -> None:
        """Say that this process has other keys now."""

    def release(self) -> None:
        """Tell the others that this process no longer serves. May be called again."""


class _NotTold:
    """Stands for a lock that could not be made."""

    def set_keys(self, keys: Sequence[str], /) -> None:
        pass

    def release(self) -> None:
        pass


def hold(
    settings: StoreSettings,
    address: Address,
    *,
    only: str = "",
    name: str = "",
    for_bridges: bool = False,
    keys: Sequence[str] = (),
) -> Serving:
    """Tell other processes that this one serves the store at ``address``: a number, and the real port.

    ``only`` is the ``server_mark`` of the server that it was given instead of a configuration, ``name`` its name;
    ``for_bridges``: a bridge of ``stdio`` has started it. ``keys``: the ids of its keys, first the one that seals.
    """
    try:
        path = local_path(settings)
    except OSError as error:
        logger.warning(
            "store: %s can't be used (%s), so `login` can't tell that this proxy is running",
            settings.path.parent,
            error.strerror,
        )
        return _NotTold()
    return sqlite.ServingLock(path, address, only=only, name=name, for_bridges=for_bridges, keys=keys)


def server_mark(url: str) -> str:
    """Return what stands for a URL, which may have a secret in its query."""
    return hashlib.sha256(url.encode()).hexdigest()


def processes(settings: StoreSettings) -> list[Served]:
    """Return the processes that serve the store now."""
    path = existing_local_path(settings)
    return sqlite.served(path) if path is not None else []


def addresses(settings: StoreSettings) -> list[Address]:
    """Return the addresses of the processes that serve the store now."""
    return [each.address for each in processes(settings)]
