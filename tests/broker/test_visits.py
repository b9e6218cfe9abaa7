"""Which visit of a link goes on directly (T89)."""

from dataclasses import replace

import pytest

from mcp_auth_proxy.broker.visits import DIRECT_SECONDS, LinkVisits
from store.builders import NOW, flow


class Clock:
    now: float = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def visits(clock: Clock) -> LinkVisits:
    return LinkVisits(clock=clock, first_only=True)


def test_the_first_visit_after_a_link_was_opened_goes_on(visits: LinkVisits, clock: Clock) -> None:
    visits.started(flow())
    visits.opened(flow())
    clock.now += DIRECT_SECONDS
    assert [visits.is_direct(flow()) for _ in range(3)] == [True, False, False]
    clock.now += 60
    assert not visits.is_direct(flow())
    # Opened again, by login.
    visits.opened(flow())
    assert [visits.is_direct(flow()) for _ in range(3)] == [True, False, False]


def test_a_late_visit_does_not(visits: LinkVisits, clock: Clock) -> None:
    visits.started(flow())
    visits.opened(flow())
    clock.now += DIRECT_SECONDS + 0.1
    assert not visits.is_direct(flow())


def test_a_link_that_nobody_opened_does_not(visits: LinkVisits, clock: Clock) -> None:
    visits.started(flow())
    visits.opened(flow("flow-2"))
    assert not visits.is_direct(flow())
    clock.now += DIRECT_SECONDS + 0.1
    assert not visits.is_direct(flow())


@pytest.mark.parametrize(("late", "directly"), [(0.0, True), (DIRECT_SECONDS, True), (DIRECT_SECONDS + 0.1, False)])
def test_the_link_of_a_login_counts_as_opened_when_it_is_made(
    visits: LinkVisits, clock: Clock, late: float, directly: bool
) -> None:
    clock.now += late
    assert [visits.is_direct(flow()) for _ in range(3)] == [directly, False, False]


def test_all_visits_go_on_if_links_are_never_opened(clock: Clock) -> None:
    visits = LinkVisits(clock=clock, first_only=False)
    visits.started(flow())
    assert all(visits.is_direct(flow()) for _ in range(3))
    visits.first_only = True
    assert not visits.is_direct(flow())


def test_nothing_is_kept_for_long(visits: LinkVisits, clock: Clock) -> None:
    for number in range(1000):
        clock.now += 1
        visits.is_direct(replace(flow(), id=str(number)))
    assert len(visits._awaited) <= DIRECT_SECONDS + 1
