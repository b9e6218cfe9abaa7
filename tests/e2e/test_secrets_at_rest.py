"""Secrets in logs, answers and files; stores that are damaged, foreign, read-only or locked."""

import asyncio
import os
import resource
import signal
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import Browser, consent
from fakes.http_exchange import FakeResponse, RecordedRequest
from fakes.mcp_client import McpResponse, PlainClient
from fakes.proxy import ProxyProcess, link_in, proxy_process, run_command, running_proxy, until, write_config

SECRET = "client-secret-canary/+"
UNHELD = {"wait": "0s"}


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    """The same without SQLite's index of the log: shared memory that is rebuilt after a crash."""
    return {name: content for name, content in files(folder).items() if not name.endswith("-shm")}


def found(secrets: set[str], text: bytes) -> list[str]:
    return [secret for secret in secrets if secret.encode() in text]


async def log_in(client: PlainClient) -> None:
    page = await consent(link_in((await client.call("echo")).message))
    assert page.status_code == 200, page.text
    assert (await client.call("echo", text="in")).text == "in"


# logs, answers, files


def talkative(issuer: FakeAuthorizationServer) -> Callable[[RecordedRequest], FakeResponse | None]:
    """Repeat everything that was sent in the errors."""

    def refuse(received: RecordedRequest) -> FakeResponse | None:
        said = " ".join(f"{name}={value}" for name, value in received.form.items())
        return FakeResponse.json({"error": "invalid_grant", "error_description": said}, 400)

    return refuse


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_no_secret_is_logged_shown_or_stored_in_clear(  # T45
    servers: Servers, tmp_path: Path, log_format: str
) -> None:
    dynamic = await servers.authorization_server(auto_consent=True)
    by_hand = await servers.authorization_server(auto_consent=True)
    upstreams = {"dynamic": await servers.mcp_server(dynamic), "byhand": await servers.mcp_server(by_hand)}
    store = tmp_path / "store"
    store.mkdir()
    (tmp_path / "client-secret").write_text(SECRET)
    oauth = {"client_id": "by-hand", "client_secret": f"file:{tmp_path}/client-secret"}
    config = write_config(
        store,
        {"dynamic": upstreams["dynamic"].url, "byhand": {"url": upstreams["byhand"].url, "oauth": oauth}},
        authorization=UNHELD,
    )
    replies: list[McpResponse] = []
    pages: list[str] = []
    async with proxy_process(config, "--log-level", "debug", "--log-format", log_format) as proxy:
        by_hand.add_client(client_id="by-hand", secret=SECRET, redirect_uris=(f"{proxy.origin}/oauth/callback",))
        for name, issuer in (("dynamic", dynamic), ("byhand", by_hand)):
            async with proxy.client(name) as client, Browser() as browser:
                replies += [first := await client.call("echo")]
                callback = await browser.stop_before(link_in(first.message))
                async with Browser() as other:
                    pages += [(await other.follow(callback)).text]
                pages += [(await browser.follow(callback)).text, (await browser.follow(callback)).text]
                replies += [await client.call("echo", text="in")]
                issuer.end_access_tokens()
                replies += [await client.call("echo", text="renewed")]
                issuer.answers["token"] = talkative(issuer)
                issuer.end_access_tokens()
                replies += [again := await client.call("echo")]
                pages += [(await browser.follow(link_in(again.message))).text]
                replies += [await client.call("echo")]
        canaries = dynamic.secrets() | by_hand.secrets()
        kinds = ("at-", "rt-")
        assert all(any(secret.startswith(kind) for secret in canaries) for kind in kinds)
        assert SECRET in canaries
        assert any(name.endswith("-wal") for name in files(store))
        for name, content in files(store).items():
            assert not found(canaries, content), name
        code, out, err = await run_command("status", "--json", "--config", str(config))
        assert code == 0
        for name in ("dynamic", "byhand"):
            logout = await run_command("logout", name, "--config", str(config))
            out += logout[1] + logout[2]
        assert await proxy.stop() == 0
    for name, content in files(store).items():
        assert not found(canaries, content), name
    assert not found(canaries, proxy.log.encode())
    assert not found(canaries, (out + err).encode())
    assert not found(canaries, "".join(pages).encode())
    assert not found(canaries, b"".join(reply.body for reply in replies))
    assert "renewed the grant" in proxy.log


QUERY = "k=query-canary-1&flag-canary-2&v=canary-3"


async def test_query_values_of_a_server_url_are_never_shown(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    good = await servers.mcp_server(issuer)
    down = await servers.mcp_server(issuer, metadata_answer=FakeResponse.html("down", 503))
    foreign = await servers.mcp_server(issuer, metadata_changes={"resource": "https://other.example/mcp"})
    web = await servers.mcp_server(protected=False, intercept=lambda _: FakeResponse.html("a web page", 404))
    bare = await servers.mcp_server(issuer, metadata_at=set())
    upstreams = {"good": good, "down": down, "foreign": foreign, "web": web, "bare": bare}
    urls = {name: f"{upstream.url}?{QUERY}" for name, upstream in upstreams.items()}
    config = write_config(tmp_path, urls, authorization=UNHELD)
    said = []
    async with proxy_process(config, "--log-level", "debug") as proxy:
        async with proxy.client("good") as client:
            await log_in(client)
        for name in ("down", "foreign", "web"):
            async with proxy.client(name) as client:
                said.append((await client.call("echo")).body.decode())
        assert await proxy.stop() == 0
        said.append(proxy.log)
    for command in (["status"], ["status", "--json"], ["login", "web"], ["login", "down"]):
        said += (await run_command(*command, "--config", str(config)))[1:]
    for name in upstreams:
        for form in ([], ["--json"]):
            said += (await run_command("doctor", name, "--config", str(config), *form))[1:]
    assert all(request.query_string == QUERY for request in good.calls())
    assert [text for text in said if "canary" in text] == []
    assert f"{good.url}?k=****&****&v=****" in proxy.out


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


async def test_every_file_is_private_whatever_the_umask(servers: Servers, tmp_path: Path) -> None:  # T46
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    config = write_config(
        tmp_path, {"notes": upstream.url}, authorization=UNHELD, store={"url": "sqlite:///new/folder/proxy.db"}
    )
    with umask(0):
        async with proxy_process(config) as proxy, proxy.client("notes") as client:
            await log_in(client)
            made = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
            assert {path.suffix for path in made} >= {".db", ".db-wal", ".key"}
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made}
            assert set(modes.values()) == {0o600}, modes
            assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


async def test_swapped_values_fail_without_affecting_others(servers: Servers, tmp_path: Path) -> None:  # T47
    issuer = await servers.authorization_server(auto_consent=True)
    upstreams = {name: await servers.mcp_server(issuer) for name in ("one", "two", "three")}
    config = {name: upstream.url for name, upstream in upstreams.items()}
    async with running_proxy(tmp_path, dict(config), authorization=UNHELD) as proxy:
        for name in config:
            async with proxy.client(name) as client:
                await log_in(client)
    tokens = {name: upstream.bearers[-1] for name, upstream in upstreams.items()}
    with sqlite3.connect(tmp_path / "proxy.db") as store:
        sealed = dict(store.execute("SELECT server, access_token FROM grants").fetchall())
        swap = [(sealed["two"], "one"), (sealed["one"], "two")]
        store.executemany("UPDATE grants SET access_token = ? WHERE server = ?", swap)
    store.close()
    async with running_proxy(tmp_path, dict(config), authorization=UNHELD) as proxy:
        async with proxy.client("three") as client:
            assert (await client.call("echo", text="in")).text == "in"
        for name in ("one", "two"):
            async with proxy.client(name) as client:
                await log_in(client)
    assert tokens["two"] not in upstreams["one"].bearers
    assert tokens["one"] not in upstreams["two"].bearers


# stores that must not be touched


def other_key(folder: Path) -> None:
    (folder / "proxy.key").write_text("A" * 43 + "=\n")


def no_key(folder: Path) -> None:
    (folder / "proxy.key").write_text("not a key\n")


def missing_key(folder: Path) -> None:
    (folder / "proxy.key").unlink()


def truncated(folder: Path) -> None:
    content = (folder / "proxy.db").read_bytes()
    (folder / "proxy.db").write_bytes(content[: len(content) // 2 + 7])


def empty(folder: Path) -> None:
    (folder / "proxy.db").write_bytes(b"")


def text_file(folder: Path) -> None:
    (folder / "proxy.db").write_text("dear diary " * 1000)


def foreign(folder: Path) -> None:
    (folder / "proxy.db").unlink()
    with sqlite3.connect(folder / "proxy.db") as store:
        store.execute("CREATE TABLE songs (title TEXT)")
    store.close()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL], ids=["closed", "killed"])
@pytest.mark.parametrize(
    ("damage", "word", "exit_code"),
    [
        (other_key, "key", 2),
        (no_key, "key", 2),
        (missing_key, "key", 2),
        (truncated, "damaged", 1),
        (empty, "cut off", 1),
        (text_file, "SQLite", 1),
        (foreign, "another program", 1),
    ],
)
async def test_a_store_that_is_not_ours_is_left_as_it_is(  # T48
    servers: Servers,
    tmp_path: Path,
    damage: Callable[[Path], None],
    word: str,
    exit_code: int,
    sign: signal.Signals,
) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization=UNHELD)
    async with proxy_process(config) as proxy, proxy.client("notes") as client:
        await log_in(client)
        await proxy.stop(sign)
    damage(tmp_path)
    before = contents(tmp_path)
    code, _, err = await run_command("serve", "--config", str(config), "--listen", "127.0.0.1:0")
    assert code == exit_code
    assert len(err.strip().splitlines()) == 1, err
    assert word in err
    assert contents(tmp_path) == before


# stores that can't be written


async def ready(proxy: ProxyProcess) -> httpx2.Response:
    async with httpx2.AsyncClient(trust_env=False, timeout=20) as client:
        return await client.get(f"{proxy.origin}/readyz")


def limit_files(proxy: ProxyProcess, size: int) -> None:
    """As on a full disk: no write succeeds beyond this many bytes of a file. Works for root too."""
    pid = proxy.process.pid
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


async def test_with_a_read_only_store_valid_tokens_are_used_and_none_is_renewed(  # F8
    servers: Servers, tmp_path: Path
) -> None:
    issuer = await servers.authorization_server(auto_consent=True, token_seconds=4.0)
    upstream = await servers.mcp_server(issuer)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization=UNHELD)
    async with proxy_process(config) as proxy, proxy.client("notes") as client:
        await log_in(client)
        limit_files(proxy, 0)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while loop.time() - begun < 3.5:
            assert (await client.call("echo", text="good")).text == "good"
            await asyncio.sleep(0.1)
        assert issuer.refreshes == 0
        assert (await ready(proxy)).status_code == 503
        issuer.end_access_tokens()
        reply = await client.call("echo")
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert "store" in reply.error["message"]
        assert issuer.refreshes == 0
        limit_files(proxy, resource.RLIM_INFINITY)
        assert (await ready(proxy)).status_code == 200
        await until_answered(client)
        assert (issuer.refreshes, issuer.authorizations) == (1, 1)


async def until_answered(client: PlainClient) -> None:
    for _ in range(100):
        if (await client.call("echo", text="back")).message.get("result", {}).get("isError") is False:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("it did not come back")


async def test_a_locked_store_is_reported_after_a_wait_and_valid_tokens_still_work(  # F11
    servers: Servers, tmp_path: Path
) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization=UNHELD)
    async with proxy_process(config) as proxy, proxy.client("notes") as client:
        await log_in(client)
        lock = sqlite3.connect(tmp_path / "proxy.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        assert {(await client.call("echo", text="good")).text for _ in range(20)} == {"good"}
        issuer.end_access_tokens()
        async with asyncio.timeout(10):
            replies = await asyncio.gather(*(client.call("echo") for _ in range(5)))
        for reply in replies:
            assert reply.status == 503
            assert int(reply.headers["retry-after"]) >= 1
            assert "store" in reply.error["message"]
        assert issuer.refreshes == 0
        lock.execute("ROLLBACK")
        lock.close()
        await until_answered(client)
        assert (issuer.refreshes, issuer.authorizations) == (1, 1)


async def test_a_short_lock_is_not_noticed(servers: Servers, tmp_path: Path) -> None:  # F11
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization=UNHELD)
    async with proxy_process(config) as proxy, proxy.client("notes") as client:
        await log_in(client)
        lock = sqlite3.connect(tmp_path / "proxy.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        issuer.end_access_tokens()
        sent = len(upstream.bearers)
        call = asyncio.create_task(client.call("echo", text="in"))
        await until(lambda: len(upstream.bearers) > sent)
        done, _ = await asyncio.wait([call], timeout=0.5)
        assert not done
        lock.execute("ROLLBACK")
        lock.close()
        assert (await call).text == "in"
