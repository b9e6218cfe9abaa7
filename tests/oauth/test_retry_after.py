"""How a Retry-After is read: odd values do no harm."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.errors import AuthorizationServerUnavailable, TokenRefused
from mcp_auth_proxy.oauth import retry_after
from mcp_auth_proxy.oauth.retry_after import LONGEST

NOW = datetime(2025, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, 0.0),
        ("", 0.0),
        ("   ", 0.0),
        ("0", 0.0),
        ("30", 30.0),
        (" 30\t", 30.0),
        ("0030", 30.0),
        ("1.5", 1.5),
        ("7.", 7.0),
        ("3597", 3597.0),
        ("86400", LONGEST),
        ("9" * 400, LONGEST),
        ("9" * 60_000, LONGEST),
        ("-3", 0.0),
        ("-9999999", 0.0),
        ("+5", 0.0),
        ("1e9", 0.0),
        ("0x10", 0.0),
        ("inf", 0.0),
        ("nan", 0.0),
        ("5 s", 0.0),
        ("\u0663\u0660", 0.0),
        ("\xb2", 0.0),
        ("soon", 0.0),
        ("Wed, 01 Jan 2025 00:01:00 GMT", 60.0),
        ("Wednesday, 01-Jan-25 00:01:00 GMT", 60.0),
        ("Wed Jan  1 00:01:00 2025", 60.0),
        ("Wed, 01 Jan 2020 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST),
        ("Wed, 01 Jan 0000 00:00:00 GMT", 0.0),
        ("Wed, 99 Jan 2025 99:99:99 GMT", 0.0),
        ("Wed, 01 Jan 2025 00:01:00 +99999999", 0.0),
        ("5, 3597", 3597.0),
        ("3597, 5", 3597.0),
        ("5, soon", 5.0),
        (",,,", 0.0),
        ("-1, -2", 0.0),
    ],
)  # T86
def test_retry_after_is_read_and_bounded(value: str | None, expected: float) -> None:
    assert retry_after.read(value, now=NOW) == expected


@given(st.text() | st.text(alphabet="0123456789-+.,eE: ", max_size=60) | st.integers().map(str) | st.floats().map(str))
def test_an_arbitrary_retry_after_is_from_none_to_an_hour(value: str) -> None:  # T86
    assert 0.0 <= retry_after.read(value) <= LONGEST


@given(
    st.datetimes(timezones=st.timezones()), st.sampled_from(["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT"])
)
def test_an_arbitrary_date_is_from_none_to_an_hour(date: datetime, form: str) -> None:  # T86
    assert 0.0 <= retry_after.read(date.strftime(form)) <= LONGEST


def test_a_date_in_the_future_is_counted_from_now() -> None:
    date = datetime.now(UTC) + timedelta(seconds=100)
    assert retry_after.read(date.strftime("%a, %d %b %Y %H:%M:%S GMT")) == pytest.approx(100, abs=5)


def test_the_errors_of_a_response_have_its_retry_after() -> None:
    with pytest.raises(TokenRefused) as refused, retry_after.attached({"retry-after": "9"}):
        raise TokenRefused("invalid_client", "no")
    assert (refused.value.server_retry_after, refused.value.retry_after) == (9.0, 9.0)
    with pytest.raises(AuthorizationServerUnavailable) as down, retry_after.attached({"retry-after": "-9"}):
        raise AuthorizationServerUnavailable("down")
    assert (down.value.server_retry_after, down.value.retry_after) == (0.0, 5.0)
