"""Bind each ``Mcp-Session-Id`` to the caller, server and account that it was given for.

Whoever has the id of a session can read and write in it, at a server that many callers reach with one token. So a
client gets ``id.mac``, and what it sends back is checked and stripped. This needs no memory, so any replica can do it.
"""

import hmac
from base64 import urlsafe_b64encode

FIELD = b"mcp-session-id"

MAC_BYTES = 16
"""Half of the hash, the least that RFC 2104 §5 recommends."""


class SessionIds:
    """Sign and check the session ids of one caller at one account of a server."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes, *, principal: str, server: str, account: str) -> None:
        """``key`` is the same for all processes on one store; ``principal`` is who calls, not who owns the grant."""
        parts = (part.encode() for part in (principal, server, account))
        self._key = hmac.digest(key, b"".join(len(part).to_bytes(4, "big") + part for part in parts), "sha256")

    def sign(self, session_id: bytes) -> bytes:
        """Return what the client gets instead of the server's id."""
        return b"%b.%b" % (session_id, self._mac(session_id))

    def open(self, signed: bytes) -> bytes | None:
        """Return the server's id; None if it was not given to this caller."""
        session_id, _, mac = signed.rpartition(b".")
        return session_id if hmac.compare_digest(mac, self._mac(session_id)) else None

    def _mac(self, session_id: bytes) -> bytes:
        return urlsafe_b64encode(hmac.digest(self._key, session_id, "sha256")[:MAC_BYTES]).rstrip(b"=")
