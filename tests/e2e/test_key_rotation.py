"""``keys rotate`` while two proxies serve, renew and are asked without a pause: no request fails, no grant is lost."""

import asyncio
import base64
import json
import os
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import psycopg
import pytest

from e2e.test_keys import hangup, key, keys, set_keys
from fakes import postgresql
from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers, on_both_engines
from fakes.headless import consent
from fakes.mcp_client import PlainClient
from fakes.proxy import ProxyProcess, link_in, proxy_process, run_command, start_command, until, write_config
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.cipher import Key
from mcp_auth_proxy.store.grants import Grants
from store.builders import grant

GRANTS = 1500
KILLS = 5


class Load:
    """Clients that always have a request at each proxy, and an issuer whose access tokens keep ending."""

    def __init__(self, issuer: FakeAuthorizationServer, clients: list[PlainClient]) -> None:
        self.answers = [0] * len(clients)
        self.failures: list[object] = []
        self._issuer = issuer
        self._clients = clients

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._ask(number)) for number in range(len(self._clients))]
            tasks.append(group.create_task(self._end_tokens()))
            yield
            for task in tasks:
                task.cancel()

    async def _ask(self, number: int) -> None:
        while True:
            text = str(self.answers[number])
            reply = await self._clients[number].call("echo", text=text)
            if "error" in reply.message or reply.text != text:
                self.failures.append(reply)
            self.answers[number] += 1

    async def _end_tokens(self) -> None:
        while True:
            self._issuer.end_access_tokens()
            await self.some_answers()

    async def some_answers(self) -> None:
        """Wait until each client has been answered some more times."""
        before = list(self.answers)
        await until(
            lambda: all(now >= then + 20 for now, then in zip(self.answers, before, strict=True)), "answers under load"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    on_both_engines(metafunc)


def sealed_with(folder: Path, key_id: str) -> int:
    """Return how many grants are sealed with a key."""
    database = postgresql.database_url(folder)
    sql, key_bytes = "SELECT count(*) FROM grants WHERE substr(seal, 2, 4) = ", bytes.fromhex(key_id)
    if database is None:
        with closing(sqlite3.connect(folder / "proxy.db")) as connection:
            (count,) = connection.execute(f"{sql} ?", (key_bytes,)).fetchone()
    else:
        with psycopg.connect(database) as server:
            found = server.execute(f"{sql} %s".encode(), (key_bytes,)).fetchone()
            (count,) = found or (0,)
    return int(count)


async def add_grants(config: Path) -> None:
    engine = await open_store(load(config, environ=os.environ).store)
    try:
        async with engine.transaction() as transaction:
            for number in range(GRANTS):
                await Grants(engine)._add(transaction, grant(f"other-{number}"))
    finally:
        await engine.close()


async def rotate_until_killed(config: Path, key_id: str, rows: int) -> None:
    """Rotate until so many grants are sealed with the key, then kill it."""
    process = await start_command("keys", "rotate", "--config", str(config))
    try:
        await until(lambda: sealed_with(config.parent, key_id) >= rows, f"{rows} rows")
        assert process.returncode is None
    finally:
        process.send_signal(signal.SIGKILL)
        await process.communicate()


@pytest.mark.timeout(180)
async def test_no_request_fails_while_a_rotation_is_killed_again_and_again(  # F12
    servers: Servers, tmp_path: Path
) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    old, new = Key.of(base64.b64decode(postgresql.KEY)).id, key(tmp_path, "new.key")
    (tmp_path / "old.key").write_text(postgresql.KEY)
    config = write_config(
        tmp_path,
        {"notes": upstream.url},
        store={"url": postgresql.database_url(tmp_path) or "sqlite:///proxy.db", "keys": ["file:old.key"]},
        authorization={"wait": "0s", "open_browser": "never", "cold_start": False},
    )
    async with (
        proxy_process(config) as first,
        proxy_process(config) as second,
        first.client("notes") as at_first,
        second.client("notes") as at_second,
    ):
        page = await consent(link_in((await at_first.call("echo")).message))
        assert page.status_code == 200
        await add_grants(config)
        set_keys(config, "file:new.key", "file:old.key")
        for proxy in (first, second):
            await taken_up(proxy)
        load_on_both = Load(issuer, [at_first, at_second])
        async with load_on_both.running():
            await load_on_both.some_answers()
            for number in range(KILLS):
                await rotate_until_killed(config, new, (number + 1) * GRANTS // (KILLS + 2))
            rotated, _ = await keys(config, "rotate")
            assert (rotated["failed"], rotated["left"], rotated["droppable"]) == (0, 0, [old])
            assert 0 < rotated["resealed"] < GRANTS < rotated["resealed"] + rotated["skipped"]
            await load_on_both.some_answers()
            set_keys(config, "file:new.key")
            for proxy in (first, second):
                await taken_up(proxy)
            await load_on_both.some_answers()
        assert load_on_both.failures == []
        assert issuer.refreshes > KILLS
        assert issuer.authorizations == 1
        assert "skipped" not in first.log + second.log
    assert sealed_with(tmp_path, new) == GRANTS + 1
    assert [row["id"] for row in (await keys(config, "list"))[0]] == [new]
    code, out, err = await run_command("status", "--json", "--config", str(config))
    assert (code, json.loads(out)[0]["state"]) == (0, "connected"), err


async def taken_up(proxy: ProxyProcess) -> None:
    """Let a proxy take up the keys; it may have noticed the new configuration by itself."""
    await hangup(proxy)
    await until(lambda: "applied store.keys" in proxy.err, "new keys")
