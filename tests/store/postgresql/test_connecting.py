"""How a server is named and proven, as users of libpq expect; and what is said if it lets nobody in."""

import asyncio
import contextlib
import gc
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from fakes.postgresql import PASSWORD, Server, make_server, remove_server, settings_for
from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.postgresql import connection as connection_module
from mcp_auth_proxy.store.postgresql.clock import ServerClock
from mcp_auth_proxy.store.postgresql.pool import Pool

pytestmark = pytest.mark.postgresql


@pytest.fixture
def plain(postgresql_server: Server, empty: StoreSettings, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, and an environment that names none."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PGPASSFILE", os.devnull)
    return postgresql_server


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a certificate of its own for 127.0.0.1, which is in ``server.crt`` of its folder."""
    server = make_server()
    try:
        key, certificate = server.data / "server.key", server.data / "server.crt"
        subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
        command = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
            *subject,
        ]
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        for file in (key, certificate):
            os.chown(file, server.data.stat().st_uid, -1)
            file.chmod(0o600)
        server.stop()
        server.settings = {"ssl": "on"}
        server.start()
        server.execute("CREATE DATABASE store OWNER proxy")
        yield server
    finally:
        remove_server(server)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Nothing is closed because the garbage collector happens to run."""
    gc.disable()
    yield
    gc.enable()


def name_of(settings: StoreSettings) -> str:
    assert settings.postgresql is not None
    return settings.postgresql.text.rpartition("/")[2]


async def opens(url: str, folder: Path) -> None:
    engine = await open_store(settings_for(url, folder))
    assert await engine.changed()
    await engine.close()


async def error(url: str, folder: Path, *, patience: float = 20.0) -> str:
    """Return what is said at once, though there is time to try again."""
    began = time.monotonic()
    with pytest.raises(StoreUnavailable) as caught:
        await open_store(settings_for(url, folder), patience=patience)
    assert time.monotonic() - began < patience - 5
    assert PASSWORD not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_a_password_in_the_url(plain: Server, empty: StoreSettings, tmp_path: Path) -> None:
    await opens(plain.url(name_of(empty)), tmp_path)


async def test_nothing_in_the_url_and_all_in_the_environment(
    plain: Server, empty: StoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"PGHOST": "127.0.0.1", "PGPORT": str(plain.port), "PGUSER": "proxy", "PGDATABASE": name_of(empty)}
    for name, value in {**given, "PGPASSWORD": PASSWORD}.items():
        monkeypatch.setenv(name, value)
    await opens("postgresql://", tmp_path)


@pytest.mark.parametrize("variable", ["PGPASSFILE", "HOME"])
async def test_a_password_file(
    plain: Server, empty: StoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    file = tmp_path / ".pgpass"
    file.write_text(f"127.0.0.1:{plain.port}:*:proxy:{PASSWORD}\n")
    file.chmod(0o600)
    monkeypatch.delenv("PGPASSFILE")
    monkeypatch.setenv(variable, str(file if variable == "PGPASSFILE" else tmp_path))
    await opens(f"postgresql://proxy@127.0.0.1:{plain.port}/{name_of(empty)}", tmp_path)


async def test_a_service(plain: Server, empty: StoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["[store]", "host=127.0.0.1", f"port={plain.port}", "user=proxy", f"dbname={name_of(empty)}"]
    (tmp_path / "services").write_text("\n".join([*lines, f"password={PASSWORD}\n"]))
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    await opens("postgresql://?service=store", tmp_path)
    assert "nothing" in await error("postgresql://?service=nothing", tmp_path)
    monkeypatch.setenv("PGSERVICE", "store")
    await opens("postgresql://", tmp_path)


async def test_a_socket(plain: Server, empty: StoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    folder = str(plain.folder).replace("/", "%2F")
    await opens(f"postgresql://proxy@{folder}:{plain.port}/{name_of(empty)}", tmp_path)
    await opens(f"postgresql:///{name_of(empty)}?host={plain.folder}&port={plain.port}&user=proxy", tmp_path)


async def test_a_wrong_password_is_not_tried_again(plain: Server, empty: StoreSettings, tmp_path: Path) -> None:  # T91
    url = plain.url(name_of(empty)).replace(PASSWORD, "wrong-canary-9922")
    found = await error(url, tmp_path)
    assert 'password authentication failed for user "proxy"' in found
    assert "wrong-canary" not in found
    assert "no password supplied" in await error(url.replace(":wrong-canary-9922", ""), tmp_path)


async def test_an_unknown_database_or_role_is_not_tried_again(plain: Server, tmp_path: Path) -> None:
    assert 'database "nothing" does not exist' in await error(plain.url("nothing"), tmp_path)
    plain.execute("CREATE ROLE guest")
    try:
        url = plain.url("postgres").replace("proxy:", "nobody:")
        assert "nobody" in await error(url, tmp_path)
    finally:
        plain.execute("DROP ROLE guest")


async def test_a_server_without_tls_is_not_tried_again(plain: Server, empty: StoreSettings, tmp_path: Path) -> None:
    assert "SSL" in await error(plain.url(name_of(empty), sslmode="require"), tmp_path)


async def test_tls_is_used_and_its_certificate_checked_as_asked(tls_server: Server, tmp_path: Path) -> None:
    certificate = tmp_path / "root.crt"
    certificate.write_bytes((tls_server.data / "server.crt").read_bytes())
    url = tls_server.url("store", sslmode="require")
    await opens(url, tmp_path)
    with psycopg.connect(url) as connection:
        assert connection.pgconn.ssl_in_use
    await opens(tls_server.url("store", sslmode="verify-full", sslrootcert=str(certificate)), tmp_path)
    found = await error(tls_server.url("store", sslmode="verify-full", sslrootcert="system"), tmp_path)
    assert "certificate" in found
    other = tls_server.url("store", sslmode="verify-full", sslrootcert=str(certificate)).replace(
        "@127.0.0.1", "@localhost"
    )
    assert "localhost" in await error(other, tmp_path)


async def test_a_server_that_comes_late_is_waited_for(
    tmp_path: Path, own_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    own_server.stop()
    opening = asyncio.create_task(open_store(settings_for(own_server.url("store"), tmp_path), patience=20))
    while "It is tried again for 20 seconds" not in caplog.text:
        await asyncio.sleep(0.01)
        assert not opening.done()
    await asyncio.to_thread(own_server.start)
    await (await opening).close()
    assert len([line for line in caplog.records if "tried again" in line.getMessage()]) == 1
    assert PASSWORD not in caplog.text


async def test_a_server_that_never_comes_is_given_up(tmp_path: Path, own_server: Server) -> None:
    own_server.stop()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="can't be reached"):
        await open_store(settings_for(own_server.url("store"), tmp_path), patience=2)
    assert 0.5 < time.monotonic() - began < 6
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="can't be reached"):
        await open_store(settings_for(own_server.url("store"), tmp_path))
    assert time.monotonic() - began < 1


async def test_a_password_that_is_changed_later_is_no_reason_to_end(own_server: Server, tmp_path: Path) -> None:
    engine = await open_store(settings_for(own_server.url("store"), tmp_path))
    try:
        own_server.execute("ALTER ROLE proxy PASSWORD 'another-4711-canary'")
        own_server.stop()
        own_server.start()
        with pytest.raises(StoreUnavailable, match="password authentication failed"):
            await engine.fetch_all("SELECT 1 AS one")
        own_server.execute(f"ALTER ROLE proxy PASSWORD '{PASSWORD}'")
        async with asyncio.timeout(10):
            while True:
                # There is a pause after a failure.
                with contextlib.suppress(StoreUnavailable):
                    assert await engine.fetch_all("SELECT 1 AS one") == [{"one": 1}]
                    break
                await asyncio.sleep(0.05)
    finally:
        await engine.close()


@pytest.mark.parametrize("why", ["cancelled", "too slow"])
async def test_a_login_that_is_given_up_ends_at_once(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_collection: None
) -> None:
    """The server waits a minute for the rest of it, and meanwhile neither makes nor drops a database."""
    asked = asyncio.Event()
    ended = asyncio.Event()

    async def offer_scram(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(4))
        await reader.readexactly(size - 4)
        method = (10).to_bytes(4) + b"SCRAM-SHA-256\0\0"
        writer.write(b"R" + (len(method) + 4).to_bytes(4) + method)
        await reader.readexactly(5)
        asked.set()
        try:
            with contextlib.suppress(ConnectionError):
                while await reader.read(1000):
                    pass
            ended.set()
        finally:
            writer.close()

    monkeypatch.setattr(connection_module, "CONNECT_TIMEOUT", 30.0 if why == "cancelled" else 1.0)
    async with await asyncio.start_server(offer_scram, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"postgresql://proxy:{PASSWORD}@127.0.0.1:{port}/store?sslmode=disable"
        settings = settings_for(url, tmp_path)
        assert settings.postgresql is not None
        pool = Pool(settings.postgresql, ServerClock())
        connecting = asyncio.create_task(pool.connect())
        await asyncio.wait_for(asked.wait(), 10)
        if why == "cancelled":
            connecting.cancel()
        # The error is kept: by the pool, or by whoever waited for the task.
        (found,) = await asyncio.gather(connecting, return_exceptions=True)
        assert isinstance(found, BaseException)
        await asyncio.wait_for(ended.wait(), 5)
