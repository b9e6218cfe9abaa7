"""What the process counts: the list in the documentation, and the children of one server."""

import os
import re
import sys
import time
from pathlib import Path

import pytest

from mcp_auth_proxy import __version__
from mcp_auth_proxy.observability import metrics, process

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "observability.md"


def documented() -> dict[str, str]:
    """The metrics of the reference, with their labels."""
    rows = re.findall(r"^\| `([a-z_]+)` \| (\w+) \|([^|]*)\|", REFERENCE.read_text(), re.MULTILINE)
    return {name: f"{kind} {' '.join(re.findall('`([a-z_]+)`', labels))}".rstrip() for name, kind, labels in rows}


def known() -> dict[str, str]:
    """The metrics of the program, with their labels."""
    found = {}
    for instrument in metrics.registry.instruments:
        for name, kind in instrument.families():
            labels = [*instrument.label_names, *(["status"] if name == metrics.requests.name else [])]
            found[name] = f"{kind} {' '.join(labels)}".rstrip()
    return found


def test_the_documentation_lists_every_metric_with_its_type_and_labels() -> None:
    assert documented() == known()


@pytest.mark.parametrize("name", ["mcp_auth_proxy_requests_total", "process_resident_memory_bytes"])
def test_names_follow_the_conventions(name: str) -> None:
    assert name in known()
    for family, kind in known().items():
        assert re.fullmatch(r"(mcp_auth_proxy|process)_[a-z_]+", family)
        assert family.endswith("_total") == (kind.startswith("counter"))


def test_a_server_is_counted_under_its_name_and_forgotten_with_it() -> None:
    server = metrics.ServerMetrics("observed")
    for method in (b"POST", b"POST", b"GET", b"DELETE", b"PATCH"):
        server.of_method(method).finished(200, 0.01)
    server.open_streams.inc()
    server.waiting_for_consent.inc()
    server.upstream_failed("timeout")
    text = metrics.registry.render()
    for kind, count in (("post", 2), ("get", 1), ("delete", 1), ("other", 1)):
        assert f'mcp_auth_proxy_requests_total{{server="observed",kind="{kind}",status="200"}} {count}\n' in text
    assert 'mcp_auth_proxy_open_streams{server="observed"} 1\n' in text
    assert 'mcp_auth_proxy_requests_waiting_for_consent{server="observed"} 1\n' in text
    assert 'mcp_auth_proxy_upstream_failures_total{server="observed",kind="timeout"} 1\n' in text
    metrics.registry.forget_server("observed")
    assert "observed" not in metrics.registry.render()


def test_children_are_made_when_they_are_needed_and_then_kept() -> None:
    server = metrics.ServerMetrics("lazy")
    assert "lazy" not in metrics.registry.render()
    assert server.post is server.post
    assert server.of_method(b"POST") is server.post
    with pytest.raises(AttributeError):
        _ = server.unknown
    metrics.registry.forget_server("lazy")


def test_the_build_and_the_process_are_described() -> None:
    text = metrics.registry.render()
    python = ".".join(map(str, sys.version_info[:3]))
    assert f'mcp_auth_proxy_build_info{{version="{__version__}",python="{python}"}} 1\n' in text
    assert re.search(r"^process_open_fds \d+$", text, re.MULTILINE)
    assert re.search(r"^process_max_fds \d+|\+Inf$", text, re.MULTILINE)
    assert re.search(r"^process_cpu_seconds_total \d+\.\d+$", text, re.MULTILINE)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_the_process_is_measured() -> None:
    (memory,) = process.resident_memory().values()
    assert 10 * 2**20 < memory < 2**31
    (started,) = process.start_time().values()
    assert time.time() - 3600 < started < time.time() + 1
    (before,) = process.open_files().values()
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    (now,) = process.open_files().values()
    for file in files:
        os.close(file)
    assert now == before + 3
