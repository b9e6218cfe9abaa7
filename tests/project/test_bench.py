"""The benchmark measures what it says: its origin is protected, its load is counted, its verdicts are right."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import backend, certificates, load, measures, refresh_storm, report
from bench.__main__ import FULL, parser, plan_for
from bench.backend import ROOT, Backend
from bench.callers import CallerResults, issuer, prepare
from bench.contenders import (
    Contender,
    Endpoint,
    available,
    check_checkout,
    configuration,
    direct,
    nginx_static,
    ours,
    source_path,
)
from bench.engines import sqlite
from bench.grant_lists import FILTERS, page_seconds
from bench.measures import Speed, UnexpectedResponse
from bench.origin import LAG, TOKEN
from bench.processes import free_port
from bench.results import Results, caller_targets, targets
from bench.run import Plan, Run
from bench.workloads import APART, BODY, EVENT_STREAMS, EVENTS, JSON, LAST_CHUNK, TLS, WORKLOADS
from mcp_auth_proxy.config.load import load as load_settings

BLOB = 1_000_000
FROM_ORIGIN = [workload.key for workload in WORKLOADS if workload is not TLS]


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[int]:
    child = backend.start_origin(tmp_path, port := free_port(), BLOB)
    try:
        yield port
    finally:
        child.stop()


@pytest.fixture
def upstreams(tmp_path: Path) -> Iterator[Backend]:
    with backend.running(tmp_path, BLOB) as behind:
        yield behind


def bare(port: int, path: str = "/mcp") -> Contender:
    """Return an endpoint to which nobody brings the token."""
    return Contender("bare", {"json": Endpoint(port, path)})


@pytest.mark.parametrize("workload", FROM_ORIGIN)
def test_the_origin_answers_the_tool_call_in_each_form(tmp_path: Path, origin: int, workload: str) -> None:
    measures.verify(direct(tmp_path, Backend(origin, origin)), workload)


@pytest.mark.parametrize("path", ["/mcp", *EVENT_STREAMS])
def test_the_origin_refuses_a_request_without_the_token(origin: int, path: str) -> None:
    with pytest.raises(UnexpectedResponse, match="401"):
        measures.verify(bare(origin, path), "json")


def request(path: str) -> bytes:
    fields = [f"POST {path} HTTP/1.1", "host: localhost", f"authorization: Bearer {TOKEN}"]
    return "\r\n".join([*fields, f"content-length: {len(BODY)}", "", BODY]).encode()


def test_the_end_of_an_event_stream_comes_apart_from_the_event(origin: int) -> None:
    event, end = EVENT_STREAMS["/apart"]
    with socket.create_connection(("127.0.0.1", origin), timeout=5) as connection:
        connection.sendall(request("/apart"))
        assert connection.recv(65536) == event
        assert connection.recv(65536) == end == LAST_CHUNK


def test_the_end_of_an_event_stream_comes_without_further_connections(origin: int) -> None:
    answer = b"".join(EVENT_STREAMS["/apart"])
    with socket.create_connection(("127.0.0.1", origin), timeout=5) as connection:
        for _ in range(LAG * 2):
            connection.sendall(request("/apart"))
            received = b""
            while len(received) < len(answer):
                received += connection.recv(65536)
            assert received == answer


def test_a_request_in_pieces_is_answered_as_one_that_comes_whole(origin: int) -> None:
    whole = request("/events")
    with socket.create_connection(("127.0.0.1", origin), timeout=5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in (20, len(whole) - len(BODY), len(whole) - 1):
            connection.sendall(whole[:at])
            connection.sendall(whole[at:])
            assert connection.recv(65536) == EVENT_STREAMS["/events"][0]


def test_the_large_body_comes_whole(tmp_path: Path, origin: int) -> None:
    assert measures.download_rate(direct(tmp_path, Backend(origin, origin)), BLOB) > 0
    with pytest.raises(UnexpectedResponse):
        measures.download_rate(direct(tmp_path, Backend(origin, origin)), BLOB * 2)


def test_the_generator_in_python_counts_requests_and_errors(
    tmp_path: Path, origin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "WRK", None)
    endpoints = direct(tmp_path, Backend(origin, origin)).endpoints
    for workload in FROM_ORIGIN:
        done = load.run(endpoints[workload], connections=2, seconds=0.2)
        assert done.requests > 10
        assert done.errors == 0
        assert 0 < done.p50 <= done.p99 < 0.2
    assert load.run(Endpoint(origin, "/mcp"), connections=1, seconds=0.1).errors > 0


@pytest.mark.wrk
def test_wrk_counts_requests_and_errors(tmp_path: Path, origin: int) -> None:
    done = load.run(direct(tmp_path, Backend(origin, origin)).endpoints["apart"], connections=32, seconds=1)
    assert done.requests > 100
    assert done.errors == 0
    assert load.run(Endpoint(origin, "/mcp"), connections=1, seconds=1).errors > 0


@pytest.mark.nginx
def test_nginx_serves_and_forwards_each_workload(tmp_path: Path, upstreams: Backend) -> None:
    with pytest.raises(UnexpectedResponse, match="401"):
        measures.verify(bare(upstreams.upstream), "json")
    proxy = nginx_static(tmp_path, upstreams)
    try:
        for workload in WORKLOADS:
            measures.verify(direct(tmp_path, upstreams), workload.key)
            measures.verify(proxy, workload.key)
        assert measures.download_rate(proxy, BLOB) > 0
        (per_stream,) = measures.stream_memory(proxy, [5])
        assert per_stream < 1_000_000
    finally:
        proxy.stop()


@pytest.mark.nginx
def test_nginx_verifies_the_upstream_behind_tls(tmp_path: Path, upstreams: Backend) -> None:
    (other := tmp_path / "other").mkdir()
    foreign = certificates.create(other).authority
    proxy = nginx_static(tmp_path, Backend(upstreams.upstream, upstreams.origin, upstreams.tls, foreign))
    try:
        with pytest.raises(UnexpectedResponse, match="502"):
            measures.verify(proxy, "tls")
    finally:
        proxy.stop()


@pytest.mark.nginx
def test_the_generator_in_python_speaks_tls(
    tmp_path: Path, upstreams: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "WRK", None)
    done = load.run(direct(tmp_path, upstreams).endpoints["tls"], connections=2, seconds=0.2)
    assert done.requests > 10
    assert done.errors == 0


@pytest.mark.nginx
@pytest.mark.wrk
def test_two_checkouts_are_measured_in_turns(tmp_path: Path, upstreams: Backend) -> None:
    contenders = {name: start for name, start in available(against=ROOT).items() if name in ("before", "ours")}
    plan = Plan((EVENTS, TLS), rounds=1, seconds=1.0, rates_only=True)
    results = Run(plan, tmp_path, upstreams, contenders).measure()
    assert results.names["before"].startswith("mcp-auth-proxy at ")
    assert set(results.rounds) == {(name, key, 32) for name in ("before", "ours") for key in ("events", "tls")}
    assert all(one.cpu for rounds in results.rounds.values() for one in rounds)


def test_the_proxy_forwards_each_workload(tmp_path: Path, upstreams: Backend) -> None:
    proxy = ours(tmp_path, upstreams)
    try:
        for workload in proxy.endpoints.keys() - {"blob", "stream"}:
            measures.verify(proxy, workload)
    finally:
        proxy.stop()


def test_a_folder_without_the_source_is_not_taken_for_another_checkout(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no mcp_auth_proxy"):
        check_checkout(tmp_path)
    assert check_checkout(ROOT).startswith("mcp-auth-proxy at ")
    assert source_path(tmp_path) == {"PYTHONPATH": f"{tmp_path}/src"}


def test_the_configuration_is_one_that_the_proxy_accepts(tmp_path: Path) -> None:
    authority = certificates.create(tmp_path).authority
    file = tmp_path / "config.yaml"
    file.write_text(configuration(8787, Backend(9001, 9002, 9003, authority), 3))
    settings = load_settings(file, environ={"BENCH_CLIENT_SECRET": "s"})
    assert settings.outbound.ca_bundle == authority
    assert list(settings.servers) == ["json", "blob", "events", "apart", "parts", "stream", "tls", "s1", "s2"]


def test_options_choose_what_is_measured() -> None:
    assert plan_for(parser().parse_args([])) == FULL
    plan = plan_for(parser().parse_args(["--smoke", "--workloads", "json,apart", "--rounds", "3", "--rates"]))
    assert (plan.workloads, plan.rounds, plan.rates_only) == ((JSON, APART), 3, True)


def found(ours_rates: list[float], nginx_rates: list[float]) -> Results:
    return Results(
        names={"direct": "direct", "nginx": "nginx", "before": "mcp-auth-proxy at 1234567", "ours": "mcp-auth-proxy"},
        rounds={
            ("direct", "json", 1): [Speed(1000, 0.0001, 0.0002, None)],
            ("ours", "json", 1): [Speed(900, 0.0002, 0.0004, 0.00004)],
            ("ours", "json", 32): [Speed(rate, 0.001, 0.002, 0.00003) for rate in ours_rates],
            ("nginx", "json", 32): [Speed(rate, 0.001, 0.002, 0.00001) for rate in nginx_rates],
            ("ours", "apart", 32): [Speed(15_000, 0.001, 0.002, 0.00005)],
            ("before", "apart", 32): [Speed(10_000, 0.001, 0.002, 0.00006)],
            ("nginx", "apart", 32): [Speed(40_000, 0.001, 0.002, 0.00001)],
        },
        servers={1: 0.0001, 10_000: 0.0001},
    )


def test_the_verdict_on_a_number_follows_its_bound() -> None:
    met = {target.what: target.met for target in targets(found([20_000], [60_000]), 32, 2000)}
    assert met["JSON: requests/s over nginx, 32 connections"] is True
    assert met["JSON: CPU per request, 32 connections"] is True
    assert met["event stream, end apart: requests/s over nginx, 32 connections"] is True
    assert met["event stream, end apart: CPU per request, 32 connections"] is False
    assert met["p50 added over direct, 1 connection"] is True
    assert met["requests/s over FastMCP's proxy, 32 connections"] is None
    under = {target.what: target.met for target in targets(found([6_000], [60_000]), 32, 2000)}
    assert under["JSON: requests/s over nginx, 32 connections"] is False


def test_a_share_is_the_median_of_the_shares_of_each_round() -> None:
    results = found([10_000, 20_000, 16_000], [20_000, 60_000, 40_000])
    assert results.ratio("ours", "nginx", "json", 32) == 0.4


def test_before_and_after_stand_in_one_table() -> None:
    table = report.target_table(found([20_000], [60_000]), 32, 2000)
    (row,) = (line for line in table.splitlines() if line.startswith("| event stream, end apart: CPU"))
    assert [cell.strip() for cell in row.strip("|").split("|")[1:]] == ["60 µs", "50 µs", "≤ 42 µs", "MISS"]


def test_what_was_written_by_hand_survives_a_new_run(tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    report.write(file, report.render(found([20_000], [60_000]), 32, [1000, 2000]))
    file.write_text(file.read_text() + "The profile shows nothing odd.\n")
    report.write(file, "new numbers")
    assert "new numbers" in file.read_text()
    assert "The profile shows nothing odd." in file.read_text()
    assert "mcp-auth-proxy" not in file.read_text().partition("<!--")[0]


def test_callers_are_compared_round_by_round_and_at_the_quietest() -> None:
    def of(rate: float, cpu: float) -> Speed:
        return Speed(rate, 0.001, 0.002, cpu)

    found = CallerResults(
        pairs={
            "jwt": [
                (of(1000.0, 60e-6), of(500.0, 90e-6)),
                (of(2000.0, 40e-6), of(1900.0, 45e-6)),
                (of(2000.0, 41e-6), of(1920.0, 42e-6)),
            ]
        },
        pages={"": 0.01, "state=ended": 0.04},
    )
    assert found.share("jwt") == 0.95
    assert found.cpu("jwt") == pytest.approx(2e-6)
    assert (found.share("api_key"), found.cpu("api_key")) == (None, None)
    verdicts = {target.what: target.met for target in caller_targets(found)}
    assert verdicts["requests/s with callers over without"] is True
    assert verdicts["CPU per request added by callers"] is True
    assert verdicts["a page of 0 grants, any filter"] is False


def test_a_page_of_every_filter_is_asked_for(tmp_path: Path, upstreams: Backend) -> None:
    with issuer() as provider:
        prepared = prepare(tmp_path, upstreams, mode="api_key", provider=provider, principals=8, grants=60)
        running = prepared.start()
    try:
        pages = page_seconds(running.endpoints["json"])
    finally:
        running.stop()
    assert tuple(pages) == FILTERS
    assert all(0 < seconds < 10 for seconds in pages.values())


def test_grants_that_expire_together_stay_within_the_rate_and_none_is_lost(tmp_path: Path) -> None:
    storm = refresh_storm.measure(tmp_path / "storm", sqlite, grants=40, rate=40)
    assert (storm.lost, storm.early, storm.late) == (0, 0, 0)
    assert 1 <= storm.most <= 40
    assert storm.seconds >= refresh_storm.RETRY_AFTER


def test_requests_are_counted_in_any_second() -> None:
    assert refresh_storm.most_in_a_second([0.0, 0.1, 0.95, 1.05, 1.09, 3.0]) == 4
    assert refresh_storm.most_in_a_second([]) == 0
