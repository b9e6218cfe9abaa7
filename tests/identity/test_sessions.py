"""Sessions of browsers: new with each sign-in, and over with the principal, the key, the time or a sign-out."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mcp_auth_proxy.identity.sessions import LIFETIME, LINK_LIFETIME, BrowserSessions, new_link
from mcp_auth_proxy.models import (
    LOCAL,
    LOCAL_PRINCIPAL,
    Caller,
    Principal,
    PrincipalStatus,
    Role,
    Scope,
)
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.sessions import Sessions
from store.builders import NOW, store_settings

ANNA = Principal(id="prn_1", name="anna")


@dataclass
class Directory:
    """Who there is, which keys hold, and what time it is."""

    people: dict[str, Principal] = field(default_factory=lambda: {ANNA.id: ANNA, LOCAL: LOCAL_PRINCIPAL})
    keys: set[str] = field(default_factory=lambda: {"1"})
    now: float = NOW

    async def find(self, principal_id: str) -> Principal | None:
        return self.people.get(principal_id)

    async def holds(self, key: str) -> bool:
        return key in self.keys

    def clock(self) -> float:
        return self.now

    def sessions(self, engine: Engine) -> BrowserSessions:
        return BrowserSessions(
            sessions=Sessions(engine), find_principal=self.find, key_holds=self.holds, clock=self.clock
        )


def caller(credential: str = "key:1") -> Caller:
    return Caller(principal=ANNA, credential=credential, scopes=frozenset({Scope.MCP}))


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    opened = await open_store(store_settings(tmp_path))
    yield opened
    await opened.close()


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
def sessions(engine: Engine, directory: Directory) -> BrowserSessions:
    return directory.sessions(engine)


async def test_a_session_has_the_principal_of_now_and_the_scopes_of_its_credential(
    sessions: BrowserSessions, directory: Directory
) -> None:
    cookie = await sessions.begin(caller())
    directory.people[ANNA.id] = admin = replace(ANNA, role=Role.ADMIN)
    found = await sessions.caller(cookie.value)
    assert found is not None
    assert (found.principal, found.scopes) == (admin, frozenset({Scope.MCP}))
    kind, _, session_id = found.credential.partition(":")
    assert (kind, session_id in cookie.value) == ("session", False)


async def test_a_session_lasts_twelve_hours_however_often_it_is_used(
    sessions: BrowserSessions, directory: Directory
) -> None:
    cookie = await sessions.begin(caller())
    assert cookie.max_age == LIFETIME
    directory.now += LIFETIME - 1
    assert await sessions.caller(cookie.value) is not None
    directory.now += 1
    assert await sessions.caller(cookie.value) is None


async def test_each_sign_in_has_a_new_secret_and_ends_the_session_before(sessions: BrowserSessions) -> None:  # T54
    first = await sessions.begin(caller())
    second = await sessions.begin(caller(), replaces=first.value)
    assert first.value != second.value
    assert await sessions.caller(first.value) is None
    assert await sessions.caller(second.value) is not None


async def test_a_secret_that_was_planted_is_never_that_of_a_session(sessions: BrowserSessions) -> None:  # T54
    planted = "A" * 43
    assert await sessions.caller(planted) is None
    await sessions.begin(caller(), replaces=planted)
    assert await sessions.caller(planted) is None


@pytest.mark.parametrize("value", ["", "x", "A" * 44, "ä" * 43, "\udcff" * 43, '"' * 43])
async def test_any_other_text_is_no_session(sessions: BrowserSessions, value: str) -> None:
    await sessions.begin(caller(), replaces=value)
    assert await sessions.caller(value) is None
    assert await sessions.open_link(value) is None
    assert not await sessions.has_opened(value, value)
    await sessions.end(value)


async def test_the_sessions_of_a_disabled_principal_end_for_good(
    sessions: BrowserSessions, directory: Directory
) -> None:
    cookies = [await sessions.begin(caller()) for _ in range(2)]
    directory.people[ANNA.id] = replace(ANNA, status=PrincipalStatus.DISABLED)
    assert await sessions.caller(cookies[0].value) is None
    directory.people[ANNA.id] = ANNA
    assert [await sessions.caller(cookie.value) for cookie in cookies] == [None, None]


async def test_a_principal_that_is_not_known_yet_keeps_its_session(
    sessions: BrowserSessions, directory: Directory
) -> None:
    cookie = await sessions.begin(caller())
    del directory.people[ANNA.id]
    assert await sessions.caller(cookie.value) is None
    directory.people[ANNA.id] = ANNA
    assert await sessions.caller(cookie.value) is not None


async def test_the_sessions_of_a_revoked_key_end_and_no_others(sessions: BrowserSessions, directory: Directory) -> None:
    by_key, by_jwt = await sessions.begin(caller()), await sessions.begin(caller("jwt:https://idp.example"))
    directory.keys.clear()
    assert await sessions.caller(by_key.value) is None
    directory.keys.add("1")
    assert await sessions.caller(by_key.value) is None
    assert await sessions.caller(by_jwt.value) is not None


async def test_a_link_works_once_within_five_minutes(
    engine: Engine, sessions: BrowserSessions, directory: Directory
) -> None:
    links = [await new_link(Sessions(engine), now=NOW) for _ in range(2)]
    directory.now += LINK_LIFETIME - 1
    cookie = await sessions.open_link(links[0])
    assert cookie is not None
    found = await sessions.caller(cookie.value)
    assert found is not None
    assert found.principal == LOCAL_PRINCIPAL
    directory.now += 1
    assert await sessions.open_link(links[1]) is None
    assert await sessions.caller(cookie.value) == found


async def test_a_link_that_is_opened_twice_leaves_nobody_a_session(engine: Engine, sessions: BrowserSessions) -> None:
    link = await new_link(Sessions(engine), now=NOW)
    first = await sessions.open_link(link)
    assert first is not None
    assert await sessions.has_opened(link, first.value)
    assert await sessions.open_link(link) is None
    assert await sessions.caller(first.value) is None


async def test_a_link_is_no_session_and_a_session_no_link(engine: Engine, sessions: BrowserSessions) -> None:
    link = await new_link(Sessions(engine), now=NOW)
    assert await sessions.caller(link) is None
    cookie = await sessions.begin(caller())
    assert await sessions.open_link(cookie.value) is None
    assert await sessions.caller(cookie.value) is not None
    assert not await sessions.has_opened(link, cookie.value)


async def test_sessions_are_those_of_all_processes_on_a_store(
    sessions: BrowserSessions, directory: Directory, tmp_path: Path
) -> None:
    cookie = await sessions.begin(caller())
    other = await open_store(store_settings(tmp_path))
    try:
        elsewhere = directory.sessions(other)
        assert await elsewhere.caller(cookie.value) is not None
        await elsewhere.end(cookie.value)
    finally:
        await other.close()
    assert await sessions.caller(cookie.value) is None
