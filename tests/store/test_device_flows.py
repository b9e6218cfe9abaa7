"""Flows of users on another device: sealed, and polled for by one process."""

from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.models import DeviceAuthorization, FlowStatus
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.flows import Flows
from store.builders import NOW, dead_owner, flow

DEVICE = DeviceAuthorization(
    device_code="canary-device",
    user_code="CANARY-USER",
    verification_uri="https://as.example/d",
    verification_uri_complete="https://as.example/d?user_code=CANARY-USER",
    interval=7.0,
)
WAITING = replace(flow(), device=DEVICE, redirect_uri="")


@pytest.fixture
def flows(engine: Engine) -> Flows:
    return Flows(engine)


async def test_a_device_flow_comes_back_as_it_was_saved_and_is_sealed(flows: Flows, tmp_path: Path) -> None:
    await flows.save(WAITING)
    assert await flows.get("flow-1") == WAITING
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("store.db*"))
    assert b"canary" not in stored.lower()  # T45


async def test_waiting_device_flows_are_found_after_a_restart(flows: Flows) -> None:
    await flows.save(WAITING)
    await flows.save(replace(WAITING, id="late", created_at=NOW + 1))
    await flows.save(replace(WAITING, id="done"))
    await flows.save(flow("with-a-browser"))
    await flows.finish("done", FlowStatus.DONE)
    assert [found.id for found in await flows.devices(NOW)] == ["flow-1", "late"]
    assert await flows.devices(WAITING.expires_at) == []


async def test_only_one_living_process_polls(flows: Flows) -> None:
    await flows.save(WAITING)
    first, second = flows.owners.new(), flows.owners.new()
    assert await flows.claim_poll("flow-1", owner=first, now=NOW, next_poll_at=NOW + 5)
    assert not await flows.claim_poll("flow-1", owner=second, now=NOW, next_poll_at=NOW + 5)
    assert await flows.claim_poll("flow-1", owner=first, now=NOW + 5, next_poll_at=NOW + 10)


async def test_the_successor_of_a_dead_process_may_poll(flows: Flows) -> None:
    await flows.save(WAITING)
    dead = dead_owner(flows.owners)
    assert await flows.claim_poll("flow-1", owner=dead, now=NOW, next_poll_at=NOW + 5)
    assert await flows.claim_poll("flow-1", owner=flows.owners.new(), now=NOW, next_poll_at=NOW + 5)


@pytest.mark.parametrize("status", [FlowStatus.DONE, FlowStatus.FAILED])
async def test_nobody_polls_for_a_flow_that_is_over(flows: Flows, status: FlowStatus) -> None:
    await flows.save(WAITING)
    await flows.finish("flow-1", status)
    assert not await flows.claim_poll("flow-1", owner="o", now=NOW, next_poll_at=NOW)
    await flows.save(replace(WAITING, id="old"))
    assert not await flows.claim_poll("old", owner="o", now=WAITING.expires_at, next_poll_at=NOW)
    assert not await flows.claim_poll("unknown", owner="o", now=NOW, next_poll_at=NOW)
