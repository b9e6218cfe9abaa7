"""Files of exported logins: the head of a sealed file, and the content of one that was opened."""

import json

from mcp_auth_proxy.errors import ExportRejected
from mcp_auth_proxy.store import exports, sealed_file

LONGEST_ERROR = 300
"""Characters."""

_BEFORE_KEY = 60
"""Bytes of a file that is cut off before its key would be made, which takes a third of a second."""


def export(data: bytes) -> None:
    """Check that a file is refused in a few words, and that content which is read is what JSON says, and stays so."""
    try:
        sealed_file.open_sealed(data[:_BEFORE_KEY], "correct horse battery", name="f")
    except ExportRejected as error:
        assert str(error), "an error that says nothing"
        assert len(str(error)) < LONGEST_ERROR, "an error without a bound"
    try:
        found = exports.decode(data, name="f")
    except ExportRejected as error:
        assert len(str(error)) < LONGEST_ERROR, "an error without a bound"
        return
    # Members that are not known are skipped, whatever bytes their texts have.
    document = json.loads(data.decode("utf-8", "replace"))
    assert document.get("made_at") == found.made_at, "another document"
    assert len(document.get("grants", ())) == len(found.grants), "other grants"
    assert exports.decode(exports.encode(found), name="f") == found, "not as it was"
