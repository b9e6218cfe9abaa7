"""Turn errors of the driver and the server into errors that say what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from mcp_auth_proxy.config.settings import PostgresqlUrl
from mcp_auth_proxy.errors import StoreOutOfReach, StoreUnavailable, excerpt
from mcp_auth_proxy.observability import metrics

# The server's reasons for refusing a connection have no code in libpq, only a text. It decides no more than whether to
# try again: what is not found here, as in another language, is tried again for a while.
_FINAL = re.compile(
    r"password authentication failed|no password supplied|authentication failed|no pg_hba\.conf entry"
    r"|role \".*\" does not exist|database \".*\" does not exist|is not permitted to log in|permission denied"
    r"|does not support SSL|SSL error|certificate|sslmode|SSL connection|definition of service|service file"
    r"|unsupported (?:frontend|startup)|authentication method|channel binding|is not currently accepting connections",
    re.IGNORECASE,
)
_MESSAGES = {
    "55P03": "is busy and was not free in time. Try again.",
    "57014": "did not answer in time. Look at its load and at what locks its tables.",
    "25006": "can't be written: the server is read-only, maybe a standby. Name the primary in store.url "
    "(target_session_attrs=read-write).",
    "53100": "can't be written: the disk of the server is full.",
    "53200": "has not enough memory.",
    "42501": "can't be used: the role may not do this ({reason}). Make it the owner of the tables.",
}
_BY_CLASS = {
    "08": "was lost ({reason}). It is tried again by itself.",
    "57": "was lost ({reason}). It is tried again by itself.",
    "53": "can't be used now ({reason}).",
    "58": "can't be used now: the server could not read or write a file ({reason}).",
    "XX": "is damaged, as the server says ({reason}).",
    "22": "can't keep a value ({reason}).",
    "23": "can't be used: its tables are not as mcp-auth-proxy has made them ({reason}).",
    "42": "can't be used: its tables are not as mcp-auth-proxy has made them ({reason}).",
    "0A": "was changed while in use ({reason}). Try again.",
    "25": "was lost: the transaction took too long ({reason}).",
    "40": "is busy ({reason}). Try again.",
}


_PASSING = ("08", "57", "25P03", "40", "55P03")
"""Beginnings of the codes of what passes when the server is back, or less busy."""


class ConnectionRefused(StoreUnavailable):
    """The server answers, and will not let us in: to try again is no use."""


def unreachable(url: PostgresqlUrl, error: Exception) -> StoreUnavailable:
    """Return what to raise if no connection could be made."""
    metrics.store_failures.labels("unavailable").inc()
    reason = _reason(error)
    if isinstance(error, psycopg.Error) and _FINAL.search(str(error)):
        return ConnectionRefused(
            f"The store {url} can't be used: {reason}. Check user, password, database and sslmode in store.url, "
            "PGPASSWORD and the other variables of libpq, or ~/.pgpass."
        )
    return StoreOutOfReach(f"The store {url} can't be reached ({reason}). Check the server and store.url.")


def lost(url: PostgresqlUrl) -> StoreUnavailable:
    """Return what to raise if the server does not answer in time."""
    metrics.store_failures.labels("unavailable").inc()
    return StoreOutOfReach(f"The store {url} did not answer in time. Check the server and the network.")


@contextmanager
def translated(url: PostgresqlUrl) -> Iterator[None]:
    """Raise StoreUnavailable for errors that the environment causes; let other errors pass.

    The environment includes who writes to the database without us: a column or a table is gone, or a trigger objects.
    """
    try:
        yield
    except psycopg.Error as error:
        metrics.store_failures.labels("unavailable").inc()
        raise unavailable(url, error) from None


def unavailable(url: PostgresqlUrl, error: psycopg.Error) -> StoreUnavailable:
    """Return what to raise for an error of a statement."""
    state = error.sqlstate or "08000"
    # Errors of the driver itself have no state: that of a value which it can't send is the only one that is ours.
    if error.sqlstate is None and isinstance(error, psycopg.DataError):
        state = "22000"
    message = _MESSAGES.get(state) or _BY_CLASS.get(state[:2]) or "can't be used now ({reason})."
    kind = StoreOutOfReach if state.startswith(_PASSING) else StoreUnavailable
    return kind(f"The store {url} {message.format(reason=_reason(error))}")


def _reason(error: Exception) -> str:
    """Return the first line of an error: the others are hints, details and the text of the statement."""
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        return excerpt(error.diag.message_primary)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return excerpt(lines[0].removeprefix("connection failed: ").rstrip("."))
