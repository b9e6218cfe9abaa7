"""A known text in ``meta``, sealed with each key: it shows whether a key is right before anything else is read."""

from collections.abc import Iterable, Mapping

from mcp_auth_proxy.errors import DecryptionError
from mcp_auth_proxy.store.cipher import Cipher

ADD = "INSERT INTO meta (name, value) VALUES (:name, :value) ON CONFLICT (name) DO NOTHING"
"""Adds a check; its values come from ``values``."""

PREFIX = "key:"
"""The beginning of the names of checks in ``meta``; the id of the key follows."""

_CHECK = "mcp-auth-proxy store"


def checks(rows: Iterable[tuple[object, bytes]]) -> dict[str, bytes]:
    """Return the checks among the rows (name, value) of ``meta``, by the id of their key."""
    return {str(name).removeprefix(PREFIX): value for name, value in rows if str(name).startswith(PREFIX)}


def open_with(cipher: Cipher, checks: Mapping[str, bytes], *, version: int) -> bool:
    """Return whether every check of a key that the cipher has is as we sealed it, with seals of this version."""
    try:
        return all(
            cipher.open(checks[key_id], table="meta", row=PREFIX + key_id, column="value", version=version) == _CHECK
            for key_id in cipher.key_ids
            if key_id in checks
        )
    except (DecryptionError, TypeError):
        return False


def values(cipher: Cipher, key_id: str) -> dict[str, object]:
    """Return the values of ``ADD`` for one of the cipher's keys."""
    name = PREFIX + key_id
    return {"name": name, "value": cipher.seal(_CHECK, table="meta", row=name, column="value", key_id=key_id)}
