"""Bind each ``Mcp-Session-Id`` to the caller, server and account that it was given for.

Whoever has the id of a session can read and write in it, at a server that many callers reach with one token. So a
client gets ``id.mac``, and what it sends back is checked and stripped. This needs no memory, so any replica can do it.
"""

import hashlib
import hmac
from binascii import hexlify

FIELD = b"mcp-session-id"

OWN_PREFIX = b"map-"
"""How the ids of sessions begin that the proxy began itself (``proxy.own_sessions``)."""

_OF_SERVER = OWN_PREFIX + b"."
"""What is put before the id of a server that begins like ours: another proxy may stand there. Ours have no dot."""

MAC_BYTES = 16
"""Half of the hash, the least that RFC 2104 §5 recommends."""

_BLOCK = 64
"""Bytes that SHA-256 reads at a time."""


def of_server(session_id: bytes) -> bytes:
    """Return a server's id so that it can't be taken for one of the proxy's own."""
    return _OF_SERVER + session_id if session_id.startswith(OWN_PREFIX) else session_id


def server_id(session_id: bytes) -> bytes | None:
    """Return the id of which ``of_server`` has made this; None if it is one of the proxy's own."""
    if not session_id.startswith(OWN_PREFIX):
        return session_id
    return session_id[len(_OF_SERVER) :] if session_id.startswith(_OF_SERVER) else None


def for_client(session_id: bytes, sessions: "SessionIds | None") -> bytes:
    """Return a server's id as its client gets it; ``sessions`` is None if callers are not identified."""
    shown = of_server(session_id)
    return shown if sessions is None else sessions.sign(shown)


class SessionIds:
    """Sign and check the session ids of one caller at one account of a server."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes, *, principal: str, server: str, account: str) -> None:
        """``key`` is the same for all processes on one store; ``principal`` is who calls, not who owns the grant."""
        parts = (part.encode() for part in (principal, server, account))
        own = hmac.digest(key, b"".join(len(part).to_bytes(4, "big") + part for part in parts), "sha256")
        # HMAC-SHA256 (RFC 2104 §2), whose key has been read once: that takes a third of the time of hmac.digest.
        padded = own.ljust(_BLOCK, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded))

    def sign(self, session_id: bytes) -> bytes:
        """Return what the client gets instead of the server's id."""
        return b"%b.%b" % (session_id, self._mac(session_id))

    def open(self, signed: bytes) -> bytes | None:
        """Return the server's id; None if it was not given to this caller."""
        session_id, _, mac = signed.rpartition(b".")
        return session_id if hmac.compare_digest(mac, self._mac(session_id)) else None

    def _mac(self, session_id: bytes) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(session_id)
        outer.update(inner.digest())
        return hexlify(outer.digest()[:MAC_BYTES])
