"""Warnings about grants before they fail: once for a grant and a change of its state."""

import logging
from dataclasses import replace

import pytest

from mcp_auth_proxy.broker.grant_signals import GrantSignals, local_time
from mcp_auth_proxy.models import Account
from store.builders import NOW, grant

LOGGER = "mcp_auth_proxy.broker.grant_signals"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_grant_that_cannot_be_renewed_is_warned_of_once_with_its_end_and_the_remedy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    signals = GrantSignals(clock=lambda: NOW)
    signals.says_ready = True
    stored = grant()
    stored = replace(
        stored,
        key=replace(stored.key, account=Account("local", "linear", "work")),
        tokens=replace(stored.tokens, expires_at=NOW + 60),
    )
    with caplog.at_level(logging.INFO, LOGGER):
        signals.usable(stored, renewable=True)
        assert warnings(caplog) == []
        for _ in range(3):
            signals.usable(stored, renewable=False)
        assert warnings(caplog) == [
            f"server linear: its grant can't be renewed, and ends at {local_time(NOW + 60)}. Authorize it again before "
            "then: mcp-auth-proxy login linear@work"
        ]
        # Another consent is another grant; one without a stated end, or that has ended, is none to warn of.
        signals.usable(replace(stored, id=stored.id + 1), renewable=False)
        assert len(warnings(caplog)) == 2
        for ends in (None, NOW - 1):
            signals.usable(replace(stored, tokens=replace(stored.tokens, expires_at=ends)), renewable=False)
    assert len(warnings(caplog)) == 2
    assert [record.getMessage() for record in caplog.records].count("server linear is ready") == 1
