"""Several processes on one store, killed, frozen and restarted: one refresh for each expiry, and no grant is lost."""

import asyncio
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.replicas import Chaos, Load, Replica, replicas
from fakes.shared_stores import Section

SECONDS = float(os.environ.get("MCP_AUTH_PROXY_CHAOS_SECONDS", "8"))
SEED = int(os.environ.get("MCP_AUTH_PROXY_CHAOS_SEED", "20260728"))
COUNT = int(os.environ.get("MCP_AUTH_PROXY_CHAOS_REPLICAS", "4"))
LONGEST_FREEZE = float(os.environ.get("MCP_AUTH_PROXY_CHAOS_FREEZE", "3"))

LIFETIME = 3.0
"""Seconds that an access token lasts."""

GRACE = float(os.environ.get("MCP_AUTH_PROXY_CHAOS_GRACE", "10"))
"""Seconds in which a refresh token may come again. Without any, a process that is killed after the server's answer and
before its own commit has lost that grant, whatever the others do."""

CALM = 5.0
"""Seconds of the same load without any harm."""


def refresh_tokens(issuer: FakeAuthorizationServer, since: int = 0) -> Counter[str]:
    """Return how often each refresh token was sent, but for the first ``since`` requests."""
    sent = (received.form.get("refresh_token") for received in issuer.requests[since:] if received.endpoint == "token")
    return Counter(token for token in sent if token)


async def connect(made: list[Replica], accounts: list[str]) -> None:
    """Authorize each account at another replica; its callback lands on the next one."""
    for number, account in enumerate(accounts):
        first, second = made[number % len(made)], made[(number + 1) % len(made)]
        link = str((await first.call(account)).message).partition("/connect/")[2].split()[0].strip("'\"")
        page = await first.consent(f"{first.origin}/connect/{link}", callback=second)
        assert page.status_code in (200, 303), page.text
    for replica in made:
        for account in accounts:
            # A replica hears of a consent at another one within a second.
            async with asyncio.timeout(10):
                while not await replica.is_connected(account):  # noqa: ASYNC110 - it is another process that decides
                    await asyncio.sleep(0.1)


@pytest.mark.timeout(60 + 4 * SECONDS)
async def test_no_grant_is_lost_whatever_happens_to_the_replicas(
    servers: Servers, tmp_path: Path, shared_store: Section
) -> None:
    """It takes half a minute: what is tried is chance, with real processes."""
    issuer = await servers.authorization_server(auto_consent=True, token_seconds=LIFETIME, reuse_seconds=GRACE)
    upstream = await servers.mcp_server(issuer)
    chance = random.Random(SEED)
    accounts = [f"notes@a{number}" for number in range(5)]
    async with replicas(
        tmp_path, COUNT, {"notes": upstream.url}, store=shared_store, authorization={"wait": "0s"}
    ) as made:
        await connect(made, accounts)
        assert (issuer.authorizations, issuer.registrations) == (len(accounts), len(accounts))
        load, chaos = Load(made, accounts, chance), Chaos(made, chance, longest_freeze=LONGEST_FREEZE, grace=GRACE)
        async with load.running():
            await chaos.run(SECONDS)
            harmed, calm_since = len(issuer.requests), time.monotonic()
            await asyncio.sleep(CALM)
        for number, replica in enumerate(made):
            (tmp_path / f"replica-{number}.log").write_text(replica.everything)
        (tmp_path / "events").write_text("\n".join(chaos.events))
        assert load.lost == [], f"{tmp_path} has the logs"
        for replica in made:
            for account in accounts:
                assert await replica.is_connected(account), (replica.origin, account, replica.everything[-3000:])
    assert issuer.ledger.reused == 0
    assert not any(grant.ended for grant in issuer.ledger.grants)
    assert (issuer.authorizations, issuer.registrations) == (len(accounts), len(accounts))
    # Whoever was killed or frozen had at most one refresh of each account under way.
    again = sum(count - 1 for count in refresh_tokens(issuer).values())
    assert again <= (chaos.kills + chaos.freezes) * len(accounts)
    calm, calm_seconds = refresh_tokens(issuer, harmed), time.monotonic() - calm_since
    assert max(calm.values()) == 1
    # An unharmed process renews a token with a fifth of its lifetime left at the earliest, or a quarter, by chance.
    assert len(calm) <= len(accounts) * (1 + calm_seconds / (0.7 * LIFETIME))
