"""A browser's way from our link to the callback, on a real store."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from mcp_auth_proxy.broker.attempts import (
    AuthorizationAttempts,
    AuthorizationRedirect,
    DevicePrompt,
    cookie_name,
    digest,
)
from mcp_auth_proxy.errors import CallbackRefused
from mcp_auth_proxy.models import Account, Attempt, DeviceAuthorization, FlowStatus
from mcp_auth_proxy.oauth.authorization_code import challenge_s256
from mcp_auth_proxy.store.database import Database
from mcp_auth_proxy.store.flows import Flows
from store.builders import NOW, flow, store_settings


class Clock:
    now: float = NOW + 1

    def __call__(self) -> float:
        return self.now


class Scene:
    """One pending flow, ``flow-1`` of the server linear, that ends 600 seconds after NOW."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.flows = Flows(database)
        self.clock = Clock()
        self.attempts = AuthorizationAttempts(flows=self.flows, clock=self.clock)

    async def open(self) -> tuple[AuthorizationRedirect, str]:
        """Open the link; return the redirect and its state."""
        redirect = await self.attempts.open("linear", "flow-1")
        assert isinstance(redirect, AuthorizationRedirect)
        return redirect, query(redirect)["state"]

    async def refused(self, state: str | list[str] | None, cookies: dict[str, str]) -> int:
        """The status with which a callback is refused."""
        params = {} if state is None else {"state": [state] if isinstance(state, str) else state}
        with pytest.raises(CallbackRefused) as refused:
            await self.attempts.accept({**params, "code": ["good"]}, cookies)
        return refused.value.status


@pytest.fixture
async def it(tmp_path: Path) -> AsyncIterator[Scene]:
    database = await Database.open(store_settings(tmp_path))
    scene = Scene(database)
    await scene.flows.save(flow())
    yield scene
    await database.close()


def query(redirect: AuthorizationRedirect) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(redirect.authorization_url).query).items()}


def cookies_of(*redirects: AuthorizationRedirect) -> dict[str, str]:
    return {redirect.cookie_name: redirect.cookie_value for redirect in redirects}


async def test_the_browser_that_opened_the_link_is_accepted(it: Scene) -> None:
    redirect, state = await it.open()
    found, attempt = await it.attempts.accept({"state": [state], "code": ["x"]}, cookies_of(redirect))
    assert found.id == "flow-1"
    assert challenge_s256(attempt.code_verifier) == query(redirect)["code_challenge"]
    assert query(redirect)["code_challenge_method"] == "S256"


async def test_each_attempt_has_secrets_of_its_own_and_spoils_no_other(it: Scene) -> None:
    (first, state), (second, other) = await it.open(), await it.open()
    assert state != other
    assert query(first)["code_challenge"] != query(second)["code_challenge"]
    assert first.cookie_name != second.cookie_name
    await it.attempts.accept({"state": [state]}, cookies_of(first, second))
    await it.attempts.accept({"state": [other]}, cookies_of(second))


async def test_a_callback_is_good_once(it: Scene) -> None:  # T12
    redirect, state = await it.open()
    await it.attempts.accept({"state": [state]}, cookies_of(redirect))
    assert await it.refused(state, cookies_of(redirect)) == 400


async def test_a_callback_after_the_flows_time_is_refused(it: Scene) -> None:  # T12
    redirect, state = await it.open()
    it.clock.now = NOW + 600
    assert await it.refused(state, cookies_of(redirect)) == 400


async def test_another_browser_is_refused_and_does_not_use_the_attempt_up(it: Scene) -> None:  # T13
    redirect, state = await it.open()
    other, _ = await it.open()
    wrong = [
        {},
        {redirect.cookie_name: ""},
        {redirect.cookie_name: "x"},
        {redirect.cookie_name: digest(redirect.cookie_value)},
        {redirect.cookie_name: "\udcff"},
        {redirect.cookie_name: other.cookie_value},
        cookies_of(other),
        {cookie_name("x"): redirect.cookie_value},
    ]
    for cookies in wrong:
        assert await it.refused(state, cookies) == 403
    await it.attempts.accept({"state": [state]}, cookies_of(redirect))


@pytest.mark.parametrize("kind", ["none", "empty", "unknown", "two", "hash", "prefix", "odd"])
async def test_a_bad_state_is_refused_whatever_the_cookie(it: Scene, kind: str) -> None:  # T14
    redirect, state = await it.open()
    bad: dict[str, str | list[str] | None] = {
        "none": None,
        "empty": "",
        "unknown": "x" * 43,
        "two": [state, state],
        "hash": digest(state),
        "prefix": state[:-1],
        "odd": "\udcff\x00" * 1000,
    }
    assert await it.refused(bad[kind], cookies_of(redirect)) == 400
    await it.attempts.accept({"state": [state]}, cookies_of(redirect))


@pytest.mark.parametrize("status", [FlowStatus.DONE, FlowStatus.FAILED])
async def test_a_callback_for_a_flow_that_has_ended_is_refused(it: Scene, status: FlowStatus) -> None:
    redirect, state = await it.open()
    assert await it.flows.finish("flow-1", status)
    assert await it.refused(state, cookies_of(redirect)) == 400


@pytest.mark.parametrize(
    ("server", "flow_id", "status"),
    [("linear", "flow-2", 404), ("linear", "", 404), ("other", "flow-1", 404), ("", "flow-1", 404)],
)
async def test_a_link_that_was_never_given_out_is_not_known(it: Scene, server: str, flow_id: str, status: int) -> None:
    with pytest.raises(CallbackRefused) as refused:
        await it.attempts.open(server, flow_id)
    assert refused.value.status == status


@pytest.mark.parametrize("status", [FlowStatus.DONE, FlowStatus.FAILED])
async def test_a_link_that_has_ended_says_so(it: Scene, status: FlowStatus) -> None:
    await it.flows.finish("flow-1", status)
    with pytest.raises(CallbackRefused, match="connected" if status is FlowStatus.DONE else "new one") as refused:
        await it.attempts.open("linear", "flow-1")
    assert refused.value.status == 410


class EndedMeanwhile(Flows):
    """Ends the flow after it was read and before the attempt is stored."""

    def __init__(self, database: Database, end: Callable[[Flows], Awaitable[object]]) -> None:
        super().__init__(database)
        self._end = end

    async def add_attempt(self, attempt: Attempt) -> bool:
        await self._end(self)
        return await super().add_attempt(attempt)


@pytest.mark.parametrize(
    ("end", "status", "told"),
    [
        (lambda flows: flows.finish("flow-1", FlowStatus.DONE), 410, "connected"),
        (lambda flows: flows.cancel(Account("local", "linear")), 410, "new one"),
        (lambda flows: flows.purge(NOW + 86_400), 404, "new one"),
    ],
    ids=["done", "cancelled", "purged"],
)
async def test_a_link_that_ends_while_it_is_opened_says_so(
    it: Scene, end: Callable[[Flows], Awaitable[object]], status: int, told: str
) -> None:
    attempts = AuthorizationAttempts(flows=EndedMeanwhile(it.database, end), clock=it.clock)
    with pytest.raises(CallbackRefused, match=told) as refused:
        await attempts.open("linear", "flow-1")
    assert refused.value.status == status


async def test_a_link_that_is_too_old_says_so(it: Scene) -> None:
    it.clock.now = NOW + 600
    with pytest.raises(CallbackRefused) as refused:
        await it.attempts.open("linear", "flow-1")
    assert refused.value.status == 410


async def test_the_cookie_lives_no_longer_than_the_flow(it: Scene) -> None:
    redirect, _ = await it.open()
    assert redirect.max_age == 599
    it.clock.now = NOW + 599.9
    redirect, _ = await it.open()
    assert redirect.max_age == 1


async def test_many_attempts_leave_the_newest_usable(it: Scene) -> None:
    opened = []
    for _ in range(30):
        it.clock.now += 1
        opened.append(await it.open())
    redirect, state = opened[-1]
    await it.attempts.accept({"state": [state]}, cookies_of(redirect))
    redirect, state = opened[0]
    assert await it.refused(state, cookies_of(redirect)) == 400


async def test_nothing_secret_shows_in_a_repr(it: Scene) -> None:  # T45
    redirect, state = await it.open()
    assert state not in repr(redirect)
    assert redirect.cookie_value not in repr(redirect)
    assert state not in redirect.cookie_name


async def test_a_flow_on_another_device_shows_its_code_until_it_is_done(it: Scene) -> None:
    device = DeviceAuthorization(device_code="d", user_code="WXYZ", verification_uri="https://as.example/device")
    await it.flows.save(replace(flow("flow-2"), device=device))
    redirect = await it.attempts.open("linear", "flow-2")
    assert isinstance(redirect, DevicePrompt)
    assert redirect.device == device
    await it.flows.finish("flow-2", FlowStatus.DONE)
    redirect = await it.attempts.open("linear", "flow-2")
    assert isinstance(redirect, DevicePrompt)
    assert redirect.device is None
