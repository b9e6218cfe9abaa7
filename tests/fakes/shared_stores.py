"""The stores that several processes can share, one of each engine, as the section ``store`` of a configuration."""

import base64
import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fakes.postgresql import Server

Section = Mapping[str, object]

_numbers = itertools.count(1)


@contextmanager
def database_of(server: Server, folder: Path, *, port: int | None = None) -> Iterator[Section]:
    """Make a database for the block, and a store key in ``folder``. ``port``: through which the server is reached."""
    name = f"replicas_{os.getpid()}_{next(_numbers)}"
    server.execute(f"CREATE DATABASE {name} OWNER proxy")
    key = folder / "shared.key"
    key.write_bytes(base64.b64encode(os.urandom(32)) + b"\n")
    key.chmod(0o600)
    try:
        yield {"url": server.url(name, port=port), "keys": [f"file:{key}"]}
    finally:
        server.drop(name)
