"""Repeated authorizations for the same scopes are bounded, over all requests."""

import pytest

from mcp_auth_proxy.broker.step_up import MAX_AUTHORIZATIONS, REMEMBERED, StepUpLimiter
from mcp_auth_proxy.errors import AuthorizationError

KEY = ("local", "files")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def count(step_ups: StepUpLimiter, asked: str, already: str = "read write", key: tuple[str, str] = KEY) -> None:
    step_ups.count(key, server="files", requested=asked.split(), already=already.split())


def exhausted(clock: Clock) -> StepUpLimiter:
    """As many as there may be after the first authorization, which is no step-up."""
    step_ups = StepUpLimiter(clock=clock)
    for _ in range(MAX_AUTHORIZATIONS - 1):
        count(step_ups, "write")
    return step_ups


def test_the_same_scopes_are_asked_for_three_times_in_all() -> None:  # T19
    step_ups = exhausted(Clock())

    with pytest.raises(AuthorizationError, match=r"Server files keeps asking .*RFC 6750 §3\.1.*: write\."):
        count(step_ups, "write")


def test_a_challenge_without_scopes_asks_for_nothing_new() -> None:
    step_ups = exhausted(Clock())

    with pytest.raises(AuthorizationError, match="asked for last: none"):
        count(step_ups, "", already="")


def test_each_server_has_its_own_count() -> None:
    step_ups = exhausted(Clock())

    count(step_ups, "write", key=("local", "mail"))


def test_a_new_scope_resets_the_count() -> None:
    step_ups = exhausted(Clock())

    count(step_ups, "write admin")
    count(step_ups, "admin", already="read write admin")


def test_after_ten_minutes_the_server_may_ask_again() -> None:
    clock = Clock()
    step_ups = exhausted(clock)

    clock.now += REMEMBERED
    count(step_ups, "write")
