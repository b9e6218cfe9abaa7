"""What ``login``, ``logout`` and ``status`` say."""

import pytest

from mcp_auth_proxy.broker import Connection, ConnectionState, Disconnected, ForgottenGrant, Revocation
from mcp_auth_proxy.cli.account import _first, _in_words, _logout_lines, _row
from mcp_auth_proxy.models import LOCAL, Account

NOTES = Account(LOCAL, "notes")
ISSUER = "https://as.example"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("1 validation error\ntools\n  Field required."), "1 validation error tools Field required"),
        (ExceptionGroup("", [ExceptionGroup("", [OSError("refused")]), ValueError("later")]), "refused"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_an_error_is_shown_on_one_line(error: Exception, text: str) -> None:
    assert _first(error) == text


# logout


def disconnected(*grants: ForgottenGrant, client_forgotten: bool = False) -> Disconnected:
    return Disconnected(account=NOTES, grants=grants, client_forgotten=client_forgotten)


def test_logout_says_what_was_revoked_and_what_could_not_be() -> None:
    done, failed = _logout_lines(
        disconnected(
            ForgottenGrant(issuer=ISSUER, revocation=Revocation.REVOKED),
            ForgottenGrant(issuer=ISSUER, revocation=Revocation.NOT_OFFERED),
            ForgottenGrant(issuer=ISSUER, revocation=Revocation.FAILED, reason="It answered 500."),
            client_forgotten=True,
        )
    )
    assert done == [
        f"notes: forgotten here and revoked at {ISSUER}",
        f"notes: forgotten here; {ISSUER} does not support revocation",
        "notes: the next authorization registers a new client",
    ]
    (line,) = failed
    assert line.startswith(
        f"notes: forgotten here, but not revoked at {ISSUER}: It answered 500. Its tokens stay valid"
    )
    assert "withdraw the access at the provider" in line


def test_logout_without_a_grant_has_no_lines() -> None:
    assert _logout_lines(disconnected()) == ([], [])


# status

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
    ("state", "authorizing", "label"),
    [
        (ConnectionState.CONNECTED, False, "connected"),
        (ConnectionState.CONNECTED, True, "connected"),
        (ConnectionState.ENDED, False, "ended"),
        (ConnectionState.ENDED, True, "authorizing"),
        (ConnectionState.NOT_CONNECTED, False, "needs consent"),
        (ConnectionState.NOT_CONNECTED, True, "authorizing"),
    ],
)
def test_each_situation_has_its_own_label(state: ConnectionState, authorizing: bool, label: str) -> None:
    assert Connection(account=NOTES, url="u", state=state, authorizing=authorizing).label == label
