"""When to begin with many tokens that expire together: none too late, and none without need."""

from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.broker.early_renewal import GROUP, HEADROOM, RESERVE, begin_at, group


def test_few_tokens_begin_shortly_before_they_expire() -> None:
    assert begin_at({group(3_000.0): 10}, 10.0) == {300: 3_000.0 - RESERVE - HEADROOM}


def test_a_minute_with_ten_thousand_begins_as_early_as_they_take() -> None:
    counts = dict.fromkeys(range(1_000, 1_006), 10_000 // 6)
    begins = begin_at(counts, 10.0)
    assert 10_000 - RESERVE - 10_000 * HEADROOM / 10 - GROUP * 6 < begins[1_000] < begins[1_005]
    assert begins[1_000] < 10_000 - 10_000 / 10


@given(st.dictionaries(st.integers(0, 500), st.integers(1, 3_000), max_size=30), st.floats(0.1, 1_000))
def test_whoever_begins_in_time_and_goes_in_order_is_never_late(counts: dict[int, int], rate: float) -> None:
    begins = begin_at(counts, rate)
    now = min(begins.values(), default=0.0)
    for number in sorted(counts):
        now = max(now, begins[number]) + counts[number] / rate
        assert now <= number * GROUP - RESERVE + 1e-3
