"""Which servers are warned about, and how often."""

import logging
from types import SimpleNamespace

import pytest

from mcp_auth_proxy.observability import outages as module
from mcp_auth_proxy.observability.outages import INTERVAL, OutageLog


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[float]:
    """The clock of the module."""
    caplog.set_level(logging.INFO)
    time = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time[0]))
    return time


def test_a_server_that_fails_is_warned_about_once_a_minute(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    outages = OutageLog()
    for at, server in ((0.0, "a"), (1.0, "a"), (1.0, "b"), (INTERVAL - 0.1, "a"), (INTERVAL, "a")):
        now[0] = at
        outages.warn(server, f"refused at {at:g}")
    assert caplog.messages == ["server a: refused at 0", "server b: refused at 1", "server a: refused at 60"]


def test_a_warning_has_the_trace_id_of_the_request(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    OutageLog().warn("a", "refused", trace_id="0af7651916cd43dd8448eb211c80319c")
    assert caplog.records[0].__dict__["fields"] == {"trace_id": "0af7651916cd43dd8448eb211c80319c"}


def test_a_server_that_was_changed_is_warned_about_at_once(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    outages = OutageLog()
    outages.warn("a", "refused")
    outages.forget("a")
    outages.forget("unknown")
    outages.warn("a", "refused elsewhere")
    assert caplog.messages == ["server a: refused", "server a: refused elsewhere"]
