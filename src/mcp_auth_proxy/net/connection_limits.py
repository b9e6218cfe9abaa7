"""How many connections clients may have, in all and from one address, and which of them are closed to make room.

Nothing is counted per request: which connections are idle is asked only if one more would be too many.
"""

import asyncio
import logging
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol

from mcp_auth_proxy.net.http_head import Headers
from mcp_auth_proxy.net.peers import IPAddress, IPNetwork, client_of, is_in, limit_key, parse_address
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.observability.peer_log import PeerLog, RefusalLog

logger = logging.getLogger(__name__)

PER_ADDRESS_SHARE = 0.75
"""The part of all connections that one address may have by default: on loopback every client has the same one."""

SEARCH_INTERVAL = 0.05
"""Seconds for which the connections that a search has found are taken one after the other."""

MANY = 64
"""Connections that a search finds if it is worth its time."""

Rank = tuple[int, float]
"""How readily a connection can be missed, lowest first: one of the next four, and since when."""

IDLE = 0
"""No request is here; maybe none ever was."""

UNFINISHED = 1
"""A head is incomplete, or a response was written and not read, or the connection is being closed."""

SLOW = 2
"""The body of a request is incomplete, after a while."""

STALLED = 3
"""The client does not read the response, after a while."""


class LimitedConnection(Protocol):
    """A connection of a client."""

    def rank(self) -> Rank | None:
        """Return how readily the connection can be missed; None if it is in use."""

    def has_unread(self) -> bool:
        """Return whether a client that is still there has sent something that was not read yet, a request maybe."""

    def make_room(self) -> None:
        """Close at once: another connection takes the place."""


class ConnectionSlot:
    """The place of one connection."""

    __slots__ = ("_groups", "_limits", "connection", "peer")

    def __init__(self, limits: "ConnectionLimits", peer: str, groups: tuple["_Group", ...]) -> None:
        self._limits = limits
        self._groups = groups
        self.peer = peer
        """The address of the client."""
        self.connection: LimitedConnection | None = None
        for group in groups:
            group.members.add(self)

    def release(self) -> None:
        """Give the place back. Idempotent."""
        self.connection = None
        for group in self._groups:
            group.members.discard(self)
        self._limits.forget_empty(self._groups[-1])

    def may_be_evicted(self, rank: Rank) -> bool:
        """Return whether the connection still has this rank, and no request of an idle one has come meanwhile."""
        connection = self.connection
        return (
            connection is not None and connection.rank() == rank and not (rank[0] == IDLE and connection.has_unread())
        )

    def evict(self) -> None:
        """Close the connection, and give its place back."""
        connection = self.connection
        self.release()
        if connection is not None:
            connection.make_room()

    def client(self, headers: Headers) -> str:
        """Return whose request with these fields came on the connection, for a log."""
        forwarded_for = b",".join(value for name, value in headers if name == b"x-forwarded-for")
        return client_of(self.peer, forwarded_for, self._limits.rules.trusted)

    def warn_slow(self) -> None:
        """Count and log a request that was given up, because it arrived too slowly."""
        self._limits.warn_slow(self.peer)

    def warn_refused(self, status: int, reason: str) -> None:
        """Log a request that breaks HTTP or a limit."""
        self._limits.refusals.warn(self.peer, status, reason)


class _Group:
    """The connections that share a limit."""

    __slots__ = ("_candidates", "_search_at", "_worthwhile", "address", "members")

    def __init__(self, address: IPAddress | None = None) -> None:
        self.address = address
        """None for the group of all."""
        self.members: set[ConnectionSlot] = set()
        self._candidates: list[tuple[Rank, ConnectionSlot]] = []
        """What is left of the last search, those that can be missed most readily at the end."""
        self._search_at = 0.0
        """When the last search is out of date."""
        self._worthwhile = False
        """Whether the last search found so many that another is paid for by the places that it finds."""

    def least_needed(self, now: float) -> ConnectionSlot | None:
        """Return the connection that can be missed most readily; None if all are in use, as far as is known."""
        if now >= self._search_at:
            self._search(now)
        slot = self._next_candidate()
        if slot is None and self._worthwhile:
            self._search(now)
            slot = self._next_candidate()
        return slot

    def _next_candidate(self) -> ConnectionSlot | None:
        while self._candidates:
            rank, slot = self._candidates.pop()
            if slot.may_be_evicted(rank):
                return slot
        return None

    def _search(self, now: float) -> None:
        begun = [(slot.connection, slot) for slot in self.members if slot.connection is not None]
        ranked = [(rank, slot) for connection, slot in begun if (rank := connection.rank()) is not None]
        self._candidates = sorted(ranked, key=itemgetter(0), reverse=True)
        self._search_at = now + SEARCH_INTERVAL
        self._worthwhile = len(ranked) >= min(len(self.members) // 8, MANY)


@dataclass(frozen=True, slots=True)
class ConnectionRules:
    """How many connections there may be."""

    connections: int
    per_address: int
    """Those of one address; it does not hold for the addresses in ``trusted``."""
    trusted: tuple[IPNetwork, ...] = ()
    keys: tuple[str, str] = ("limits.connections", "limits.connections_per_address")
    """The configuration keys of both limits, for the log."""

    @classmethod
    def of(cls, connections: int, per_address: int | None, trusted: tuple[IPNetwork, ...] = ()) -> "ConnectionRules":
        """Return the rules; ``per_address`` may be None for the default."""
        if per_address is None:
            per_address = max(int(connections * PER_ADDRESS_SHARE), 1)
        return cls(connections, min(per_address, connections), trusted)


class ConnectionLimits:
    """The connections of all clients. Belongs to one event loop."""

    def __init__(self, rules: ConnectionRules) -> None:
        self.rules = rules
        """May be replaced at any time, for the connections that come then."""
        self._loop = asyncio.get_running_loop()
        self._all = _Group()
        self._by_address: dict[IPAddress | None, _Group] = {}
        self._full_log = PeerLog()
        self._slow_log = PeerLog()
        self.refusals = RefusalLog()

    def admit(self, peer: str) -> ConnectionSlot | None:
        """Return the place for one more connection from an address, or None if it has to be refused.

        Closes connections that can be missed, if there is no place otherwise.
        """
        rules = self.rules
        address = parse_address(peer)
        trusted = is_in(address, rules.trusted)
        key = address if trusted else limit_key(address)
        group = self._by_address.get(key) or _Group(key)
        if not trusted and len(group.members) >= rules.per_address:
            self._warn_address(address, len(group.members))
            if not self._make_room(group, rules.per_address):
                return None
        if len(self._all.members) >= rules.connections:
            self._warn_all()
            if not self._make_room(self._all, rules.connections):
                return None
        self._by_address[key] = group
        return ConnectionSlot(self, str(address), (self._all, group))

    def make_room(self) -> None:
        """Close a connection that can be missed: the process has no descriptors left, whatever the limits say."""
        self._make_room(self._all, len(self._all.members))

    def forget_empty(self, group: _Group) -> None:
        """Forget an address that has no connections any more."""
        if not group.members and self._by_address.get(group.address) is group:
            del self._by_address[group.address]

    def warn_slow(self, peer: str) -> None:
        """Count and log a request that was given up, because it arrived too slowly."""
        metrics.closed_connections.labels("slow").inc()
        if self._slow_log.may_warn(peer):
            logger.warning("client %s sends too slowly: its request was not complete in time (408)", peer)

    def _make_room(self, group: _Group, limit: int) -> bool:
        while len(group.members) >= limit:
            slot = group.least_needed(self._loop.time())
            if slot is None:
                metrics.closed_connections.labels("refused").inc()
                return False
            metrics.closed_connections.labels("evicted").inc()
            slot.evict()
        return True

    def _warn_address(self, address: IPAddress, count: int) -> None:
        if self._full_log.may_warn(str(address)):
            logger.warning(
                "client %s has %d connections, the most for one address (%s): idle ones are closed for new ones, and "
                "if none is idle, new ones are refused (503)",
                address,
                count,
                self.rules.keys[1],
            )

    def _warn_all(self) -> None:
        if self._full_log.may_warn(""):
            most = max(self._by_address.values(), key=lambda group: len(group.members))
            logger.warning(
                "clients have %d connections, the most that are allowed (%s), %d of them from %s: idle ones are closed "
                "for new ones, and if none is idle, new ones are refused (503)",
                len(self._all.members),
                self.rules.keys[0],
                len(most.members),
                most.address,
            )
