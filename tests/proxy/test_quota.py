"""Memory and places that all requests share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.proxy.quota import SMALL, MemoryBudget, Quota, RequestMemory

LIMIT = 16 * SMALL


def test_one_server_gets_everything_and_one_of_several_gets_half() -> None:  # T82
    quota = Quota(10, several=False)
    assert [quota.take("a", 10), quota.take("a", 1)] == [True, False]
    quota.give_back("a", 10)
    quota.configure(10, several=True)
    assert [quota.take("a", 5), quota.take("a", 1), quota.take("b", 5), quota.take("c", 1)] == [
        True,
        False,
        True,
        False,
    ]
    quota.give_back("b", 5)
    assert [quota.take("c", 1), quota.used] == [True, 6]


def test_one_of_several_gets_at_least_one_place() -> None:
    assert Quota(1, several=True).take("a", 1)


def test_a_lower_limit_holds_for_what_is_taken_from_then_on() -> None:
    quota = Quota(10, several=False)
    assert quota.take("a", 10)
    quota.configure(5, several=False)
    quota.give_back("a", 4)
    assert not quota.take("a", 1)
    quota.give_back("a", 2)
    assert quota.take("a", 1)


def test_large_requests_leave_a_quarter_to_small_ones() -> None:  # T82
    budget = MemoryBudget(LIMIT, several=False)
    assert (budget.limit, budget.limit_of_fast) == (LIMIT * 3 // 4, LIMIT // 4)
    large, other, small = (RequestMemory(budget, "a") for _ in range(3))
    assert large.take(LIMIT // 2)
    # It becomes large with its second part.
    assert [other.take(SMALL), other.take(1), small.take(SMALL)] == [True, False, True]
    large.release()
    assert [other.take(1), budget.large, budget.used] == [True, SMALL + 1, 2 * SMALL + 1]
    other.give_back(1)
    assert (budget.large, other.size) == (0, SMALL)


@pytest.mark.parametrize("several", [False, True])
def test_the_largest_request_fits_alone_and_no_larger_one(several: bool) -> None:
    budget = MemoryBudget(LIMIT, several=several)
    assert budget.largest == LIMIT // 2
    assert RequestMemory(budget, "a").take(LIMIT // 2)
    assert not RequestMemory(MemoryBudget(LIMIT, several=several), "a").take(LIMIT // 2 + 1)


def test_a_small_budget_is_for_small_requests() -> None:
    assert MemoryBudget(SMALL, several=False).largest == SMALL * 3 // 4
    assert MemoryBudget(10, several=True).largest == 5


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3 * SMALL), st.booleans()), max_size=60))
def test_nothing_is_lost_or_given_twice(steps: list[tuple[int, int, bool]]) -> None:
    budget = MemoryBudget(LIMIT, several=True)
    requests = [RequestMemory(budget, server) for server in "aabb"]
    for number, size, gives_back in steps:
        request = requests[number]
        if gives_back:
            request.give_back(min(size, request.size))
        else:
            request.take(size)
        assert budget.total == sum(one.size for one in requests) <= budget.limit
        assert budget.large == sum(one.size for one in requests if one.size > SMALL)
    for request in requests:
        request.release()
    assert (budget.used, budget.large) == (0, 0)
