"""Hostile challenges and hostile token responses."""

import asyncio
from pathlib import Path

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.hostile import assert_refused, honeypot
from fakes.http_exchange import ABSENT
from fakes.proxy_setup import proxy_setup

TRICKS = [
    'Bearer realm="x scope=evil resource_metadata=http://127.0.0.1:PORT/"',
    'Bearer realm="a\\", scope=\\"evil", error_description="resource_metadata=\\"http://127.0.0.1:PORT/\\""',
    'Bearer realm="' + "a" * 60_000,
    'Basic realm="x", resource_metadata="http://127.0.0.1:PORT/", scope="evil"',
    'Bearer ,,,=,="", scope=',
    '"Bearer" scope="evil"',
    "Bearer " + "a" * 60_000,
    "\xe9\xff=\x80",
    "",
]


@pytest.mark.parametrize("challenge", TRICKS, ids=lambda challenge: challenge[:30])
async def test_nothing_is_read_from_inside_quotes_or_from_garbage(  # T20
    servers: Servers, tmp_path: Path, challenge: str
) -> None:
    async with honeypot() as target, proxy_setup(servers, tmp_path) as setup:
        setup.upstream.challenges = {401: [challenge.replace("PORT", str(target.port))]}
        await setup.connect()
        assert "evil" not in setup.issuer.seen("authorize")[0].form.get("scope", "")
        assert target.visits == []


async def test_a_401_without_a_challenge_starts_an_authorization_too(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        setup.upstream.challenges = {401: []}
        await setup.connect()


async def test_two_challenges_in_one_field_or_two_are_distinguished(servers: Servers, tmp_path: Path) -> None:  # T20
    async with proxy_setup(servers, tmp_path) as setup:
        setup.upstream.challenges = {401: ['Basic realm="a, b", Bearer scope="read"', 'Digest scope="evil"']}
        await setup.connect()
        assert setup.issuer.seen("authorize")[0].form["scope"] == "read"


# tokens


BAD_TOKENS: list[dict[str, object]] = [
    {"token_type": "mac"},
    {"token_type": ABSENT},
    {"token_type": "DPoP"},
    {"token_type": 7},
    {"access_token": "a\r\nX-Evil: 1"},
    {"access_token": "a\nb"},
    {"access_token": "a\0b"},
    {"access_token": "a b"},
    {"access_token": "\u00e9"},
    {"access_token": ""},
    {"access_token": 7},
    {"access_token": ABSENT},
    {"refresh_token": "a\r\nb"},
]


@pytest.mark.parametrize("change", BAD_TOKENS, ids=str)
async def test_a_token_that_must_not_be_used_is_neither_used_nor_kept(  # T22, T23
    servers: Servers, tmp_path: Path, change: dict[str, object]
) -> None:
    async with proxy_setup(servers, tmp_path, wait="20s") as setup:
        setup.issuer.token_changes = change
        call = asyncio.create_task(setup.ask())
        page = await consent(await setup.proxy.next_link())
        assert page.status_code == 502
        assert_refused(await call, "token", setup.issuer.issuer)
        assert set(setup.upstream.bearers) == {None}
        setup.issuer.token_changes = {}
        call = asyncio.create_task(setup.ask("in"))
        await consent(await setup.proxy.next_link(2))
        assert (await call).text == "in"
