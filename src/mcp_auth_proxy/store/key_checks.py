"""A known text in ``meta``, sealed with each key: it shows whether a key is right before anything else is read."""

from collections.abc import Iterable, Mapping

from mcp_auth_proxy.errors import DecryptionError
from mcp_auth_proxy.store.cipher import Cipher

_CHECK = "mcp-auth-proxy store"
KEY_ROWS = "key:"
"""What the names of the checks in ``meta`` begin with; the id of the key follows."""

ADD = "INSERT INTO meta (name, value) VALUES (:name, :value) ON CONFLICT (name) DO NOTHING"


def by_key(rows: Iterable[tuple[object, bytes]]) -> dict[str, bytes]:
    """Return the checks among rows of ``meta`` (name, value), by the id of their key.

    Somebody else's program may have put anything into their columns.
    """
    return {str(name).removeprefix(KEY_ROWS): value for name, value in rows if str(name).startswith(KEY_ROWS)}


def open_with(cipher: Cipher, checks: Mapping[str, bytes], *, version: int) -> bool:
    """Return whether every check of a key that the cipher has is as we sealed it, with seals of this version."""
    try:
        return all(
            cipher.open(checks[key_id], table="meta", row=KEY_ROWS + key_id, column="value", version=version) == _CHECK
            for key_id in cipher.key_ids
            if key_id in checks
        )
    except (DecryptionError, TypeError):
        return False


def check_rows(cipher: Cipher) -> list[dict[str, object]]:
    """Return the rows of ``meta`` with the checks of the cipher's keys."""
    names = {key_id: KEY_ROWS + key_id for key_id in cipher.key_ids}
    return [
        {"name": name, "value": cipher.seal(_CHECK, table="meta", row=name, column="value", key_id=key_id)}
        for key_id, name in names.items()
    ]
