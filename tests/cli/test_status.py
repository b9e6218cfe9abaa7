"""What ``status`` says."""

import re
from dataclasses import replace

import pytest

from mcp_auth_proxy.broker import Connection, ConnectionState
from mcp_auth_proxy.broker.connections import Trouble
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
        "word",
        "health",
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
def test_a_server_without_a_grant_has_nine_keys(needed: bool) -> None:
    connection = Connection(account=NOTES, url="https://mcp.example/mcp", unanswered=needed)
    assert row(connection, {}) == {
        "server": "notes",
        "url": "https://mcp.example/mcp",
        "state": "not connected",
        "needs_authorization": needed,
        "account": "default",
        "label": "",
        "word": "needs consent",
        "health": None,
        "principal": "local",
    }


def test_a_state_is_described_in_words() -> None:
    assert _in_words(CONNECTED).startswith("since 20")
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
    assert _in_words(replace(ended, status=ENDED)) == f"It refused: invalid_grant; {LOGIN}"
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


def test_a_grant_that_will_die_says_when_and_what_to_do() -> None:
    degraded = replace(
        CONNECTED,
        command_name="notes@work --as anna",
        renews_itself=False,
        status=GrantStatus(GrantState.DEGRADED, Health.DEGRADED),
    )
    assert degraded.word == "degraded"
    words = ", can't be renewed: run `mcp-auth-proxy login notes@work --as anna` before then, scopes read write"
    assert re.search(rf"token until 20\S+{re.escape(words)}$", _in_words(degraded))
    forever = replace(degraded, token_expires_at=None)
    assert "token without a stated end, can't be renewed" in _in_words(forever)
    expired = replace(CONNECTED, status=GrantStatus(GrantState.EXPIRED, Health.EXPIRED))
    assert "token expired at 20" in _in_words(expired)
    assert "renews itself with the next request" in _in_words(expired)


def test_what_goes_wrong_says_since_when_and_when_it_is_tried_again() -> None:
    trouble = Trouble(what="not renewed", reason="The server is down.", since=1_800_000_000.0, retry_at=1_800_000_060.0)
    retrying = replace(CONNECTED, status=GrantStatus(GrantState.ACTIVE, Health.RETRYING), trouble=trouble)
    assert retrying.word == "retrying"
    said = r"; not renewed since 20\S+, the next try is at 20\S+: The server is down$"
    assert re.search(said, _in_words(retrying))
    away = Trouble(what="not reached", reason="refused", remedy="Is it running?", unreachable=True)
    assert _in_words(replace(CONNECTED, trouble=away)).endswith("; not reached: refused. Is it running?")
    assert replace(CONNECTED, trouble=away).word == "unreachable"


def test_a_link_that_waits_is_shown_with_and_without_a_grant() -> None:
    waiting = replace(CONNECTED, authorizing=True, unanswered=True, link=LINK)
    assert row(waiting, {})["authorization_url"] == LINK
    assert _in_words(waiting).startswith("since 20")
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
    assert _in_words(refused).startswith("since 20")
    assert _in_words(refused).endswith(f"; {LOGIN}")


def test_more_scopes_are_asked_for_by_the_call_that_needs_them() -> None:
    more = replace(CONNECTED, unanswered=True, asked_scopes=("admin", "delete"))
    assert _in_words(more).endswith("; needs authorization for more scopes (admin delete): repeat the call for a link")
    assert row(more, {})["needs_authorization"] is True


def test_a_token_that_has_expired_and_cannot_be_renewed_needs_a_new_authorization() -> None:
    expired = replace(CONNECTED, command_name="notes", renews_itself=False, expired=True)
    assert ", token expired at 20" in _in_words(expired)
    assert _in_words(expired).endswith(f", can't be renewed, scopes read write; {LOGIN}")
