"""Sealed values open in their own place and under their own key only."""

import base64
import os
import stat
from pathlib import Path
from typing import TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.config.settings import KeySource
from mcp_auth_proxy.errors import DecryptionError, StoreRejected
from mcp_auth_proxy.store.cipher import Cipher, Key, generate_key_file, load_key

OLD, NEW = Key.of(b"o" * 32), Key.of(b"n" * 32)
CIPHER = Cipher([NEW, OLD])


class Place(TypedDict):
    table: str
    row: str
    column: str


PLACE: Place = {"table": "grants", "row": "r1", "column": "access_token"}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_a_sealed_value_opens_in_its_place(text: str, table: str, row: str, column: str) -> None:
    sealed = CIPHER.seal(text, table=table, row=row, column=column)
    assert CIPHER.open(sealed, table=table, row=row, column=column) == text


@given(st.lists(TEXTS, min_size=3, max_size=3), st.lists(TEXTS, min_size=3, max_size=3))
def test_it_opens_in_no_other_place(here: list[str], there: list[str]) -> None:
    sealed = CIPHER.seal("token", table=here[0], row=here[1], column=here[2])
    if here != there:
        with pytest.raises(DecryptionError):
            CIPHER.open(sealed, table=there[0], row=there[1], column=there[2])


def test_places_whose_texts_concatenate_equally_are_distinguished() -> None:
    sealed = CIPHER.seal("token", table="a", row="bc", column="d")
    with pytest.raises(DecryptionError):
        CIPHER.open(sealed, table="ab", row="c", column="d")


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_a_changed_byte_anywhere_is_detected_without_revealing_the_value(position: int, change: int) -> None:
    sealed = bytearray(CIPHER.seal("canary-token", **PLACE))
    sealed[position % len(sealed)] ^= change
    with pytest.raises(DecryptionError) as caught:
        CIPHER.open(bytes(sealed), **PLACE)
    assert "canary" not in str(caught.value)


@given(st.binary(max_size=80))
def test_garbage_does_not_open(data: bytes) -> None:
    with pytest.raises(DecryptionError):
        CIPHER.open(data, **PLACE)


def test_the_same_text_is_never_sealed_the_same() -> None:
    assert len({CIPHER.seal("x", **PLACE) for _ in range(100)}) == 100


def test_the_first_key_seals_and_all_open() -> None:
    sealed_before = Cipher([OLD]).seal("x", **PLACE)
    assert CIPHER.open(sealed_before, **PLACE) == "x"
    with pytest.raises(DecryptionError, match=NEW.id):
        Cipher([OLD]).open(CIPHER.seal("x", **PLACE), **PLACE)


def test_a_key_shows_its_id_but_not_itself() -> None:
    assert repr(OLD) == f"Key(id='{OLD.id}')"
    assert len(OLD.id) == 8
    assert OLD.id != NEW.id


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(b"\xfb\xff" * 16).decode(),
        base64.urlsafe_b64encode(b"\xfb\xff" * 16).decode(),
        base64.urlsafe_b64encode(b"\xfb\xff" * 16).decode().rstrip("=") + "\n",
    ],
)
def test_a_key_is_read_from_base64_of_either_kind(text: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    from_file = load_key(KeySource(kind="file", name=str(path)), {})
    from_env = load_key(KeySource(kind="env", name="K"), {"K": text})
    assert from_file == from_env == Key.of(b"\xfb\xff" * 16)


@pytest.mark.parametrize(
    "text", ["", "x", "A" * 42, "A" * 45, "A" * 64, "é" * 43, base64.b64encode(b"x" * 31).decode()]
)
def test_text_that_is_not_a_key_is_rejected_with_how_to_make_one(text: str) -> None:
    with pytest.raises(StoreRejected, match="openssl rand -base64 32") as caught:
        load_key(KeySource(kind="env", name="K"), {"K": text})
    assert not text or text not in str(caught.value) or text == "x"


def test_a_missing_key_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(StoreRejected, match="env:K"):
        load_key(KeySource(kind="env", name="K"), {})
    with pytest.raises(StoreRejected, match="nowhere"):
        load_key(KeySource(kind="file", name=str(tmp_path / "nowhere")), {})
    (tmp_path / "binary").write_bytes(b"\xff" * 32)
    with pytest.raises(StoreRejected, match="not a key"):
        load_key(KeySource(kind="file", name=str(tmp_path / "binary")), {})


def test_a_generated_key_file_is_private_complete_and_never_replaced(tmp_path: Path) -> None:  # T46
    path = tmp_path / "store.key"
    before = os.umask(0)
    try:
        assert generate_key_file(path)
    finally:
        os.umask(before)
    content = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key(KeySource(kind="file", name=str(path)), {}).id
    assert not generate_key_file(path)
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["store.key"]
