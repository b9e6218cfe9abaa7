"""A real PostgreSQL server for the tests: one cluster for all workers of a run, and a database for each test."""

import asyncio
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from mcp_auth_proxy.config.reader import Context
from mcp_auth_proxy.config.settings import KeySource, PostgresqlUrl, StoreSettings
from mcp_auth_proxy.config.store_url import read_store_url
from mcp_auth_proxy.store import open_store

BIN = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
PASSWORD = "pw-canary-4711-x"
"""The password of the role ``proxy``; the superuser needs none, through the socket."""

KEY = "cG9zdGdyZXNxbC1zdG9yZS1rZXktb2YtdGhlLXRlc3Q="
_TEMPLATE = "template_store"
_USERS = "users"
"""The file in the folder of a server with the ids of the processes that use it."""

_MEMORY, _DISK = Path("/dev/shm"), Path("/tmp")
"""Where the folder of a cluster may be. Short, since the path of a socket has at most 107 bytes."""

_ENOUGH = 4 * 2**30
"""Bytes free in memory for the clusters of a run to be there: a slow disk holds up every CREATE and DROP DATABASE."""

_DROP_TIMEOUT = 20
"""Seconds."""

_VARIABLE = "MCP_AUTH_PROXY_TEST_DATABASES"
_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "autovacuum": "off",
    "log_min_messages": "fatal",
    "max_wal_senders": "0",
    "wal_level": "minimal",
}
_HBA = """
local all postgres trust
local all all scram-sha-256
host all all 127.0.0.1/32 scram-sha-256
"""


@dataclass(slots=True)
class Server:
    """A running server. ``folder`` has its data and its socket."""

    folder: Path
    port: int
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def admin(self) -> str:
        """The URL of the superuser, through the socket."""
        return f"postgresql:///postgres?host={self.folder}&port={self.port}&user=postgres"

    def url(self, database: str, *, port: int | None = None, **parameters: str) -> str:
        """Return the URL by which the proxy's role uses a database, over TCP."""
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        return f"postgresql://proxy:{PASSWORD}@127.0.0.1:{port or self.port}/{database}{'?' * bool(query)}{query}"

    def execute(self, sql: str, *, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement as the superuser."""
        url = self.admin.replace(":///postgres?", f":///{database}?")
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def drop(self, database: str) -> bool:
        """Delete a database, or leave it to the removal of the cluster if that takes too long; return which.

        It waits for every process of the server, also for one that waits for the rest of a client's login.
        """
        with psycopg.connect(self.admin, autocommit=True) as connection:
            connection.execute(f"SET statement_timeout = '{_DROP_TIMEOUT}s'".encode())
            try:
                connection.execute(f'DROP DATABASE "{database}" WITH (FORCE)'.encode())
            except psycopg.errors.QueryCanceled:
                return False
        return True

    def start(self) -> None:
        """Start the server, and wait until it takes connections."""
        options = {**_SETTINGS, **self.settings, "port": str(self.port), "unix_socket_directories": str(self.folder)}
        text = " ".join(f"-c {name}={value}" for name, value in options.items())
        _run("pg_ctl", "-D", self.data, "-w", "-t", "60", "-l", self.folder / "log", "-o", text, "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: ``fast`` ends its connections, ``immediate`` is like a power cut."""
        _run("pg_ctl", "-D", self.data, "-w", "-t", "60", "-m", mode, "stop")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all processes of the server with SIGSTOP, and let them go on afterwards."""
        processes = self.processes()
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)

    def processes(self) -> list[int]:
        """Return the ids of the postmaster, first, and of what it has started."""
        postmaster = int((self.data / "postmaster.pid").read_text().split("\n")[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text()
        return [postmaster, *map(int, children.split())]

    @property
    def data(self) -> Path:
        """The folder of the cluster."""
        return self.folder / "data"


def program(name: str) -> str:
    """Return the path of one of PostgreSQL's programs."""
    return shutil.which(name, path=os.pathsep.join([*map(str, BIN), os.environ.get("PATH", os.defpath)])) or name


def make_server(*, on_disk: bool = False, **settings: str) -> Server:
    """Make a cluster in a folder of its own, with the role ``proxy``, and start it. ``remove_server`` ends it.

    It is in memory if there is enough of it, unless ``on_disk``.
    """
    _remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir=_DISK if on_disk else _place()))
    user = _user()
    if user is not None:
        os.chown(folder, user, -1)
    folder.chmod(0o755)
    (folder / _USERS).write_text(str(os.getpid()))
    _run("initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
    (folder / "data/pg_hba.conf").write_text(_HBA)
    server = Server(folder, _free_port(), settings)
    server.start()
    server.execute(f"CREATE ROLE proxy LOGIN PASSWORD '{PASSWORD}'")
    return server


def remove_server(server: Server) -> None:
    """End a server by its process ids, and delete its folder."""
    with contextlib.suppress(subprocess.CalledProcessError):
        server.stop("immediate")
    shutil.rmtree(server.folder, ignore_errors=True)


def _place() -> Path:
    with contextlib.suppress(OSError):
        if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _ENOUGH:
            return _MEMORY
    return _DISK


def _remove_leftovers() -> None:
    """End the servers of runs that were killed: none of the processes that used them is there any more."""
    for users in itertools.chain.from_iterable(place.glob(f"pg-*/{_USERS}") for place in (_MEMORY, _DISK)):
        with contextlib.suppress(OSError):
            if not any(Path(f"/proc/{user}").exists() for user in users.read_text().split()):
                remove_server(Server(users.parent, 0))


@contextmanager
def shared_server(folder: Path) -> Iterator[Server]:
    """Use the server that all processes with this folder share: the first makes it, the last one removes it."""
    state = folder / "postgresql.json"
    with _locked(folder):
        if state.exists():
            found = json.loads(state.read_text())
            server, users = Server(Path(found["folder"]), found["port"]), found["users"]
        else:
            server, users = make_server(), []
            _make_template(server)
        _write(state, server, [*users, os.getpid()])
    try:
        yield server
    finally:
        with _locked(folder):
            users = json.loads(state.read_text())["users"]
            users.remove(os.getpid())
            # Some may have been killed.
            users = [user for user in users if Path(f"/proc/{user}").exists()]
            if users:
                _write(state, server, users)
            else:
                remove_server(server)
                state.unlink()


@contextmanager
def databases(server: Server) -> Iterator[None]:
    """Let ``settings_of`` return databases of a server, in this process and in those that it starts; delete them."""
    prefix = f"t{os.getpid()}_"
    os.environ[_VARIABLE] = json.dumps([str(server.folder), server.port, prefix])
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        for (name,) in server.execute(f"SELECT datname FROM pg_database WHERE starts_with(datname, '{prefix}')"):
            # If one can't be dropped now, none can.
            if not server.drop(name):
                break


def database_url(folder: Path) -> str | None:
    """Return the URL of the database that stands for a folder, made if it is new; None outside of ``databases``."""
    given = os.environ.get(_VARIABLE)
    if given is None:
        return None
    place, port, prefix = json.loads(given)
    server = Server(Path(place), port)
    name = prefix + hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    with contextlib.suppress(psycopg.errors.DuplicateDatabase):
        server.execute(f'CREATE DATABASE "{name}" OWNER proxy TEMPLATE {_TEMPLATE} STRATEGY file_copy')
    return server.url(name)


def write_key(folder: Path) -> Path:
    """Write the key that the template of all databases was made with; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "postgresql.key"
    path.write_text(KEY)
    path.chmod(0o600)
    return path


def settings_of(folder: Path) -> StoreSettings | None:
    """Return the settings of the database that stands for a folder; None outside of ``databases``."""
    url = database_url(folder)
    return None if url is None else settings_for(url, folder)


def section_of(folder: Path) -> dict[str, object] | None:
    """Return the section ``store`` for the database that stands for a folder; None outside of ``databases``."""
    url = database_url(folder)
    return None if url is None else {"url": url, "keys": [f"file:{write_key(folder)}"]}


def settings_for(url: str, folder: Path) -> StoreSettings:
    """Return the settings of a store in a database, with the key of the template."""
    found = read_store_url(url, Context(os.environ, folder))
    assert isinstance(found, PostgresqlUrl)
    key = KeySource(kind="file", name=str(write_key(folder)))
    return StoreSettings(path=folder / "run" / "store", postgresql=found, keys=(key,), keys_named=True)


def _make_template(server: Server) -> None:
    async def make(folder: Path) -> None:
        await (await open_store(settings_for(server.url(_TEMPLATE), folder))).close()

    server.execute(f"CREATE DATABASE {_TEMPLATE} OWNER proxy")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(make(Path(folder)))


def _write(state: Path, server: Server, users: list[int]) -> None:
    (server.folder / _USERS).write_text(" ".join(map(str, users)))
    state.write_text(json.dumps({"folder": str(server.folder), "port": server.port, "users": users}))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "postgresql.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: str, *arguments: object) -> None:
    # initdb and postgres refuse root.
    subprocess.run(
        [program(command), *map(str, arguments)],
        check=True,
        user=_user(),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=90,
    )


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _user() -> int | None:
    return pwd.getpwnam("postgres").pw_uid if os.geteuid() == 0 else None
