"""When a user has to confirm where a server sends them (T78), on a real store."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.broker.sign_ins import SignIns, sign_in
from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import Account, Endpoints, Flow
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.confirmations import Confirmations
from mcp_auth_proxy.store.grants import Grants
from store.builders import NOW, flow, grant, store_settings

UPSTREAM = "https://mcp.as.example"
"""On the site of the sign-in page ``https://as.example/authorize``."""

ELSEWHERE = "https://mcp.other.example"


def asking(upstream: str | None = UPSTREAM, *, endpoint: str = "https://as.example/authorize", **key: object) -> Flow:
    pending = flow()
    changed = replace(pending.key, upstream=upstream, **key)  # type: ignore[arg-type]
    return replace(pending, key=changed, endpoints=Endpoints(authorization=endpoint, token="https://as.example/token"))


class Setup:
    def __init__(self, database: Engine) -> None:
        self.grants = Grants(database)
        self.sign_ins = SignIns(confirmations=Confirmations(database), grants=self.grants, clock=lambda: NOW)

    async def granted(self, upstream: str | None, *, account: Account, issuer: str = "https://as.example") -> None:
        stored = grant()
        key = replace(stored.key, account=account, upstream=upstream, issuer=issuer)
        await self.grants.add(replace(stored, key=key))

    async def asks(self, pending: Flow) -> bool:
        return await self.sign_ins.need_confirmation(pending)


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    database = await open_store(store_settings(tmp_path), announce=lambda line: None)
    yield Setup(database)
    await database.close()


@pytest.mark.parametrize(
    ("upstream", "endpoint", "asks"),
    [
        (UPSTREAM, "https://as.example/authorize", False),
        (UPSTREAM, "https://as.example:8443/a?b=c", False),
        ("http://127.0.0.1:1", "http://127.0.0.1:2/a", False),
        ("http://[::1]:1", "http://[::1]:2/a", False),
        ("http://localhost:1", "http://localhost:2/a", False),
        ("http://127.0.0.1:1", "http://localhost:2/a", True),
        ("http://127.0.0.1:1", "http://127.0.0.2:2/a", True),
        (ELSEWHERE, "https://as.example.other.example/a", False),
        (ELSEWHERE, "https://as.example/a", True),
        (UPSTREAM, "https://as.example.evil.example/a", True),
        (UPSTREAM, "https://evilas.example/a", True),
        ("https://one.github.io", "https://two.github.io/a", True),
        ("https://one.co.uk", "https://two.co.uk/a", True),
        ("https://xn--pple-43d.com", "https://apple.com/a", True),
        (None, "https://as.example/a", True),
    ],
)
async def test_a_sign_in_page_on_another_site_is_confirmed(
    setup: Setup, upstream: str | None, endpoint: str, asks: bool
) -> None:
    assert await setup.asks(asking(upstream, endpoint=endpoint)) is asks


OTHERS = ["https://mcp.as.example:8443", "http://mcp.as.example", "https://as.example", ELSEWHERE, None]


@pytest.mark.parametrize("upstream", OTHERS)
@pytest.mark.parametrize(
    "account", [Account("local", "other"), Account("somebody", "linear"), Account("local", "linear", "work")]
)
async def test_an_issuer_that_has_granted_tokens_for_another_origin_is_confirmed(
    setup: Setup, upstream: str | None, account: Account
) -> None:
    await setup.granted(upstream, account=account)
    assert await setup.asks(asking())


async def test_a_grant_for_the_same_origin_or_of_another_issuer_changes_nothing(setup: Setup) -> None:
    await setup.granted(UPSTREAM, account=Account("local", "linear"))
    await setup.granted(UPSTREAM, account=Account("local", "other"))
    await setup.granted(ELSEWHERE, account=Account("local", "third"), issuer="https://as.example/")
    assert not await setup.asks(asking())


async def test_a_grant_that_has_ended_or_was_forgotten_changes_nothing(setup: Setup) -> None:
    ended, forgotten = Account("local", "one"), Account("local", "two")
    for account in (ended, forgotten):
        await setup.granted(ELSEWHERE, account=account)
    assert await setup.asks(asking())
    await setup.grants.delete(forgotten)
    (key,) = await setup.grants.servers_of_issuer("https://as.example")
    assert key.account == ended
    stored = await setup.grants.current(ended)
    assert stored is not None
    await setup.grants.end(stored.id, version=stored.version, reason="over", now=NOW)
    assert not await setup.asks(asking())


async def test_it_is_confirmed_once(setup: Setup) -> None:
    await setup.granted(ELSEWHERE, account=Account("local", "other"))
    await setup.sign_ins.remember(asking())
    assert not await setup.asks(asking())
    # The port and the path of the sign-in page do not matter, nor does what is asked for.
    assert not await setup.asks(asking(endpoint="https://as.example:8443/other?a=b", resource="https://r.example"))


async def test_a_confirmation_does_not_hold_for_another_server_of_the_same_name(setup: Setup) -> None:
    # Whether or not a grant of the first server is still stored.
    await setup.sign_ins.remember(asking(ELSEWHERE))
    assert not await setup.asks(asking(ELSEWHERE))
    for upstream in ("https://mcp.evil.example", ELSEWHERE + ":8443", ELSEWHERE.replace("https", "http"), None):
        assert await setup.asks(asking(upstream))
    await setup.sign_ins.remember(asking(None))
    assert await setup.asks(asking(None))


@pytest.mark.parametrize(
    "changed",
    [
        {"account": Account("somebody", "linear")},
        {"account": Account("local", "linear", "work")},
        {"account": Account("local", "other")},
        {"issuer": "https://as.example/"},
        {"endpoint": "https://login.as.example/authorize"},
    ],
    ids=["principal", "account", "server", "issuer", "sign-in host"],
)
async def test_anything_else_is_confirmed_again(setup: Setup, changed: dict[str, object]) -> None:
    await setup.sign_ins.remember(asking(ELSEWHERE))
    assert not await setup.asks(asking(ELSEWHERE))
    assert await setup.asks(asking(ELSEWHERE, **changed))  # type: ignore[arg-type]


async def test_a_server_without_a_sign_in_page_can_not_be_confirmed(setup: Setup) -> None:
    with pytest.raises(AuthorizationError, match="no authorization_endpoint"):
        sign_in(asking(endpoint=""))
    with pytest.raises(AuthorizationError, match="no authorization_endpoint"):
        await setup.asks(asking(endpoint=""))
