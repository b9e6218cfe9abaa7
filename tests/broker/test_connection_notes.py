"""What is remembered of connections beside their grants."""

import pytest

from mcp_auth_proxy.broker.connection_notes import (
    MAX_ACCOUNTS,
    MAX_EVENTS,
    ConnectionJournal,
    ConnectionNotes,
    remedy,
    sentence,
)
from mcp_auth_proxy.broker.states import Word
from mcp_auth_proxy.errors import ConfigHint
from mcp_auth_proxy.models import Account

ANN = Account("ann", "notes")


def journal() -> ConnectionJournal:
    return ConnectionJournal(clock=lambda: 1000.0)


def test_an_error_is_remembered_until_it_works_again() -> None:
    notes = journal()
    notes.note_tools(ANN, 3)
    notes.not_authorized(ANN, "You said no.")
    assert notes.notes(ANN) == ConnectionNotes(last_error="You said no.", tools=3)
    notes.connected(ANN)
    assert notes.notes(ANN) == ConnectionNotes(tools=3)
    notes.disconnected(ANN)
    assert notes.notes(ANN) == ConnectionNotes()
    assert [(event.text, event.good) for event in notes.events()] == [
        ("disconnected", True),
        ("connected", True),
        ("not authorized: You said no.", False),
    ]


def test_what_repeats_is_told_once() -> None:
    notes = journal()
    for _ in range(3):
        notes.not_renewed(ANN, "It is down.")
    notes.ended(ANN, "It is over.")
    notes.not_renewed(ANN, "It is down.")
    assert len(notes.events()) == 3


def test_no_caller_can_fill_the_memory() -> None:
    notes = journal()
    for number in range(MAX_ACCOUNTS + 5):
        notes.not_authorized(Account(str(number), "notes"), "no")
    assert notes.notes(Account("4", "notes")).last_error is None
    assert notes.notes(Account("5", "notes")).last_error == "no"
    assert len(notes.events()) == MAX_EVENTS


@pytest.mark.parametrize("word", list(Word))
def test_every_state_has_a_sentence_and_every_error_a_remedy(word: Word) -> None:
    assert sentence(word).endswith(".")
    assert remedy(word).endswith(".")
    assert remedy(word, ConfigHint("oauth.issuer", "https://as.example")) == (
        "Set oauth.issuer to https://as.example in the configuration, if that is what you want."
    )
    assert remedy(word, ConfigHint("oauth.client_id")).startswith("Set oauth.client_id in the configuration")
