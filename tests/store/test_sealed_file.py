"""A file that is sealed with a passphrase opens as it was written, with that passphrase, or not at all."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcp_auth_proxy.errors import ExportRejected
from mcp_auth_proxy.store.exports import Export, decode, encode
from mcp_auth_proxy.store.sealed_file import MAGIC, FileKey, open_sealed, read_file
from store.builders import NOW, grant

PASSPHRASE = "correct horse battery"
CONTENT = b"what is sealed"
SEALED = FileKey.new(PASSPHRASE).seal(CONTENT)
# A key takes a third of a second.
FEW = settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])


def test_a_file_opens_with_its_passphrase_only() -> None:
    assert open_sealed(SEALED, PASSPHRASE, name="f") == CONTENT
    with pytest.raises(ExportRejected, match="the passphrase is wrong"):
        open_sealed(SEALED, "wrong horse battery", name="f")
    assert CONTENT not in SEALED


def test_no_two_files_are_alike() -> None:
    assert FileKey.new(PASSPHRASE).seal(CONTENT)[len(MAGIC) :] != SEALED[len(MAGIC) :]


@FEW
@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_a_file_with_one_byte_changed_is_refused(place: int, change: int) -> None:
    damaged = SEALED[:place] + bytes([SEALED[place] ^ change]) + SEALED[place + 1 :]
    with pytest.raises(ExportRejected):
        open_sealed(damaged, PASSPHRASE, name="f")


@FEW
@given(st.integers(0, len(SEALED) - 1))
def test_a_file_that_is_cut_off_is_refused(length: int) -> None:
    with pytest.raises(ExportRejected):
        open_sealed(SEALED[:length], PASSPHRASE, name="f")


@given(st.binary(min_size=3, max_size=3).filter(lambda given: not (14 <= given[0] <= 17 and given[1] == 8)))
def test_a_file_whose_key_would_cost_too_much_is_refused_at_once(parameters: bytes) -> None:  # T91
    start = len(MAGIC) + 1
    with pytest.raises(ExportRejected, match="within bounds"):
        open_sealed(SEALED[:start] + parameters + SEALED[start + 3 :], PASSPHRASE, name="f")


@given(st.binary(max_size=200))
def test_anything_else_is_no_export(content: bytes) -> None:
    with pytest.raises(ExportRejected):
        open_sealed(content, PASSPHRASE, name="f")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:  # T91
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ExportRejected):
            read_file(path)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_content_that_is_no_export_is_refused(content: bytes) -> None:
    with pytest.raises(ExportRejected) as caught:
        decode(content, name="f")
    assert len(str(caught.value)) < 200


def test_an_export_is_read_as_it_was_written() -> None:
    export = Export(made_at=NOW, grants=(grant(),))
    assert decode(encode(export), name="f") == export
    assert "canary" not in repr(export)
