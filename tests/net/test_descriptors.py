"""How the limit on open files is divided (T83)."""

import resource

import pytest

from mcp_auth_proxy.net import descriptors
from mcp_auth_proxy.net.descriptors import MAX_CLIENTS, MIN_RESERVE, Shares, shares


def limited_to(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int | None = None) -> list[tuple[int, int]]:
    """Give this process other limits, as far as the module knows; return the list of those that it sets."""
    changed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft if hard is None else hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: changed.append(limits))
    return changed


@pytest.mark.parametrize(
    ("limit", "wanted", "expected"),
    [
        (256, None, Shares(88, 88)),
        (1024, None, Shares(448, 448)),
        (20_000, None, Shares(9744, 9744)),
        (1_048_576, None, Shares(MAX_CLIENTS, 1_048_576 - 512 - MAX_CLIENTS)),
        (1024, 100, Shares(100, 796)),
        (1024, 5000, Shares(448, 448)),
        (1_048_576, 100_000, Shares(100_000, 1_048_576 - 512 - 100_000)),
        (resource.RLIM_INFINITY, None, Shares(MAX_CLIENTS, MAX_CLIENTS)),
        (resource.RLIM_INFINITY, 50_000, Shares(50_000, 50_000)),
        (64, None, Shares(1, 1)),
    ],
)
def test_clients_and_upstreams_share_what_the_reserve_leaves(
    monkeypatch: pytest.MonkeyPatch, limit: int, wanted: int | None, expected: Shares
) -> None:
    limited_to(monkeypatch, limit)
    found = shares(wanted)
    assert found == expected
    assert found.upstreams >= found.clients
    if MIN_RESERVE + 2 <= limit != resource.RLIM_INFINITY:
        assert found.clients + found.upstreams <= limit - MIN_RESERVE


@pytest.mark.parametrize(
    ("soft", "hard", "changed"),
    [
        (256, 4096, [(4096, 4096)]),
        (256, resource.RLIM_INFINITY, [(10_240, resource.RLIM_INFINITY)]),
        (100_000, resource.RLIM_INFINITY, [(100_000, resource.RLIM_INFINITY)]),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, []),
    ],
)
def test_the_limit_is_raised(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, changed: list[tuple[int, int]]
) -> None:
    made = limited_to(monkeypatch, soft, hard)
    descriptors.raise_limit()
    assert made == changed
