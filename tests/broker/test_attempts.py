"""A browser's way from our link to the callback, on a real store."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from mcp_auth_proxy.broker.attempts import (
    AuthorizationAttempts,
    AuthorizationRedirect,
    ConfirmationPrompt,
    ConnectedServer,
    DevicePrompt,
    cookie_name,
    digest,
)
from mcp_auth_proxy.broker.forgotten_clients import ForgottenClients
from mcp_auth_proxy.broker.sign_ins import SignIns
from mcp_auth_proxy.broker.visits import LinkVisits
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, CallbackRefused
from mcp_auth_proxy.models import (
    Account,
    Attempt,
    DeviceAuthorization,
    Flow,
    FlowStatus,
    Registration,
    RegistrationKind,
)
from mcp_auth_proxy.oauth.authorization_code import challenge_s256
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.confirmations import Confirmations
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grants import Grants
from store.builders import NOW, flow, store_settings


class Clock:
    now: float = NOW + 1

    def __call__(self) -> float:
        return self.now


class Setup:
    """One pending flow, ``flow-1`` of the server linear, that ends 600 seconds after NOW."""

    def __init__(self, database: Engine) -> None:
        self.database = database
        self.flows = Flows(database)
        self.clock = Clock()
        self.visits = LinkVisits(clock=self.clock, first_only=False)
        self.registrations = 0
        self.can_register = True
        self.servers = {"linear": ServerSettings(name="linear", url="https://mcp.as.example/mcp")}
        self.attempts = self.with_flows(self.flows)

    def with_flows(self, flows: Flows) -> AuthorizationAttempts:
        sign_ins = SignIns(confirmations=Confirmations(self.database), grants=Grants(self.database), clock=self.clock)
        clients = ForgottenClients(
            servers=self.servers, flows=flows, register=self.register, start=flows.save, clock=self.clock
        )
        return AuthorizationAttempts(
            flows=flows, sign_ins=sign_ins, visits=self.visits, clients=clients, clock=self.clock
        )

    async def register(self, old: Flow) -> Registration:
        """Return a registration with another client, if the server offers that."""
        self.registrations += 1
        if not self.can_register:
            raise AuthorizationError("There is no registration here.")
        return replace(old.registration, client_id=f"new-{self.registrations}")

    async def open(self) -> tuple[AuthorizationRedirect, str]:
        """Open the link; return the redirect and its state."""
        opened = await self.attempts.open("linear", "flow-1")
        assert isinstance(opened, AuthorizationRedirect)
        return opened, query(opened)["state"]

    async def refused(self, state: str | list[str] | None, cookies: dict[str, str]) -> int:
        """The status with which a callback is refused."""
        params = {} if state is None else {"state": [state] if isinstance(state, str) else state}
        with pytest.raises(CallbackRefused) as refused:
            await self.attempts.accept({**params, "code": ["good"]}, cookies)
        return refused.value.status


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    database = await open_store(store_settings(tmp_path))
    setup = Setup(database)
    await setup.flows.save(linear())
    yield setup
    await database.close()


def linear() -> Flow:
    """A flow of a server that is on the site of its authorization server."""
    pending = flow()
    return replace(pending, key=replace(pending.key, upstream="https://mcp.as.example"))


def query(opened: AuthorizationRedirect) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(opened.authorization_url).query).items()}


def cookies_of(*attempts: AuthorizationRedirect) -> dict[str, str]:
    return {opened.cookie_name: opened.cookie_value for opened in attempts}


async def test_the_browser_that_opened_the_link_is_accepted(setup: Setup) -> None:
    opened, state = await setup.open()
    found, attempt, confirmed = await setup.attempts.accept({"state": [state], "code": ["x"]}, cookies_of(opened))
    assert (found.id, confirmed) == ("flow-1", False)
    assert challenge_s256(attempt.code_verifier) == query(opened)["code_challenge"]
    assert query(opened)["code_challenge_method"] == "S256"


async def test_each_attempt_has_its_own_secrets_and_does_not_affect_others(setup: Setup) -> None:
    (first, state), (second, other) = await setup.open(), await setup.open()
    assert state != other
    assert query(first)["code_challenge"] != query(second)["code_challenge"]
    assert first.cookie_name != second.cookie_name
    await setup.attempts.accept({"state": [state]}, cookies_of(first, second))
    await setup.attempts.accept({"state": [other]}, cookies_of(second))


async def test_a_callback_is_accepted_once(setup: Setup) -> None:  # T12
    opened, state = await setup.open()
    await setup.attempts.accept({"state": [state]}, cookies_of(opened))
    assert await setup.refused(state, cookies_of(opened)) == 400


async def test_a_callback_after_the_flow_has_expired_is_refused(setup: Setup) -> None:  # T12
    opened, state = await setup.open()
    setup.clock.now = NOW + 600
    assert await setup.refused(state, cookies_of(opened)) == 400


async def test_another_browser_is_refused_and_does_not_use_up_the_attempt(setup: Setup) -> None:  # T13
    opened, state = await setup.open()
    other, _ = await setup.open()
    wrong = [
        {},
        {opened.cookie_name: ""},
        {opened.cookie_name: "x"},
        {opened.cookie_name: digest(opened.cookie_value)},
        {opened.cookie_name: "\udcff"},
        {opened.cookie_name: other.cookie_value},
        cookies_of(other),
        {cookie_name("x"): opened.cookie_value},
    ]
    for cookies in wrong:
        assert await setup.refused(state, cookies) == 403
    await setup.attempts.accept({"state": [state]}, cookies_of(opened))


@pytest.mark.parametrize("kind", ["none", "empty", "unknown", "two", "hash", "prefix", "odd"])
async def test_a_bad_state_is_refused_whatever_the_cookie(setup: Setup, kind: str) -> None:  # T14
    opened, state = await setup.open()
    bad: dict[str, str | list[str] | None] = {
        "none": None,
        "empty": "",
        "unknown": "x" * 43,
        "two": [state, state],
        "hash": digest(state),
        "prefix": state[:-1],
        "odd": "\udcff\x00" * 1000,
    }
    assert await setup.refused(bad[kind], cookies_of(opened)) == 400
    await setup.attempts.accept({"state": [state]}, cookies_of(opened))


@pytest.mark.parametrize("status", [FlowStatus.DONE, FlowStatus.FAILED])
async def test_a_callback_for_a_flow_that_has_ended_is_refused(setup: Setup, status: FlowStatus) -> None:
    opened, state = await setup.open()
    assert await setup.flows.finish("flow-1", status)
    assert await setup.refused(state, cookies_of(opened)) == 400


@pytest.mark.parametrize(
    ("server", "flow_id", "status"),
    [("linear", "flow-2", 404), ("linear", "", 404), ("other", "flow-1", 404), ("", "flow-1", 404)],
)
async def test_an_unknown_link_is_refused(setup: Setup, server: str, flow_id: str, status: int) -> None:
    with pytest.raises(CallbackRefused) as refused:
        await setup.attempts.open(server, flow_id)
    assert refused.value.status == status


async def test_a_link_that_has_failed_says_so(setup: Setup) -> None:
    await setup.flows.finish("flow-1", FlowStatus.FAILED)
    for opened in (setup.attempts.open("linear", "flow-1"), setup.attempts.confirm("linear", "flow-1")):
        with pytest.raises(CallbackRefused, match="new one") as refused:
            await opened
        assert refused.value.status == 410


async def test_a_link_that_has_succeeded_says_that_the_server_is_connected(setup: Setup) -> None:
    await setup.flows.finish("flow-1", FlowStatus.DONE)
    assert await setup.attempts.open("linear", "flow-1") == ConnectedServer(
        server="linear", issuer="https://as.example"
    )
    with pytest.raises(CallbackRefused, match="Nothing is left to do"):
        await setup.attempts.confirm("linear", "flow-1")


class EndedMeanwhile(Flows):
    """End the flow after it was read and before the attempt is stored."""

    def __init__(self, database: Engine, end: Callable[[Flows], Awaitable[object]]) -> None:
        super().__init__(database)
        self._end = end

    async def add_attempt(self, attempt: Attempt) -> bool:
        await self._end(self)
        return await super().add_attempt(attempt)


@pytest.mark.parametrize(
    ("end", "status", "text"),
    [
        (lambda flows: flows.finish("flow-1", FlowStatus.DONE), 410, "connected"),
        (lambda flows: flows.cancel(Account("local", "linear")), 410, "new one"),
        (lambda flows: flows.purge(NOW + 86_400 * 40), 404, "new one"),
    ],
    ids=["done", "cancelled", "purged"],
)
async def test_a_link_that_ends_while_it_is_opened_says_so(
    setup: Setup, end: Callable[[Flows], Awaitable[object]], status: int, text: str
) -> None:
    attempts = setup.with_flows(EndedMeanwhile(setup.database, end))
    with pytest.raises(CallbackRefused, match=text) as refused:
        await attempts.open("linear", "flow-1")
    assert refused.value.status == status


async def test_a_link_that_is_too_old_says_so(setup: Setup) -> None:
    setup.clock.now = NOW + 600
    with pytest.raises(CallbackRefused) as refused:
        await setup.attempts.open("linear", "flow-1")
    assert refused.value.status == 410


async def test_the_cookie_lives_no_longer_than_the_flow(setup: Setup) -> None:
    opened, _ = await setup.open()
    assert opened.max_age == 599
    setup.clock.now = NOW + 599.9
    opened, _ = await setup.open()
    assert opened.max_age == 1


async def test_many_attempts_by_others_do_not_end_an_earlier_or_a_later_one(setup: Setup) -> None:  # T89
    opened = []
    for number in range(401):
        setup.clock.now += 0.1
        if number in (0, 200, 400):
            opened.append(await setup.open())
        else:
            await setup.open()
    for redirect, state in opened:
        await setup.attempts.accept({"state": [state]}, cookies_of(redirect))


async def test_who_has_confirmed_is_known_at_the_callback_and_can_not_be_claimed(setup: Setup) -> None:  # T78
    redirect = await setup.attempts.confirm("linear", "flow-1")
    assert isinstance(redirect, AuthorizationRedirect)
    cookies, state = cookies_of(redirect), query(redirect)["state"]
    assert (await setup.attempts.accept({"state": [state]}, cookies)).confirmed
    opened, state = await setup.open()
    name, value = opened.cookie_name, opened.cookie_value
    assert await setup.refused(state, {name: f"confirmed.{value}"}) == 403
    assert not (await setup.attempts.accept({"state": [state]}, {name: value})).confirmed


async def test_no_secret_is_shown_in_a_repr(setup: Setup) -> None:  # T45
    opened, state = await setup.open()
    assert state not in repr(opened)
    assert opened.cookie_value not in repr(opened)
    assert state not in opened.cookie_name


async def test_a_flow_on_another_device_shows_its_code_until_it_is_done(setup: Setup) -> None:
    device = DeviceAuthorization(device_code="d", user_code="WXYZ", verification_uri="https://as.example/device")
    await setup.flows.save(replace(flow("flow-2"), device=device))
    opened = await setup.attempts.open("linear", "flow-2")
    assert isinstance(opened, DevicePrompt)
    assert opened.device == device
    await setup.flows.finish("flow-2", FlowStatus.DONE)
    assert await setup.attempts.open("linear", "flow-2") == ConnectedServer(
        server="linear", issuer="https://as.example"
    )


# a client that the authorization server may have forgotten


async def client_of(setup: Setup) -> str:
    """Open the link; return the client id that the browser is sent to sign in with."""
    return query((await setup.open())[0])["client_id"]


async def test_the_second_visit_registers_again_and_later_ones_use_that_client(setup: Setup) -> None:
    first = linear().registration.client_id
    assert [await client_of(setup) for _ in range(4)] == [first, "new-1", "new-1", "new-1"]


async def test_visits_at_once_register_once(setup: Setup) -> None:
    await setup.open()
    assert await asyncio.gather(*(client_of(setup) for _ in range(5))) == ["new-1"] * 5


async def test_the_visits_of_both_clients_can_be_finished(setup: Setup) -> None:
    visits = [await setup.open() for _ in range(3)]
    for (opened, state), client in zip(visits, (linear().registration.client_id, "new-1", "new-1"), strict=True):
        accepted = await setup.attempts.accept({"state": [state], "code": ["x"]}, cookies_of(opened))
        assert accepted.flow.registration.client_id == client


async def test_a_link_whose_follower_has_succeeded_says_so(setup: Setup) -> None:
    await setup.open()
    opened, state = await setup.open()
    accepted = await setup.attempts.accept({"state": [state], "code": ["x"]}, cookies_of(opened))
    await setup.flows.finish(accepted.flow.id, FlowStatus.DONE)
    assert isinstance(await setup.attempts.open("linear", "flow-1"), ConnectedServer)


async def test_a_server_that_registers_no_more_is_asked_once_and_the_old_client_is_kept(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    setup.can_register = False
    assert {await client_of(setup) for _ in range(4)} == {linear().registration.client_id}
    assert setup.registrations == 1
    assert "mcp-auth-proxy logout linear --forget-client" in caplog.text


async def test_the_log_names_a_server_without_a_configuration_by_its_url(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    setup.servers["linear"] = replace(setup.servers["linear"], from_url=True)
    await client_of(setup)
    await client_of(setup)
    assert caplog.text.rstrip().endswith("run: mcp-auth-proxy logout https://mcp.as.example/mcp --forget-client")


async def test_a_configured_client_is_never_replaced(setup: Setup) -> None:
    pending = linear()
    await setup.flows.save(
        replace(pending, registration=replace(pending.registration, kind=RegistrationKind.CONFIGURED))
    )
    assert {await client_of(setup) for _ in range(3)} == {pending.registration.client_id}
    assert setup.registrations == 0


async def test_a_page_that_asks_first_registers_nothing_until_it_is_confirmed(setup: Setup) -> None:
    setup.visits.first_only = True
    setup.visits.started(linear())
    assert [await shown(setup) for _ in range(3)] == [False] * 3
    confirmed = await setup.attempts.confirm("linear", "flow-1")
    assert isinstance(confirmed, AuthorizationRedirect)
    assert query(confirmed)["client_id"] == linear().registration.client_id
    assert [await shown(setup) for _ in range(3)] == [True] * 3
    assert setup.registrations == 0
    confirmed = await setup.attempts.confirm("linear", "flow-1")
    assert isinstance(confirmed, AuthorizationRedirect)
    assert query(confirmed)["client_id"] == "new-1"


async def shown(setup: Setup) -> bool:
    """Open the link, which must ask first, under its own flow; return whether that says that it was visited."""
    opened = await setup.attempts.open("linear", "flow-1")
    assert isinstance(opened, ConfirmationPrompt)
    assert opened.flow_id == "flow-1"
    return opened.visited
