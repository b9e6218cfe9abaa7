"""A process that is killed at any moment loses nothing that the store has acknowledged."""

import asyncio
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

from mcp_auth_proxy.models import Account
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.grants import Grants
from store.builders import grant, store_settings

KILLS = 8
RENEWING = """
import asyncio, pathlib, sys
from mcp_auth_proxy.models import Account
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.grants import Grants
from store.builders import NOW, tokens

async def main():
    grants = Grants(await open_store(store_settings(pathlib.Path(sys.argv[1]))))
    owner = grants.owners.new()
    while True:
        found = await grants.current(Account("local", "linear"))
        assert await grants.begin_refresh(found.id, version=found.version, owner=owner, now=NOW)
        new = await grants.renewed(found.id, version=found.version, owner=owner, tokens=tokens(str(found.version + 1)))
        print(new.version, flush=True)

from store.builders import store_settings
asyncio.run(main())
"""


async def test_no_acknowledged_renewal_is_lost_to_a_kill(tmp_path: Path) -> None:  # F7
    engine = await open_store(store_settings(tmp_path))
    await Grants(engine).add(grant())
    await engine.close()
    for _ in range(KILLS):
        acknowledged = await asyncio.to_thread(renew_until_killed, tmp_path)
        engine = await open_store(store_settings(tmp_path))
        found = await Grants(engine).current(Account("local", "linear"))
        await engine.close()
        assert found is not None
        assert found.version >= acknowledged
        assert found.tokens.access_token == f"canary-access-{found.version}"
        assert found.tokens.refresh_token == f"canary-refresh-{found.version}"


def renew_until_killed(folder: Path) -> int:
    """Renew in another process, kill it 0 to 20 ms after its first renewal, and return the last version it printed."""
    paths = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parents[2] / "src")))
    process = subprocess.Popen(
        [sys.executable, "-c", RENEWING, str(folder)], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process, process.stdout as lines:
        first = lines.readline()
        killer = threading.Timer(random.uniform(0, 0.02), process.kill)
        killer.start()
        printed = [first, *lines]
        killer.join()
    return int([line for line in printed if line.endswith(b"\n")][-1])
