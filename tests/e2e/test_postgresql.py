"""The program on a store in PostgreSQL: what it says, and what goes on while the server is away."""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psycopg
import pytest

from fakes import postgresql
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.postgresql import PASSWORD, Server, write_key
from fakes.proxy import link_in, proxy_process, run_command, start_command, write_config
from fakes.replicas import free_ports
from fakes.shared_stores import Section, database_of
from mcp_auth_proxy.app import lifespan
from mcp_auth_proxy.broker.made_servers import MadeServers
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.settings import Address
from mcp_auth_proxy.errors import StoreUnavailable

pytestmark = pytest.mark.postgresql


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server of this test alone, which it may stop and freeze."""
    server = postgresql.make_server()
    try:
        server.execute("CREATE DATABASE store OWNER proxy")
        yield server
    finally:
        postgresql.remove_server(server)


def config(folder: Path, url: str, upstream: str = "https://notes.example/mcp", **sections: object) -> Path:
    store = {"url": url, "keys": [f"file:{write_key(folder)}"]}
    return write_config(folder, {"notes": upstream}, store=store, **sections)  # type: ignore[arg-type]


async def became(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.05)


async def test_live_tokens_go_on_while_the_server_is_away(servers: Servers, own_server: Server, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    env = {"STORE_URL": own_server.url("store"), "XDG_RUNTIME_DIR": str(tmp_path)}
    file = config(tmp_path, "env:STORE_URL", upstream.url)
    shown = f"postgresql://127.0.0.1:{own_server.port}/store"
    async with proxy_process(file, env=env) as proxy, proxy.client("notes") as client:
        assert shown in proxy.out
        assert "the API is off" in proxy.err
        await consent(link_in((await client.call("echo")).message))
        assert (await client.call("echo", text="in")).text == "in"

        async with httpx2.AsyncClient(base_url=proxy.origin) as http:

            async def ready() -> int:
                return (await http.get("/readyz", timeout=30)).status_code

            assert await ready() == 200
            await asyncio.to_thread(own_server.stop, "immediate")
            assert await ready() == 503
            assert (await client.call("echo", text="on")).text == "on"
            before = issuer.refreshes
            issuer.end_access_tokens()
            assert (await client.call("echo", text="no")).message
            assert issuer.refreshes == before
            await asyncio.to_thread(own_server.start)
            deadline = time.monotonic() + 20
            while await ready() != 200:
                assert time.monotonic() < deadline
            while (await client.call("echo", text="again")).text != "again":
                assert time.monotonic() < deadline
                await asyncio.sleep(0.2)
            assert issuer.refreshes == before + 1
        code, out, err = await run_command("status", "--json", "--config", str(file), env=env)
        assert (code, '"connected"' in out or '"active"' in out) == (0, True), err
        # The commands beside it find the proxy by its lock in the run folder.
        code, out, err = await run_command("dashboard", "--config", str(file), env=env)
        assert (code, out.startswith(proxy.origin)) == (0, True), err
        log = proxy.log
    assert PASSWORD not in log + out + err


@pytest.mark.parametrize("returns", [True, False])
async def test_a_server_that_is_lost_while_the_proxy_starts_is_waited_for(
    own_server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    returns: bool,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("mcp_auth_proxy.app.STORE_PATIENCE", 20.0 if returns else 2.5)
    settings = load(config(tmp_path, own_server.url("store")), environ={})
    reload = MadeServers.reload
    losses: list[asyncio.Task[None] | None] = []

    async def lost(made: MadeServers) -> None:
        """Lose the server after the store was opened, the first time."""
        if not losses:
            await asyncio.to_thread(own_server.stop, "immediate")
            losses.append(asyncio.create_task(asyncio.to_thread(own_server.start)) if returns else None)
        await reload(made)

    monkeypatch.setattr(MadeServers, "reload", lost)
    starting = lifespan(settings, Address("127.0.0.1", 1))
    if returns:
        async with starting as application:
            assert not await application.database.fetch_all("SELECT uid FROM grants")
        assert "It is tried again for" in caplog.text
    else:
        with pytest.raises(StoreUnavailable, match="can't be reached"):
            await starting.__aenter__()
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize("command", [("serve",), ("status",), ("api-keys", "create", "anna")])
async def test_a_refused_password_is_one_line_at_once(
    postgresql_server: Server, tmp_path: Path, command: tuple[str, ...]
) -> None:
    url = postgresql_server.url("postgres").replace(PASSWORD, "wrong-canary-9922")
    file = config(tmp_path, url)
    began = time.monotonic()
    code, out, err = await run_command(*command, "--config", str(file), env={"XDG_RUNTIME_DIR": str(tmp_path)})
    assert time.monotonic() - began < 20
    assert code == 1
    (line,) = [line for line in err.splitlines() if "password authentication failed" in line]
    assert "postgresql://127.0.0.1" in line
    assert "canary" not in out + err


IMPATIENT = """
import mcp_auth_proxy.app as app
app.STORE_PATIENCE = 3.0
from mcp_auth_proxy.cli.main import main
main()
"""


async def test_a_server_that_is_away_at_the_start_is_waited_for_and_then_given_up(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    file = config(tmp_path, f"postgresql://proxy:{PASSWORD}@127.0.0.1:{port}/store")
    options, env = ("serve", "--config", str(file)), {"XDG_RUNTIME_DIR": str(tmp_path)}
    waiting = await start_command(*options, env=env)
    assert waiting.stderr is not None
    async with asyncio.timeout(20):
        line = ""
        while "tried again" not in line:
            line = (await waiting.stderr.readline()).decode()
    assert f"The store postgresql://127.0.0.1:{port}/store can't be reached" in line
    assert "It is tried again for 30 seconds" in line
    begun_at = time.monotonic()
    waiting.terminate()
    _, rest = await waiting.communicate()
    assert time.monotonic() - begun_at < 5, "nobody has to wait for the end of it"
    # The same, but it waits for less time.
    given_up = await start_command(*options, env=env, program=(sys.executable, "-c", IMPATIENT))
    out, err = await given_up.communicate()
    assert (given_up.returncode, out) == (1, b"")
    _, told, last = err.decode().splitlines()
    assert "It is tried again for 3 seconds" in told
    assert last.startswith(f"error: The store postgresql://127.0.0.1:{port}/store can't be reached")
    assert PASSWORD not in line + rest.decode() + err.decode()


@pytest.fixture
def store(postgresql_server: Server, tmp_path: Path) -> Iterator[Section]:
    with database_of(postgresql_server, tmp_path) as section:
        yield section


@pytest.mark.parametrize(
    ("sql", "says", "expected"),
    [
        ("CREATE TABLE songs (title text)", "has tables of another program in the schema public", 1),
        ("UPDATE mcp_auth_proxy_store SET version = version + 1", "by a newer version", 1),
        ("", "Wrong key: ", 2),
    ],
    ids=["foreign", "newer", "wrong key"],
)
async def test_each_command_says_in_one_line_what_is_wrong_and_changes_nothing(
    store: Section, tmp_path: Path, sql: str, says: str, expected: int
) -> None:
    url = str(store["url"])
    file, env = write_config(tmp_path, {"a": "http://127.0.0.1:9/mcp"}, store=store), {"XDG_RUNTIME_DIR": str(tmp_path)}
    if "songs" not in sql:
        code, _, err = await run_command("principals", "add", "anna", "--config", str(file), env=env)
        assert code == 0, err
    if sql:
        with psycopg.connect(url) as database:
            database.execute(sql.encode())
    else:
        others = {**store, "keys": [f"file:{write_key(tmp_path)}"]}
        write_config(tmp_path, {"a": "http://127.0.0.1:9/mcp"}, store=others)
    before = tables(url)
    commands = (["status"], ["keys", "list"], ["serve", "--listen", "127.0.0.1:0"])
    done = await asyncio.gather(*(run_command(*words, "--config", str(file), env=env) for words in commands))
    for words, (code, out, err) in zip(commands, done, strict=True):
        assert (code, out, len(err.splitlines())) == (expected, "", 1), (words, err)
        assert says in err, words
        assert PASSWORD not in err
    assert tables(url) == before


def tables(url: str) -> list[tuple[object, ...]]:
    """Return each table of a database, with the place of its last change."""
    with psycopg.connect(url) as database:
        sql = "SELECT relname, relfilenode FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
        found = database.execute(sql).fetchall()
        if any(name == "meta" for name, _ in found):
            found += database.execute("SELECT name, xmin::text FROM meta ORDER BY 1").fetchall()
    return found


async def test_keys_that_are_missing_and_a_url_that_is_wrong_are_errors_of_the_configuration(tmp_path: Path) -> None:
    file = write_config(tmp_path, {"notes": "https://notes.example/mcp"})
    text = file.read_text()
    file.write_text(text.replace("sqlite:///proxy.db", "postgresql://proxy:canary-7788@db.example/store"))
    done = await asyncio.gather(*(run_command(it, "--config", str(file)) for it in ("check", "serve", "status")))
    said = "".join(out + err for _, out, err in done)
    assert [(code, err.count("store.keys")) for code, _, err in done] == [(2, 1)] * 3, said
    file.write_text(text.replace("sqlite:///proxy.db", "postgresql://proxy:canary@7788@db.example/store"))
    code, out, err = await run_command("check", "--config", str(file))
    assert code == 2
    assert "store.url" in err
    assert "7788" not in said + out + err
