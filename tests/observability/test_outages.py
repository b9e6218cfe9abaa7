"""Which troubles are told, and how often."""

import logging
from types import SimpleNamespace

import pytest

from mcp_auth_proxy.observability import outages as module
from mcp_auth_proxy.observability.outages import INTERVAL, OutageLog


def test_a_server_in_trouble_is_told_of_once_in_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    caplog.set_level(logging.INFO)
    troubles = OutageLog()
    for at, server in ((0.0, "a"), (1.0, "a"), (1.0, "b"), (INTERVAL - 0.1, "a"), (INTERVAL, "a")):
        now[0] = at
        troubles.warn(server, f"refused at {at:g}")
    assert caplog.messages == ["server a: refused at 0", "server b: refused at 1", "server a: refused at 60"]
