"""Many grants whose tokens expire in the same minute: how fast they are renewed, and how many are lost.

The authorization server rotates refresh tokens and ends a grant whose old one comes again. In the middle it answers 429
with ``Retry-After`` for a moment. It runs in a thread of its own.
"""

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast
from urllib.parse import parse_qs

from bench.engines import Opening
from bench.grant_lists import BATCH, _Joined
from mcp_auth_proxy.broker.broker import Broker
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.models import (
    Account,
    ClientAuth,
    Endpoints,
    Grant,
    GrantKey,
    GrantType,
    Registration,
    RegistrationKind,
    TokenSet,
)
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.refresh_slots import SLACK

LEFT = 60.0
"""Seconds that the tokens still live when they are used first, at least."""

ENOUGH = 1.5
"""Times the least possible time that they live at least: none must expire before it is renewed."""

FILLING = 0.01
"""Seconds for each grant to be stored and used first, which takes that long on a busy machine."""

BUSY_AFTER = 0.3
"""Share of the grants after which the server is busy."""

BUSY_SECONDS = 0.2
RETRY_AFTER = 2
DEADLINE = 5.0
"""Times the least possible time, and a minute, after which it is given up."""


@dataclass(slots=True)
class Storm:
    """What came of it."""

    grants: int
    rate: float
    most: int = 0
    """Requests that arrived in one second, at most."""
    seconds: float = 0.0
    """From the first use until the last was renewed."""
    early: int = 0
    """Requests in the time for which the server had asked for none."""
    late: int = 0
    """Tokens that had expired before they were renewed."""
    lost: int = 0
    """Grants that have ended."""

    @property
    def least_seconds(self) -> float:
        """Seconds that it takes at least: the rate, with what it leaves free, and the pause."""
        return self.grants / self.rate * SLACK + RETRY_AFTER


@dataclass(slots=True)
class Issuer:
    """The token endpoint. A refresh token is ``NUMBER.GENERATION``."""

    busy_at: int
    times: list[float] = field(default_factory=list)
    generations: dict[str, int] = field(default_factory=dict)
    renewed_at: dict[str, float] = field(default_factory=dict)
    busy_since: float = 0.0
    port: int = 0

    def answer(self, body: bytes) -> tuple[int, dict[str, object]]:
        """Return status and document for the form of a token request."""
        now = time.monotonic()
        self.times.append(now)
        number, _, generation = parse_qs(body.decode())["refresh_token"][0].partition(".")
        if not self.busy_since and len(self.renewed_at) >= self.busy_at:
            self.busy_since = now
        if self.busy_since and now - self.busy_since < BUSY_SECONDS:
            return 429, {"error": "slow_down"}
        if int(generation) != self.generations.get(number, 0):
            return 400, {"error": "invalid_grant"}
        self.generations[number] = int(generation) + 1
        self.renewed_at.setdefault(number, now)
        new = f"{number}.{int(generation) + 1}"
        return 200, {"access_token": f"a{new}", "token_type": "Bearer", "refresh_token": new, "expires_in": 36_000}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
                status, document = self.answer(await reader.readexactly(length))
                text = json.dumps(document).encode()
                writer.write(
                    f"HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncache-control: no-store\r\n"
                    f"retry-after: {RETRY_AFTER}\r\ncontent-length: {len(text)}\r\n\r\n".encode()
                    + text
                )
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


@contextmanager
def running(issuer: Issuer) -> Iterator[None]:
    """Serve the token endpoint in a thread until the block ends."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(issuer.serve, "127.0.0.1", 0))
    issuer.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        server.close()
        loop.close()


def measure(folder: Path, opening: Opening, *, grants: int, rate: float) -> Storm:
    """Renew all grants ahead of the expiry of their tokens."""
    folder.mkdir(parents=True)
    issuer = Issuer(busy_at=int(grants * BUSY_AFTER))
    with running(issuer):
        return asyncio.run(_storm(folder, opening, issuer, Storm(grants, rate)))


async def _storm(folder: Path, opening: Opening, issuer: Issuer, storm: Storm) -> Storm:
    server = ServerSettings(name="bench", url=f"http://127.0.0.1:{issuer.port}/mcp")
    database, fetcher = await open_store(opening(folder)), Fetcher()
    accounts = [Account("local", server.name, f"a{number}") for number in range(storm.grants)]
    expires_at = time.time() + max(LEFT, ENOUGH * storm.least_seconds) + FILLING * storm.grants
    await _fill(database, [_grant(account, server, expires_at) for account in accounts])
    broker = Broker(
        servers={server.name: server},
        database=database,
        fetcher=fetcher,
        public_url="http://127.0.0.1:8787",
        announce=lambda flow, link: None,
        clock=time.time,
        refresh_rate=storm.rate,
    )
    try:
        await broker.start()
        started = time.monotonic()
        expiry = started + expires_at - time.time()
        for account in [*accounts, *accounts]:
            await broker.token(account)
        await _until(lambda: len(issuer.renewed_at) == storm.grants, timeout=DEADLINE * storm.least_seconds + 60)
        storm.seconds = time.monotonic() - started
        storm.late = sum(at > expiry for at in issuer.renewed_at.values())
    finally:
        await broker.aclose()
        await fetcher.aclose()
    row = await database.fetch_one("SELECT count(*) AS n FROM grants WHERE ended_at IS NOT NULL")
    storm.lost = row["n"] if row is not None else storm.grants
    await database.close()
    storm.most = most_in_a_second(issuer.times)
    quiet = issuer.busy_since + BUSY_SECONDS
    storm.early = sum(quiet < at < issuer.busy_since + RETRY_AFTER for at in issuer.times)
    return storm


def most_in_a_second(times: list[float]) -> int:
    """Return how many of these are in one second, at most."""
    most, within = 0, deque[float]()
    for at in times:
        within.append(at)
        while at - within[0] >= 1:
            within.popleft()
        most = max(most, len(within))
    return most


async def _until(condition: Callable[[], bool], *, timeout: float) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def _fill(engine: Engine, grants: list[Grant]) -> None:
    for start in range(0, len(grants), BATCH):
        async with engine.transaction() as transaction:
            store = Grants(cast(Engine, _Joined(engine, transaction)))
            for grant in grants[start : start + BATCH]:
                await store.add(grant)


def _grant(account: Account, server: ServerSettings, expires_at: float) -> Grant:
    origin = server.url.removesuffix("/mcp")
    number, began = account.name.removeprefix("a"), expires_at - 3600
    registration = Registration(
        server=server.name,
        issuer=origin,
        client_id="bench",
        client_auth=ClientAuth.NONE,
        kind=RegistrationKind.DYNAMIC,
        client_secret=None,
        redirect_uri="http://127.0.0.1:8787/oauth/callback",
        created_at=began,
    )
    return Grant(
        key=GrantKey(account=account, resource=server.url, issuer=origin),
        grant_type=GrantType.AUTHORIZATION_CODE,
        registration=replace(registration, account=account.name),
        endpoints=Endpoints(authorization=f"{origin}/authorize", token=f"{origin}/token"),
        tokens=TokenSet(
            access_token=f"a{number}.0",
            refresh_token=f"{number}.0",
            obtained_at=began,
            expires_at=expires_at,
            scopes=("read",),
        ),
        scopes=("read",),
        granted_at=began,
    )
