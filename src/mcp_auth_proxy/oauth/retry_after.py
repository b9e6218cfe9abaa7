"""``Retry-After`` (RFC 9110 §10.2.3), and the errors of servers that can't be used now."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from mcp_auth_proxy.errors import AuthorizationError, AuthorizationServerUnavailable

LONGEST = 3600.0
"""Seconds. A longer Retry-After is reduced to this."""

MAX_DATE = 200
"""Characters of a field value that is read as a date."""

_SECONDS = re.compile(r"[0-9]+(\.[0-9]*)?")


def read(value: str | None, *, now: datetime | None = None) -> float:
    """Return a Retry-After in seconds, at most an hour; 0 if it is absent, unreadable or past.

    A fraction of a second is accepted. Of several fields, which arrive joined with commas, the longest counts.
    """
    text = (value or "").strip()
    stated = [float(part) for part in map(str.strip, text.split(",")) if _SECONDS.fullmatch(part)]
    if stated:
        return min(max(stated), LONGEST)
    if not text.isascii() or len(text) > MAX_DATE:
        return 0.0
    try:
        date = parsedate_to_datetime(text)
        left = (date.replace(tzinfo=date.tzinfo or UTC) - (now or datetime.now(UTC))).total_seconds()
    except (ValueError, OverflowError, IndexError, TypeError):
        return 0.0
    return min(max(left, 0.0), LONGEST)


def is_temporary(status: int) -> bool:
    """Return whether a status says that the same request may succeed later."""
    return status in (408, 429) or status >= 500


def unavailable(
    message: str, headers: Mapping[str, str], *, maybe_processed: bool = False
) -> AuthorizationServerUnavailable:
    """Return the error for a response with these headers, whose names are in lower case."""
    error = AuthorizationServerUnavailable(message, maybe_processed=maybe_processed)
    _attach(error, headers)
    return error


@contextmanager
def attached(headers: Mapping[str, str]) -> Iterator[None]:
    """Add the Retry-After of a response to the error that reading it raises, whatever its status is."""
    try:
        yield
    except AuthorizationError as error:
        _attach(error, headers)
        raise


def _attach(error: AuthorizationError, headers: Mapping[str, str]) -> None:
    seconds = read(headers.get("retry-after"))
    if seconds:
        error.retry_after = error.server_retry_after = seconds
