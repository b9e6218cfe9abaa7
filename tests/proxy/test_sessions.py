"""What the proxy remembers of sessions, within bounds."""

from mcp_auth_proxy.proxy.sessions import LONGEST_ID, SESSIONS_REMEMBERED, Sessions


def test_a_session_is_known_only_under_its_server() -> None:
    sessions = Sessions()
    sessions.remember("a", b"1")
    assert [sessions.elicits(*asked) for asked in (("a", b"1"), ("b", b"1"), ("a", b"2"), ("a", None))] == [
        True,
        False,
        False,
        False,
    ]


def test_sessions_are_bounded_in_number_and_size() -> None:
    sessions = Sessions()
    for number in range(SESSIONS_REMEMBERED + 1):
        sessions.remember("a", b"%d" % number)
    assert not sessions.elicits("a", b"0")
    assert sessions.elicits("a", b"1")
    for size, known in ((LONGEST_ID, True), (LONGEST_ID + 1, False)):
        sessions.remember("a", b"x" * size)
        assert sessions.elicits("a", b"x" * size) is known
