"""Read ``store.url``: a file for SQLite, or a PostgreSQL database as libpq names one."""

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.config.reader import Context
from mcp_auth_proxy.config.settings import PostgresqlUrl

INSTALL = "pip install 'mcp-auth-proxy[postgresql]'"

# libpq's own reader takes user and password up to the first @, and the host up to the first of / and ?. What doesn't
# fit is refused, since a password with such a character would be shown as part of a host.
_POSTGRESQL = re.compile(
    r"postgres(?:ql)?://(?:(?P<user>[^@/?#:\s]*)(?::(?P<password>[^@/?#\s]*))?@)?"
    r"(?P<hosts>[^@/?#\s]*)(?P<database>/[^@/?#\s]*)?(?:\?(?P<parameters>[^@?#\s]*))?"
)
_SCHEMES = ("postgresql://", "postgres://")
_FORMS = (
    "must be sqlite:///FILE (relative to this file), sqlite:////FILE (absolute), postgresql://…, or env:NAME or "
    "file:PATH with one of these"
)
_SHAPE = (
    "must be postgresql://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=…, each part optional: in a user or password write "
    "@ as %40, / as %2F, ? as %3F, : as %3A, # as %23 and % as %25"
)
_SECRET_PARAMETERS = frozenset({"password", "sslpassword", "oauth_client_secret", "scram_client_key"})
_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_FROM_ENVIRONMENT = ("PGSERVICE", "PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER")


def read_store_url(text: str, context: Context) -> Path | PostgresqlUrl:
    """Return the file or database of ``store.url``. Raises ValueError, whose text has nothing of a PostgreSQL URL."""
    kind, _, name = text.partition(":")
    if kind == "env":
        text = context.variable(name).strip()
    elif kind == "file" and not name.startswith("//"):
        context.secret_files.add(context.path(name))
        text = context.file_text(name).strip()
    if text.startswith(_SCHEMES):
        return _postgresql(text, context)
    return _file(text, context)


def local_path(url: PostgresqlUrl, environ: Mapping[str, str]) -> Path:
    """Return a name in this user's run folder that stands for a database. Nothing is made.

    Processes of one user on one machine find each other by files beside it, so two URLs that differ in their
    password only have the same.
    """
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    folder = Path(runtime, "mcp-auth-proxy") if runtime.startswith("/") else _shared_temporary_folder(environ)
    named = [url.identity, *(f"{name}={environ.get(name, '')}" for name in _FROM_ENVIRONMENT)]
    digest = hashlib.sha256("\0".join(named).encode()).hexdigest()
    return folder / f"store-{digest[:16]}"


def _shared_temporary_folder(environ: Mapping[str, str]) -> Path:
    folder = environ.get("TMPDIR") or tempfile.gettempdir()
    return Path(folder).absolute() / f"mcp-auth-proxy-{os.getuid() if hasattr(os, 'getuid') else 0}"


def _file(text: str, context: Context) -> Path:
    name = text.removeprefix("sqlite:///")
    if name == text or not name.strip("/") or name.endswith("/") or set(name) & set("?#\0"):
        raise ValueError(_FORMS)
    if name == ":memory:":
        raise ValueError("a store in memory would lose every login: use a file")
    return context.path(name)


def _postgresql(text: str, context: Context) -> PostgresqlUrl:
    found = _POSTGRESQL.fullmatch(text)
    if found is None or _PERCENT.search(text) or "\0" in unquote(text):
        raise ValueError(_SHAPE)
    parameters = [each.partition("=") for each in (found["parameters"] or "").split("&") if each]
    secrets = [found["password"], *(value for name, _, value in parameters if unquote(name) in _SECRET_PARAMETERS)]
    for secret in filter(None, secrets):
        secret_values.remember(secret, unquote(secret))
    _check(text)
    for name, value in ((unquote(name), unquote(value)) for name, _, value in parameters):
        if name == "sslkey" and ":" in value:
            # ENGINE:KEY: OpenSSL loads any library of that path, whose code runs.
            context.require_programs("has an sslkey with a colon, which loads a library")
        elif name == "sslkeylogfile":
            context.require_programs("has an sslkeylogfile, which is written to")
    # What says which database it is, without any secret.
    named = [f"{name}={value}" for name, _, value in parameters if unquote(name) not in _SECRET_PARAMETERS]
    shown = f"postgresql://{found['hosts']}{found['database'] or ''}"
    identity = "&".join([shown, found["user"] or "", *named])
    return PostgresqlUrl(text=text, shown=shown, identity=identity)


def _check(text: str) -> None:
    """Let the driver read the URL, as it will when it connects. Raises ValueError."""
    try:
        # Imported only for such a store: it costs 20 ms and some megabytes.
        from psycopg import ProgrammingError  # noqa: PLC0415
        from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415
    except ImportError:
        raise ValueError(f"PostgreSQL needs a driver that is not installed: {INSTALL}") from None
    try:
        conninfo_to_dict(text)
    except ProgrammingError as error:
        unknown = re.search(r'invalid URI query parameter: "(\w+)"', str(error))
        raise ValueError(f"libpq has no parameter {unknown[1]!r}" if unknown else _SHAPE) from None
