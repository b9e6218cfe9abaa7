"""The system's resolver, replaced in this process: what it answers, and for which names it does not answer."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mcp_auth_proxy.net import resolver


class Names:
    """Answers with ``addresses``, by name. Names that contain ``hang`` have no answer until they are ``released``."""

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self.failure = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        """What other names are answered with."""
        self.hanging: set[str] = set()
        """Names without an answer besides those."""
        self.asked: list[str] = []
        self.released = threading.Event()

    def getaddrinfo(self, host: str, port: int, *_: Any, **__: Any) -> list[tuple[Any, ...]]:
        self.asked.append(host)
        if "hang" in host or host in self.hanging:
            self.released.wait()
        if host not in self.addresses:
            raise self.failure
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (self.addresses[host], port))]


def lookups_out() -> int:
    """Return how many threads of this process are in a look-up."""
    return sum(thread.name == resolver.THREAD for thread in threading.enumerate())


@contextmanager
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    """Replace ``getaddrinfo`` until the block ends; no thread is left then."""
    fake = Names()
    monkeypatch.setattr(socket, "getaddrinfo", fake.getaddrinfo)
    try:
        yield fake
    finally:
        fake.released.set()
        for thread in threading.enumerate():
            if thread.name == resolver.THREAD:
                thread.join(10)
