"""Session ids that are bound to a caller, a server and an account."""

import hmac
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.proxy.session_ids import SessionIds

KEY = b"k" * 32
IDS = st.text(string.ascii_letters + string.digits + "-._~!", max_size=64).map(str.encode)


def ids(principal: str = "ada", server: str = "notes", account: str = "default", key: bytes = KEY) -> SessionIds:
    return SessionIds(key, principal=principal, server=server, account=account)


@given(IDS)
def test_what_was_signed_is_opened_again(session_id: bytes) -> None:
    signed = ids().sign(session_id)
    assert signed.startswith(session_id + b".")
    assert ids().open(signed) == session_id


@pytest.mark.parametrize(
    "other",
    [
        ids(principal="bob"),
        ids(server="docs"),
        ids(account="work"),
        ids(key=b"x" * 32),
        ids(principal="adan", server="otes"),
        ids(principal="notes", server="ada"),
    ],
    ids=["principal", "server", "account", "key", "parts that join to the same", "parts in another order"],
)
def test_an_id_is_worth_nothing_to_anybody_else(other: SessionIds) -> None:  # T64
    assert other.open(ids().sign(b"s1")) is None


@pytest.mark.parametrize("forged", [b"s1", b"", b".", b"s1.", b"s1.AAAA", b"s1." + b"0" * 32, b"s1.\xff\xfe"])
def test_an_id_without_the_right_signature_is_not_opened(forged: bytes) -> None:  # T64
    assert ids().open(forged) is None


@given(IDS, st.integers(0, 200), st.integers(0, 255))
def test_an_id_that_was_edited_is_not_opened(session_id: bytes, place: int, byte: int) -> None:  # T64
    signed = bytearray(ids().sign(session_id))
    place %= len(signed)
    if signed[place] != byte:
        signed[place] = byte
        assert ids().open(bytes(signed)) is None


@given(IDS)
def test_the_signature_is_an_hmac_of_half_its_length(session_id: bytes) -> None:
    own = hmac.digest(KEY, b"\0\0\0\3ada\0\0\0\5notes\0\0\0\7default", "sha256")
    assert ids().sign(session_id) == b"%b.%b" % (
        session_id,
        hmac.digest(own, session_id, "sha256")[:16].hex().encode(),
    )
