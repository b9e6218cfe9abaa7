"""What all requests share: memory for bytes that wait (``limits.memory``), and places to wait (``limits.held``).

If several servers are configured, one of them gets at most half, so that a flood of requests to it, or its own
slowness, leaves the other half to the others.
"""

SMALL = 64 * 1024
"""Bytes that a request may keep without counting as large."""

STOPPED = 128 * 1024
"""Bytes that wait for a client that is slow to read: as many as the transport of either side keeps (``READ_AHEAD``)."""


class Quota:
    """A number that the servers share. Belongs to one event loop, as everything here."""

    def __init__(self, limit: int, *, several: bool) -> None:
        self.used = 0
        self._by_server: dict[str, int] = {}
        self.configure(limit, several=several)

    def configure(self, limit: int, *, several: bool) -> None:
        """Change the limit for what is taken from now on. ``several``: more than one server is configured."""
        self.limit = limit
        self.share = max(1, limit // 2) if several else limit
        """How much one server gets."""

    def take(self, server: str, amount: int) -> bool:
        """Take an amount for a server, to be given back; return False if there is not as much left."""
        own = self._by_server.get(server, 0) + amount
        used = self.used + amount
        if used > self.limit or own > self.share:
            return False
        self._by_server[server] = own
        self.used = used
        return True

    def is_crowded(self, server: str) -> bool:
        """Return whether a server has more than half of what it gets: what waits without end takes no more."""
        return self._by_server.get(server, 0) > max(1, self.share // 2)

    def give_back(self, server: str, amount: int) -> None:
        """Give back what was taken."""
        self.used -= amount
        left = self._by_server[server] - amount
        if left:
            self._by_server[server] = left
        else:
            del self._by_server[server]


class MemoryBudget(Quota):
    """The bytes that requests keep.

    A quarter is for bodies on the fast path, which counts them without servers because of its cost. Large requests get
    at most half, so at least a quarter is left to small ones.
    """

    def __init__(self, limit: int, *, several: bool) -> None:
        self.fast = 0
        """Bytes on the fast path. It adds to them itself, up to ``limit_of_fast``."""
        self.large = 0
        """Bytes of large requests."""
        super().__init__(limit, several=several)

    def configure(self, limit: int, *, several: bool) -> None:
        """Change the limit; ``limit`` is here what is left of it beside the fast path."""
        self.limit_of_fast = limit // 4
        self.limit_of_large = limit // 2
        super().configure(limit - self.limit_of_fast, several=several)
        if several:
            self.share = max(1, limit // 2)

    @property
    def total(self) -> int:
        return self.used + self.fast

    @property
    def largest(self) -> int:
        """Bytes that one request can keep if there is no other."""
        return min(self.share, max(self.limit_of_large, SMALL))


class RequestMemory:
    """The bytes that one request keeps: its body, and what waits of its response."""

    __slots__ = ("_budget", "_server", "size")

    def __init__(self, budget: MemoryBudget, server: str) -> None:
        self._budget = budget
        self._server = server
        self.size = 0

    def take(self, size: int) -> bool:
        """Count further bytes; return False if there is no memory for them."""
        budget, before = self._budget, self.size
        after = before + size
        large = _large(after) - _large(before)
        if large and budget.large + large > budget.limit_of_large:
            return False
        if not budget.take(self._server, size):
            return False
        budget.large += large
        self.size = after
        return True

    def give_back(self, size: int) -> None:
        """Give back bytes that are no longer kept."""
        before = self.size
        self.size = after = before - size
        self._budget.large -= _large(before) - _large(after)
        if size:
            self._budget.give_back(self._server, size)

    def release(self) -> None:
        """Give everything back."""
        self.give_back(self.size)


def _large(size: int) -> int:
    """Return the bytes of a request that count as large: all of them, if there are many."""
    return size if size > SMALL else 0
