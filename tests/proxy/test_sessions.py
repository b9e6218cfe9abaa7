"""What the proxy remembers of sessions, within bounds."""

from mcp_auth_proxy.models import Account
from mcp_auth_proxy.proxy.sessions import LONGEST_ID, SESSIONS_REMEMBERED, Sessions

A = Account("ada", "a")


def test_a_session_is_known_only_under_its_account() -> None:
    sessions = Sessions()
    sessions.remember(A, b"1")
    assert sessions.elicits(A, b"1")
    for other in (Account("ada", "b"), Account("bob", "a"), Account("ada", "a", "work")):
        assert not sessions.elicits(other, b"1")
    assert not sessions.elicits(A, b"2")
    assert not sessions.elicits(A, None)


def test_sessions_are_bounded_in_number_and_size() -> None:
    sessions = Sessions()
    for number in range(SESSIONS_REMEMBERED + 1):
        sessions.remember(A, b"%d" % number)
    assert not sessions.elicits(A, b"0")
    assert sessions.elicits(A, b"1")
    for size, known in ((LONGEST_ID, True), (LONGEST_ID + 1, False)):
        sessions.remember(A, b"x" * size)
        assert sessions.elicits(A, b"x" * size) is known
