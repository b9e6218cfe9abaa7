"""Divide the file descriptors of the process: connections of clients, connections to upstreams, and a reserve."""

import contextlib
import resource
from dataclasses import dataclass

SOFT_LIMIT = 10_240
"""The limit that is asked for if the hard one is infinite: macOS, which starts with 256, grants no more for sure."""

MIN_RESERVE = 80
MAX_RESERVE = 512
"""Descriptors for the proxy's own work: store, logs, look-ups of names, OAuth, the listener, and what closes just now.
An eighth of the limit, between these two. A proxy that has just started has 25 open."""

MAX_CLIENTS = 10_000
"""The most connections of clients by default: each takes some 13 KB, with a stream twice that."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How many connections may be open at a time."""

    clients: int
    upstreams: int
    """To all upstreams together, never less than ``clients``: each request uses at most one."""


def raise_limit() -> None:
    """Allow as many open files as the system grants: each open stream takes two, and 1,024 is a usual default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, SOFT_LIMIT) if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY:
        # Systems may grant less than the hard limit says: then it stays as it is.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def shares(wanted: int | None = None) -> Shares:
    """Return how the process's limit is divided.

    ``wanted``: the connections of clients to allow, if there are enough descriptors; None for the default.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = 2 * (wanted or MAX_CLIENTS) + MAX_RESERVE
    usable = max(limit - min(max(limit // 8, MIN_RESERVE), MAX_RESERVE), 2)
    clients = min(MAX_CLIENTS if wanted is None else wanted, usable // 2)
    return Shares(clients, usable - clients)
