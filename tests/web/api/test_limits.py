"""Token buckets: so many at once, then so many a second, for each key."""

from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.web.api.limits import MAX_BUCKETS, Rate, RateLimit


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(0, 3), max_size=60), st.integers(1, 10), st.floats(0.1, 10))
def test_no_more_pass_than_the_rate_allows(steps: list[float], burst: int, per_second: float) -> None:
    clock = Clock()
    limit = RateLimit(Rate(burst, per_second), clock=clock)
    passed = 0
    for step in steps:
        clock.now += step
        wait = limit.take("a")
        assert wait >= 0
        passed += not wait
    assert passed <= burst + (clock.now - 1000.0) * per_second + 1e-6


def test_the_time_to_wait_is_exact_and_a_clock_that_is_set_back_gives_nothing() -> None:
    clock = Clock()
    limit = RateLimit(Rate(2, 0.5), clock=clock)
    assert [limit.take("a"), limit.take("a"), limit.take("a")] == [0, 0, 2]
    assert limit.take("b") == 0
    clock.now += 1
    assert limit.take("a") == 1
    clock.now -= 500
    assert limit.take("a") == 2
    clock.now += 501
    assert limit.take("a") == 0


def test_the_number_of_buckets_is_bounded() -> None:
    limit = RateLimit(Rate(1, 1), clock=Clock())
    for key in range(MAX_BUCKETS + 1):
        assert limit.take(key) == 0
    assert limit.take(MAX_BUCKETS) == 1
    assert limit.take(0) == 0
