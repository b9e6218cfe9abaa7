"""Which servers are warned about, and how often."""

import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from mcp_auth_proxy.observability import outages as module
from mcp_auth_proxy.observability.outages import INTERVAL, OutageLog


class Timers:
    """The clock of the module, and the timers that were set by it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self._due.append((self.now + delay, callback))

    def advance(self, to: float) -> None:
        """Run what is due until then, and set the clock."""
        for at, callback in [timer for timer in self._due if timer[0] <= to]:
            self._due.remove((at, callback))
            self.now = at
            callback()
        self.now = to


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Timers:
    caplog.set_level(logging.INFO)
    timers = Timers()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: timers.now))
    return timers


def test_it_is_known_why_a_server_can_not_be_reached() -> None:
    outages = OutageLog()
    assert outages.unreachable_reason("notes") is None
    outages.note_unreachable("notes", "refused")
    assert outages.unreachable_reason("notes") == "refused"
    outages.unreachable.discard("notes")
    assert outages.unreachable_reason("notes") is None
    outages.note_unreachable("notes", "refused")
    outages.forget("notes")
    assert outages.unreachable_reason("notes") is None


def test_a_server_that_fails_is_warned_about_once_a_minute_with_the_count(  # T86
    timers: Timers, caplog: pytest.LogCaptureFixture
) -> None:
    outages = OutageLog(timers.call_later)
    for at, server in ((0.0, "a"), (1.0, "a"), (1.0, "b"), (INTERVAL - 0.1, "a"), (INTERVAL + 1, "a")):
        timers.advance(at)
        outages.warn(server, f"refused at {at:g}")
    assert caplog.messages == [
        "server a: refused at 0",
        "server b: refused at 1",
        "server a: 2 more failures, the last: refused at 59.9",
    ]
    timers.advance(3 * INTERVAL)
    assert caplog.messages[3:] == ["server a: 1 more failures, the last: refused at 61"]
    timers.advance(4 * INTERVAL)
    outages.warn("a", "refused later")
    assert caplog.messages[4:] == ["server a: refused later"]


def test_a_warning_has_the_trace_id_of_the_request(timers: Timers, caplog: pytest.LogCaptureFixture) -> None:
    OutageLog(timers.call_later).warn("a", "refused", trace_id="0af7651916cd43dd8448eb211c80319c")
    assert caplog.records[0].__dict__["fields"] == {"trace_id": "0af7651916cd43dd8448eb211c80319c"}


def test_a_server_that_was_changed_is_warned_about_at_once(timers: Timers, caplog: pytest.LogCaptureFixture) -> None:
    outages = OutageLog(timers.call_later)
    outages.warn("a", "refused")
    outages.warn("a", "refused again")
    outages.forget("a")
    outages.forget("unknown")
    outages.warn("a", "refused elsewhere")
    timers.advance(INTERVAL)
    assert caplog.messages == ["server a: refused", "server a: refused elsewhere"]
