"""Parse server-sent events as they arrive (WHATWG HTML §9.2)."""

import re

MAX_EVENT = 64 * 1024 * 1024
"""Bytes of one event."""

MAX_ID = 1024
"""Bytes of an id that is kept: it is sent back in a header field."""

_BOM = b"\xef\xbb\xbf"
_ID = re.compile(rb"[!-~](?:[ -~]*[!-~])?")
_RETRY = re.compile(rb"[0-9]{1,9}")


class EventParser:
    """Bytes in, the data of ``message`` events out. Events of other types are dropped, as MCP clients do."""

    def __init__(self, *, last_id: bytes = b"", limit: int = MAX_EVENT) -> None:
        """``last_id`` is that of the stream that this one continues; ``limit`` bounds the bytes of one event."""
        self.last_id = last_id
        """The id of the last event that had one; empty if it can't be sent back in ``Last-Event-ID``."""
        self.retry: float | None = None
        """Seconds that the server wants a client to wait before it connects again."""
        self._limit = limit
        self._rest = bytearray()
        """The line that is not complete yet."""
        self._data = bytearray()
        self._type = b""
        self._id = last_id
        self._after_cr = False
        self._at_start = True

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of the events that are complete now. Raises ValueError if one is too large."""
        if not received:
            return []
        if self._after_cr and received.startswith(b"\n"):
            received = received[1:]
        self._after_cr = received.endswith(b"\r")
        *lines, rest = received.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        found: list[bytes] = []
        for line in lines:
            self._rest += line
            complete = bytes(self._rest)
            self._rest.clear()
            self._read_line(complete, found)
        self._rest += rest
        self._check_size()
        return found

    def _read_line(self, line: bytes, found: list[bytes]) -> None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if not line:
            self._dispatch(found)
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        match name:
            case b"data":
                self._data += value + b"\n"
                self._check_size()
            case b"event":
                self._type = value
            case b"id":
                self._id = value if len(value) <= MAX_ID and _ID.fullmatch(value) else b""
            case b"retry" if _RETRY.fullmatch(value):
                self.retry = int(value) / 1000

    def _dispatch(self, found: list[bytes]) -> None:
        self.last_id = self._id
        data = bytes(self._data[:-1])
        if data and self._type in (b"", b"message"):
            found.append(data)
        self._data.clear()
        self._type = b""

    def _check_size(self) -> None:
        if len(self._rest) + len(self._data) > self._limit:
            raise ValueError(f"an event is longer than {self._limit // 1024} KiB")
