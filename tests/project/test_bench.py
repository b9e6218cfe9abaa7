"""The benchmark measures what it says: its origin is protected, its generator counts, its verdicts are right."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import load, measures, nginx, report
from bench.contenders import ROOT, Backend, Contender, configuration, direct, nginx_static
from bench.measures import Speed
from bench.processes import Child, free_port
from mcp_auth_proxy.config.load import load as load_settings

BLOB = 1_000_000


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[int]:
    port = free_port()
    child = Child([sys.executable, str(ROOT / "bench/origin.py"), str(port), str(BLOB)], log=tmp_path / "origin.log")
    try:
        child.wait_for(port)
        yield port
    finally:
        child.stop()


def test_the_origin_answers_the_tool_call_of_one_who_brings_the_token(tmp_path: Path, origin: int) -> None:
    measures.verify(direct(tmp_path, Backend(origin, origin)))


def test_the_origin_turns_away_one_who_brings_none(origin: int) -> None:
    with pytest.raises(measures.Wrong, match="401"):
        measures.verify(Contender("bare", origin, "/mcp", (), None, 0.0))


def test_the_large_body_comes_whole(tmp_path: Path, origin: int) -> None:
    assert measures.download_rate(direct(tmp_path, Backend(origin, origin)), "/blob", BLOB) > 0
    with pytest.raises(measures.Wrong):
        measures.download_rate(direct(tmp_path, Backend(origin, origin)), "/blob", BLOB * 2)


def test_our_own_generator_counts_requests_and_errors(
    tmp_path: Path, origin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "WRK", None)
    seen = load.run(direct(tmp_path, Backend(origin, origin)), connections=2, seconds=0.2)
    assert seen.requests > 10
    assert seen.errors == 0
    assert 0 < seen.p50 <= seen.p99 < 0.2
    assert load.run(Contender("bare", origin, "/mcp", (), None, 0.0), connections=1, seconds=0.1).errors > 0


@pytest.mark.wrk
def test_wrk_counts_requests_and_errors(tmp_path: Path, origin: int) -> None:
    seen = load.run(direct(tmp_path, Backend(origin, origin)), connections=2, seconds=1)
    assert seen.requests > 100
    assert seen.errors == 0
    assert load.run(Contender("bare", origin, "/mcp", (), None, 0.0), connections=1, seconds=1).errors > 0


@pytest.mark.nginx
def test_nginx_stands_on_both_sides(tmp_path: Path, origin: int) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(bytes(BLOB))
    port = free_port()
    upstream = nginx.start_upstream(tmp_path, port, issuer=f"http://127.0.0.1:{origin}", blob=blob)
    try:
        with pytest.raises(measures.Wrong, match="401"):
            measures.verify(Contender("bare", port, "/mcp", (), None, 0.0))
        proxy = nginx_static(tmp_path, Backend(port, origin))
        try:
            measures.verify(proxy)
            assert measures.download_rate(proxy, "/blob/mcp", BLOB) > 0
            (per_stream,) = measures.stream_memory(proxy, "/stream/mcp", [5])
            assert per_stream < 1_000_000
        finally:
            proxy.stop()
    finally:
        upstream.stop()


def test_our_configuration_is_one_that_the_proxy_accepts(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(configuration(8787, Backend(9001, 9002), 3))
    settings = load_settings(file, environ={"BENCH_CLIENT_SECRET": "s"})
    assert list(settings.servers) == ["bench", "blob", "stream", "s1", "s2"]


def found(ours: float, nginx_rate: float) -> report.Results:
    return report.Results(
        names={"direct": "direct", "nginx": "nginx", "ours": "mcp-auth-proxy"},
        speeds={
            ("direct", 1): Speed(1000, 0.0001, 0.0002, None),
            ("ours", 1): Speed(900, 0.0002, 0.0004, 0.00004),
            ("ours", 32): Speed(ours, 0.001, 0.002, 0.00004),
            ("nginx", 32): Speed(nginx_rate, 0.001, 0.002, 0.00001),
        },
        servers={1: 0.0001, 10_000: 0.0001},
    )


def test_the_verdict_on_a_ratio_follows_its_bound() -> None:
    over_nginx = {target.what: target.met for target in report.targets(found(20_000, 60_000), 32, 2000)}
    assert over_nginx["requests/s over nginx, 32 connections"] is True
    assert over_nginx["p50 added over direct, 1 connection"] is True
    assert over_nginx["requests/s over FastMCP's proxy, 32 connections"] is None
    under = {target.what: target.met for target in report.targets(found(6_000, 60_000), 32, 2000)}
    assert under["requests/s over nginx, 32 connections"] is False


def test_what_was_written_by_hand_survives_a_new_run(tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    report.write(file, report.render(found(20_000, 60_000), 32, [1000, 2000]))
    file.write_text(file.read_text() + "The profile shows nothing odd.\n")
    report.write(file, "new numbers")
    assert "new numbers" in file.read_text()
    assert "The profile shows nothing odd." in file.read_text()
    assert "mcp-auth-proxy" not in file.read_text().partition("<!--")[0]
