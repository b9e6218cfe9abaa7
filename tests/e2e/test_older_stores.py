"""Stores of every released schema with the commands of today: read without a migration, then served and used."""

import asyncio
import json
import sqlite3
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from bench import certificates
from fakes.proxy import Environment, proxy_process, run_command, until, write_config
from fakes.raw_server import Peer, RawServer
from store import samples

URL = "https://linear.example/mcp"
FRESH = "canary-fresh"
WITH_ACCOUNTS = 5
"""The first schema in which a server may have several accounts."""

READING = (
    ["status"],
    ["status", "linear", "--json"],
    ["keys", "list"],
    ["api-keys", "list"],
    ["principals", "list", "--json"],
    ["check"],
    ["doctor", "linear"],
    ["completion", "bash"],
    ["export", "logins.export", "--passphrase", "env:PASSPHRASE"],
)


def answer(status: str, body: str = "", *fields: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/json", *fields]
    return "\r\n".join([*head, "", body]).encode()


async def serve_linear(peer: Peer) -> None:
    """Play linear.example, which accepts one token, and as.example, which gives it for a stored refresh token."""
    while request := (await peer.request()).decode():
        first, _, body = request.partition("\r\n")[0], "", request.rpartition("\r\n\r\n")[2]
        if first.startswith("POST /token") and "refresh_token=canary-refresh-" in body:
            tokens = {"access_token": FRESH, "token_type": "Bearer", "expires_in": 3600, "refresh_token": "canary-2"}
            await peer.send(answer("200 OK", json.dumps(tokens)))
        elif first.startswith("POST /mcp") and f"Bearer {FRESH}\r\n" in request:
            result = {"jsonrpc": "2.0", "id": json.loads(body)["id"], "result": {"content": []}}
            await peer.send(answer("200 OK", json.dumps(result)))
        elif first.startswith("POST /mcp"):
            await peer.send(answer("401 Unauthorized", "", "WWW-Authenticate: Bearer"))
        else:
            await peer.send(answer("404 Not Found"))


@asynccontextmanager
async def elsewhere(folder: Path) -> AsyncIterator[tuple[RawServer, Environment, Path]]:
    """Run both servers behind a forward proxy; yield them, the environment that leads there, and their authority."""
    made = certificates.create(folder, "linear.example", "as.example")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(made.certificate, made.key)

    async def forward(peer: Peer) -> None:
        await peer.head()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        await peer.pipe(reader, writer)

    async with RawServer(serve_linear, tls) as server, RawServer(forward) as proxy:
        address = f"http://127.0.0.1:{proxy.port}"
        yield server, {"HTTPS_PROXY": address, "https_proxy": None, "NO_PROXY": None, "no_proxy": None}, made.authority
        await until(lambda: server.idle and proxy.idle)


def schema_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def traces(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    found = {path.name: (path.read_bytes(), path.stat()) for path in folder.iterdir()}
    return {name: (content, stat.st_mtime_ns, stat.st_mode) for name, (content, stat) in found.items()}


@pytest.mark.parametrize("schema", samples.ALL)
async def test_a_store_of_each_schema_is_served_and_its_grant_used(tmp_path: Path, schema: int) -> None:
    store = tmp_path / "store"
    store.mkdir()
    samples.copy(schema, store)
    if 3 <= schema < WITH_ACCOUNTS:
        with closing(sqlite3.connect(store / "store.db")) as connection, connection:
            # What stands for the DPoP key of its only grant is no key.
            connection.execute("UPDATE grants SET dpop_key = NULL")
    before = traces(store)
    # The client of the other account is one of the API, which these stores do not have.
    account = "linear@work" if schema >= WITH_ACCOUNTS else "linear"
    async with elsewhere(tmp_path) as (server, env, authority):
        config = write_config(
            tmp_path,
            {"linear": URL},
            store={"url": f"sqlite:///{store}/store.db"},
            outbound={"ca_bundle": str(authority), "trust_proxy": "true"},
            authorization={"wait": "0s"},
        )
        code, out, err = await run_command("status", "--json", "--config", str(config), env=env)
        assert (code, err) == (0, "")
        (row,) = [row for row in json.loads(out) if row["account"] == (account.partition("@")[2] or "default")]
        assert (row["server"], row["state"], row["issuer"]) == ("linear", "connected", "https://as.example")
        assert traces(store) == before, "status changed the store"
        async with proxy_process(config, env=env) as proxy, proxy.client(account) as client:
            reply = await client.call("echo", text="x")
            assert reply.message.get("result") == {"content": []}, (proxy.log, reply.message, server.requests)
            assert schema_of(store / "store.db") == samples.NEWEST
            assert proxy.log.count("a copy was kept") == (schema < samples.NEWEST)
            code, out, _ = await run_command("status", "--json", "--config", str(config), env=env)
            assert (code, "connected" in [row["state"] for row in json.loads(out)]) == (0, True)
            assert await proxy.stop() == 0
    refreshes = [request for request in server.requests if request.startswith(b"POST /token")]
    assert len(refreshes) == 1


@pytest.mark.parametrize("schema", [1, samples.NEWEST])
async def test_commands_that_read_leave_the_store_as_it_is(tmp_path: Path, schema: int) -> None:
    store = tmp_path / "store"
    store.mkdir()
    samples.copy(schema, store)
    before, changed_at = traces(store), store.stat().st_mtime_ns
    config = write_config(tmp_path, {"linear": "http://127.0.0.1:9/mcp"}, store={"url": f"sqlite:///{store}/store.db"})
    # Where completion has no option for that, the configuration is found.
    env = {"MCP_AUTH_PROXY_CONFIG": str(config), "PASSPHRASE": "correct horse battery"}
    done = await asyncio.gather(*(run_command(*command, env=env, cwd=tmp_path) for command in READING))
    assert (traces(store), store.stat().st_mtime_ns) == (before, changed_at)
    for command, (code, out, err) in zip(READING, done, strict=True):
        # There is no server for doctor to examine, and export warns of a copy.
        assert code == (command[0] == "doctor"), (command, err)
        assert (err == "") == (command[0] != "export"), (command, err)
        assert out, command
