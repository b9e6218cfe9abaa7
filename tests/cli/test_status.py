"""What ``status`` says."""

from dataclasses import replace

import pytest

from mcp_auth_proxy.broker import Connection, ConnectionState
from mcp_auth_proxy.broker.states import GrantStatus, Health
from mcp_auth_proxy.cli.status import _in_words, _row
from mcp_auth_proxy.models import LOCAL, Account
from mcp_auth_proxy.store.grant_summaries import GrantState

NOTES = Account(LOCAL, "notes")
FRESH = GrantStatus(GrantState.ACTIVE, Health.FRESH)
ENDED = GrantStatus(GrantState.ENDED, Health.ENDED)
ISSUER = "https://as.example"
LINK = "http://127.0.0.1:8787/connect/notes?flow=F1"

CONNECTED = Connection(
    account=NOTES,
    url="https://mcp.example/mcp",
    state=ConnectionState.CONNECTED,
    issuer=ISSUER,
    granted_at=1_800_000_000.0,
    token_expires_at=1_800_003_600.0,
    renews_itself=True,
    scopes=("read", "write"),
)


def test_a_row_has_the_keys_that_scripts_rely_on() -> None:
    row = _row(CONNECTED)
    assert list(row) == [
        "server",
        "url",
        "state",
        "issuer",
        "since",
        "token_until",
        "renews_itself",
        "scopes",
        "reason",
    ]
    assert (row["server"], row["state"], row["renews_itself"]) == ("notes", "connected", True)
    assert (row["scopes"], row["reason"]) == (["read", "write"], "")
    assert row["since"] < row["token_until"]


@pytest.mark.parametrize("authorizing", [False, True])
def test_a_server_without_a_grant_has_three_keys(authorizing: bool) -> None:
    connection = Connection(account=NOTES, url="https://mcp.example/mcp", authorizing=authorizing)
    assert _row(connection) == {"server": "notes", "url": "https://mcp.example/mcp", "state": "not connected"}


def test_a_state_is_described_in_words() -> None:
    assert _in_words(_row(CONNECTED)).startswith("connected since 20")
    assert _in_words(_row(CONNECTED)).endswith(", renews itself, scopes read write")
    ended = Connection(account=NOTES, url="u", state=ConnectionState.ENDED, issuer=ISSUER, reason="invalid_grant")
    assert _in_words(_row(ended)) == "ended, it needs a new authorization: invalid_grant"
    assert _in_words(_row(Connection(account=NOTES, url="u"))).startswith("no grant")


@pytest.mark.parametrize(
    ("status", "authorizing", "label"),
    [
        (FRESH, False, "connected"),
        (FRESH, True, "connected"),
        (ENDED, False, "ended"),
        (ENDED, True, "authorizing"),
        (None, False, "needs consent"),
        (None, True, "authorizing"),
    ],
)
def test_each_situation_has_its_own_label(status: GrantStatus | None, authorizing: bool, label: str) -> None:
    assert Connection(account=NOTES, url="u", status=status, authorizing=authorizing).label == label


def test_a_link_that_waits_is_shown_with_and_without_a_grant() -> None:
    waiting = replace(CONNECTED, authorizing=True, link=LINK)
    assert _row(waiting)["authorization_url"] == LINK
    assert _in_words(_row(waiting)).startswith("connected since 20")
    assert _in_words(_row(waiting)).endswith(f"; needs authorization: {LINK}")
    first = Connection(account=NOTES, url="u", authorizing=True, link=LINK)
    assert _in_words(_row(first)) == f"needs authorization: {LINK}"


def test_a_code_for_another_device_is_shown_with_its_address() -> None:
    device = Connection(account=NOTES, url="u", link="https://as.example/device", user_code="AB-CD")
    assert _in_words(_row(device)) == "needs authorization: https://as.example/device, code AB-CD"
