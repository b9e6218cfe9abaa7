"""The sidecar's configuration in a pod's network: probed from the node, used from the pod's loopback."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fakes.manifests import Manifests, chart, manifest
from fakes.other_users import as_root
from fakes.pod_network import PodNetwork, pod_network
from fakes.proxy import PROGRAM, start_command, unnamed

pytestmark = [pytest.mark.iproute2, as_root]

HTTP, HEALTH = 8787, 8788


@pytest.fixture
def network() -> Iterator[PodNetwork]:
    with pod_network() as made:
        yield made


@pytest.fixture(params=["manifest", pytest.param("chart", marks=pytest.mark.helm)])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    sidecar: Manifests = manifest() if request.param == "manifest" else chart("sidecar")
    return sidecar.config_in(tmp_path)


async def node_gets(network: PodNetwork, path: str, *, port: int = HEALTH) -> str:
    return await asyncio.to_thread(network.get_from_node, port, path)


async def started(network: PodNetwork, config: Path) -> asyncio.subprocess.Process:
    return await start_command("serve", "--config", str(config), program=network.inside(*PROGRAM))


@asynccontextmanager
async def sidecar(network: PodNetwork, config: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the proxy in the pod; yield once its startup probe succeeds."""
    process = await started(network, config)
    try:
        for _ in range(60):
            if await node_gets(network, "/readyz") == "200":
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError("the startup probe never succeeded")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_the_node_probes_it_and_only_the_pod_uses_it(network: PodNetwork, config: Path) -> None:
    async with sidecar(network, config) as process:
        for path in ("/healthz", "/metrics"):
            assert await node_gets(network, path) == "200"
        assert await node_gets(network, "/warehouse/mcp") == "404"
        assert await node_gets(network, "/healthz", port=HTTP) == "ConnectionRefusedError"
        assert await asyncio.to_thread(network.get_from_pod, HTTP, "/healthz") == "200"
        check = await start_command("healthcheck", "--config", str(config), program=network.inside(*PROGRAM))
        assert (await check.communicate(), check.returncode) == ((b"ready\n", b""), 0)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_a_port_that_another_container_of_the_pod_has_taken(network: PodNetwork, config: Path) -> None:
    async with sidecar(network, config):
        second = await started(network, config)
        out, err = await asyncio.wait_for(second.communicate(), 20)
        said = unnamed(err.decode())
        assert (second.returncode, out, said.count("\n")) == (1, b"", 1)
        assert said.startswith(f"error: 127.0.0.1:{HTTP} is taken by another program")
        assert await node_gets(network, "/readyz") == "200"
