"""Counters, gauges and histograms, and the text that Prometheus reads."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.observability.instruments import (
    Computed,
    Counter,
    Gauge,
    Registry,
    Requests,
    format_number,
)


@pytest.fixture
def registry() -> Registry:
    return Registry()


def requests_in(registry: Registry) -> Requests:
    return Requests(
        registry,
        "requests_total",
        "Requests.",
        ("server", "kind"),
        duration_name="seconds",
        duration_text="Seconds.",
        bounds=(0.1, 1, 2.5),
    )


def test_a_counter_without_labels_starts_at_0(registry: Registry) -> None:
    counter = Counter(registry, "failures_total", "Failures.")
    assert registry.render() == "# HELP failures_total Failures.\n# TYPE failures_total counter\nfailures_total 0\n"
    counter.labels().inc()
    counter.labels().value += 2
    assert registry.render().endswith("\nfailures_total 3\n")


def test_each_combination_of_label_values_has_a_child_of_its_own(registry: Registry) -> None:
    gauge = Gauge(registry, "open", "Open things.", ("server", "state"))
    assert registry.render() == ""  # nothing is known yet
    held = gauge.labels("a", "held")
    assert gauge.labels("a", "held") is held
    held.inc(3)
    held.dec()
    gauge.labels("b", "free").value = 0.5
    assert registry.render() == (
        "# HELP open Open things.\n# TYPE open gauge\n"
        'open{server="a",state="held"} 2\nopen{server="b",state="free"} 0.5\n'
    )
    with pytest.raises(ValueError, match="server"):
        gauge.labels("a")


def test_computed_numbers_are_asked_for_at_each_scrape_until_their_owner_is_gone(registry: Registry) -> None:
    computed = Computed(registry, "tokens", "Tokens.", ("state",), kind="counter")
    numbers: dict[tuple[str, ...], float] = {("valid",): 1.0}
    end_first = computed.add_source(lambda: numbers)
    computed.add_source(lambda: {("valid",): 10, ("expired",): 5})
    head = "# HELP tokens Tokens.\n# TYPE tokens counter\n"
    assert registry.render() == f'{head}tokens{{state="valid"}} 11\ntokens{{state="expired"}} 5\n'
    numbers["valid",] = 2
    assert 'tokens{state="valid"} 12' in registry.render()
    end_first()
    end_first()
    assert 'tokens{state="valid"} 10' in registry.render()


def test_requests_are_counted_by_status_and_duration_in_one_call(registry: Registry) -> None:
    series = requests_in(registry).labels("a", "post")
    assert registry.render() == ""
    for status, seconds in ((200, 0.05), (200, 0.1), (503, 0.2), (200, 2.5), (200, 99)):
        series.finished(status, seconds)
    assert registry.render() == (
        "# HELP requests_total Requests.\n"
        "# TYPE requests_total counter\n"
        'requests_total{server="a",kind="post",status="200"} 4\n'
        'requests_total{server="a",kind="post",status="503"} 1\n'
        "# HELP seconds Seconds.\n"
        "# TYPE seconds histogram\n"
        'seconds_bucket{server="a",kind="post",le="0.1"} 2\n'
        'seconds_bucket{server="a",kind="post",le="1"} 3\n'
        'seconds_bucket{server="a",kind="post",le="2.5"} 4\n'
        'seconds_bucket{server="a",kind="post",le="+Inf"} 5\n'
        'seconds_sum{server="a",kind="post"} 101.85\n'
        'seconds_count{server="a",kind="post"} 5\n'
    )


def test_undefined_statuses_are_counted_as_other(registry: Registry) -> None:
    series = requests_in(registry).labels("a", "post")
    for status in (*range(600, 1000), 299, 200, 499):
        series.finished(status, 0)
    assert re.findall(r'status="(\w+)"} (\d+)', registry.render()) == [("other", "401"), ("200", "1"), ("499", "1")]


def test_a_server_that_is_gone_is_forgotten_everywhere(registry: Registry) -> None:
    gauge = Gauge(registry, "open", "Open.", ("kind", "server"))
    other = Counter(registry, "total", "Total.", ("kind",))
    requests = requests_in(registry)
    computed = Computed(registry, "computed", "Computed.", ("server",))
    computed.add_source(dict)
    for server in ("a", "b"):
        gauge.labels("x", server).inc()
        requests.labels(server, "post").finished(200, 1)
    other.labels("a").inc()
    gone = gauge.labels("x", "a")
    registry.forget_server("a")
    assert 'server="a"' not in registry.render()
    assert registry.render().count('server="b"') == 8
    assert 'total{kind="a"} 1' in registry.render()
    gone.dec()  # a request that ends later disturbs nobody
    assert 'server="a"' not in registry.render()


# The text format


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (-1.0, "-1"),
        (0.1, "0.1"),
        (1e15, "1000000000000000"),
        (1e300, "1e+300"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
        (math.nan, "NaN"),
    ],
)
def test_numbers_are_as_go_reads_them(number: float, text: str) -> None:
    assert format_number(number) == text


@given(st.floats())
def test_no_number_loses_precision(number: float) -> None:
    read = float(format_number(number))
    assert read == number or (math.isnan(read) and math.isnan(number))


def test_help_is_escaped(registry: Registry) -> None:
    Counter(registry, "total", 'One \\ two\nthree "four"')
    assert registry.render().splitlines()[0] == r'# HELP total One \\ two\nthree "four"'


_ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_every_label_value_comes_back_as_it_was(value: str) -> None:
    registry = Registry()
    Counter(registry, "total", "Total.", ("server",)).labels(value).inc()
    lines = registry.render().split("\n")
    assert len(lines) == 4
    found = re.fullmatch(r'total\{server="((?:[^"\\]|\\.)*)"\} 1', lines[2], re.DOTALL)
    assert found is not None
    assert re.sub(r"\\.", lambda escape: _ESCAPES[escape[0]], found[1]) == value
