"""Which connections are closed for new ones, and which new ones are refused (T83)."""

import logging
from dataclasses import dataclass

import pytest

from mcp_auth_proxy.net.connection_limits import (
    IDLE,
    SLOW,
    UNFINISHED,
    ConnectionLimits,
    ConnectionRules,
    ConnectionSlot,
    Rank,
)
from mcp_auth_proxy.net.peers import parse_network


@dataclass(eq=False)
class FakeConnection:
    """A connection as the limits see it."""

    state: Rank | None
    unread: bool = False
    closed: bool = False

    def rank(self) -> Rank | None:
        return self.state

    def has_unread(self) -> bool:
        return self.unread

    def make_room(self) -> None:
        self.closed = True


def limits(connections: int = 100, per_address: int | None = None, *trusted: str) -> ConnectionLimits:
    rules = ConnectionRules.of(connections, per_address, tuple(parse_network(entry) for entry in trusted))
    return ConnectionLimits(rules)


def admitted(made: ConnectionLimits, peer: str, *states: Rank | None) -> list[FakeConnection]:
    """Admit a connection in each of the states."""
    connections = [FakeConnection(state) for state in states]
    for connection in connections:
        slot = made.admit(peer)
        assert slot is not None
        slot.connection = connection
    return connections


async def test_the_least_recently_used_connection_makes_room() -> None:
    made = limits(3, 3)
    old, older, oldest = admitted(made, "203.0.113.5", (IDLE, 3.0), (IDLE, 2.0), (IDLE, 1.0))
    for closed in ((oldest,), (oldest, older), (oldest, older, old)):
        admitted(made, "203.0.113.5", None)
        assert [c for c in (oldest, older, old) if c.closed] == list(closed)
    assert made.admit("203.0.113.5") is None


async def test_idle_connections_make_room_before_unfinished_and_slow_ones() -> None:
    made = limits(4, 4)
    slow, unfinished, running, idle = admitted(made, "203.0.113.5", (SLOW, 1.0), (UNFINISHED, 2.0), None, (IDLE, 3.0))
    order = []
    for _ in range(3):
        admitted(made, "203.0.113.5", None)
        order.append([c.closed for c in (idle, unfinished, slow, running)])
    assert order == [[True, False, False, False], [True, True, False, False], [True, True, True, False]]


async def test_a_connection_whose_request_has_just_come_is_not_closed() -> None:
    made = limits(2, 2)
    busy, idle = admitted(made, "203.0.113.5", (IDLE, 1.0), (IDLE, 2.0))
    busy.unread = True
    admitted(made, "203.0.113.5", None)
    assert (busy.closed, idle.closed) == (False, True)
    assert made.admit("203.0.113.5") is None


async def test_a_connection_that_was_used_since_the_search_is_not_closed() -> None:
    made = limits(3, 3)
    first, second, third = admitted(made, "203.0.113.5", (IDLE, 1.0), (IDLE, 2.0), (IDLE, 3.0))
    admitted(made, "203.0.113.5", None)
    second.state = (IDLE, 9.0)
    admitted(made, "203.0.113.5", None)
    assert (first.closed, second.closed, third.closed) == (True, False, True)


@pytest.mark.parametrize("networked", [False, True])
async def test_one_address_takes_no_places_of_others(networked: bool) -> None:
    made = limits(8)
    peers = [f"2001:db8::{n:x}" for n in range(1, 7)] if networked else ["203.0.113.5", "::ffff:203.0.113.5"] * 3
    for peer in peers:
        admitted(made, peer, None)
    assert made.admit(peers[0]) is None
    assert made.admit("2001:db8:0:1::1") is not None
    assert made.admit("203.0.113.6") is not None
    assert made.admit("203.0.113.7") is None  # that was all


async def test_the_limit_of_all_closes_connections_of_others() -> None:
    made = limits(2, 2)
    (kept,) = admitted(made, "203.0.113.5", (IDLE, 1.0))
    admitted(made, "203.0.113.6", None)
    admitted(made, "203.0.113.7", None)
    assert kept.closed


async def test_a_trusted_address_may_have_all_connections() -> None:
    made = limits(8, 2, "10.0.0.0/8", "fd00::1")
    for peer in ("10.1.2.3", "::ffff:10.1.2.3", "fd00::1"):
        admitted(made, peer, None)
        admitted(made, peer, None)
    assert made.admit("fd00::2") is not None  # in the network of a trusted one
    assert made.admit("10.1.2.3") is not None
    assert made.admit("10.1.2.3") is None


async def test_a_place_is_given_back_once() -> None:
    made = limits(2, 2)
    slots = [made.admit("203.0.113.5") for _ in range(2)]
    assert made.admit("203.0.113.5") is None
    for _ in range(2):
        assert slots[0] is not None
        slots[0].release()
    assert isinstance(made.admit("203.0.113.5"), ConnectionSlot)
    assert made.admit("203.0.113.5") is None


async def test_rules_can_be_replaced() -> None:
    made = limits(8, 2)
    idle = admitted(made, "203.0.113.5", (IDLE, 1.0), (IDLE, 2.0))
    made.rules = ConnectionRules.of(8, 1)
    admitted(made, "203.0.113.5", None)
    assert [connection.closed for connection in idle] == [True, True]


async def test_each_attacker_is_named_once_a_minute_and_only_a_few(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = limits(1000, 1)
    for number in range(1, 101):
        for _ in range(3):
            made.admit(f"203.0.113.{number}")
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split()[1] for line in lines] == [f"203.0.113.{number}" for number in range(1, 6)]
    monkeypatch.setattr("mcp_auth_proxy.observability.peer_log.INTERVAL", 0.0)
    made.admit("203.0.113.1")
    assert len(caplog.records) == 6
