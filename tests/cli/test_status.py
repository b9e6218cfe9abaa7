"""What ``status`` says."""

from dataclasses import replace

import pytest

from mcp_auth_proxy.broker import Connection, ConnectionState
from mcp_auth_proxy.broker.states import GrantStatus, Health
from mcp_auth_proxy.cli.status import _in_words, row
from mcp_auth_proxy.models import LOCAL, Account
from mcp_auth_proxy.store.grant_summaries import GrantState

NOTES = Account(LOCAL, "notes")
FRESH = GrantStatus(GrantState.ACTIVE, Health.FRESH)
ENDED = GrantStatus(GrantState.ENDED, Health.ENDED)
ISSUER = "https://as.example"
LOGIN = "needs authorization: run `mcp-auth-proxy login notes`"
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
    shown = row(CONNECTED, {})
    assert list(shown) == [
        "server",
        "url",
        "state",
        "needs_authorization",
        "issuer",
        "since",
        "token_until",
        "renews_itself",
        "scopes",
        "reason",
        "account",
        "label",
        "principal",
    ]
    assert (shown["server"], shown["state"], shown["renews_itself"]) == ("notes", "connected", True)
    assert (shown["scopes"], shown["reason"]) == (["read", "write"], "")
    assert shown["since"] < shown["token_until"]
    assert (shown["account"], shown["label"], shown["principal"]) == ("default", "", "local")


def test_a_row_names_account_label_and_principal() -> None:
    work = replace(CONNECTED, account=Account("prn_1", "notes", "work"), grant_label="me@work.example")
    shown = row(work, {"prn_1": "anna"})
    assert (shown["server"], shown["account"]) == ("notes", "work")
    assert (shown["label"], shown["principal"]) == ("me@work.example", "anna")
    assert " as me@work.example by https://as.example, " in _in_words(work)
    shared = replace(CONNECTED, account=Account("project:default", "notes"))
    assert row(shared, {})["principal"] == "project:default"
    assert row(Connection(account=Account("", "notes"), url="u"), {})["principal"] is None


@pytest.mark.parametrize("needed", [False, True])
def test_a_server_without_a_grant_has_seven_keys(needed: bool) -> None:
    connection = Connection(account=NOTES, url="https://mcp.example/mcp", unanswered=needed)
    assert row(connection, {}) == {
        "server": "notes",
        "url": "https://mcp.example/mcp",
        "state": "not connected",
        "needs_authorization": needed,
        "account": "default",
        "label": "",
        "principal": "local",
    }


def test_a_state_is_described_in_words() -> None:
    assert _in_words(CONNECTED).startswith("connected since 20")
    assert _in_words(CONNECTED).endswith(", renews itself, scopes read write")
    ended = Connection(
        account=NOTES,
        url="u",
        command_name="notes",
        state=ConnectionState.ENDED,
        issuer=ISSUER,
        reason="It refused: invalid_grant.",
    )
    assert _in_words(ended) == f"ended: It refused: invalid_grant; {LOGIN}"
    assert _in_words(Connection(account=NOTES, url="u")).startswith("no grant")


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
    waiting = replace(CONNECTED, authorizing=True, unanswered=True, link=LINK)
    assert row(waiting, {})["authorization_url"] == LINK
    assert _in_words(waiting).startswith("connected since 20")
    assert _in_words(waiting).endswith(f"; needs authorization: {LINK}")
    first = Connection(account=NOTES, url="u", authorizing=True, unanswered=True, link=LINK)
    assert _in_words(first) == f"needs authorization: {LINK}"


def test_a_code_for_another_device_is_shown_with_its_address() -> None:
    device = Connection(account=NOTES, url="u", unanswered=True, link="https://as.example/device", user_code="AB-CD")
    assert _in_words(device) == "needs authorization: https://as.example/device, code AB-CD"


def test_a_link_that_has_expired_is_replaced_by_the_command_for_a_new_one() -> None:
    needed = Connection(account=NOTES, url="u", command_name="notes", unanswered=True)
    assert _in_words(needed) == LOGIN
    denied = replace(needed, failure="The user declined.")
    assert _in_words(denied) == f"{LOGIN}; the last one failed: The user declined."
    assert row(denied, {})["reason"] == "The user declined."
    refused = replace(CONNECTED, command_name="notes", unanswered=True)
    assert _in_words(refused).startswith("connected since 20")
    assert _in_words(refused).endswith(f"; {LOGIN}")


def test_more_scopes_are_asked_for_by_the_call_that_needs_them() -> None:
    more = replace(CONNECTED, unanswered=True, asked_scopes=("admin", "delete"))
    assert _in_words(more).endswith("; needs authorization for more scopes (admin delete): repeat the call for a link")
    assert row(more, {})["needs_authorization"] is True


def test_a_token_that_has_expired_and_cannot_be_renewed_needs_a_new_authorization() -> None:
    expired = replace(CONNECTED, command_name="notes", renews_itself=False, expired=True)
    assert ", token expired at 20" in _in_words(expired)
    assert _in_words(expired).endswith(f", can't be renewed, scopes read write; {LOGIN}")
