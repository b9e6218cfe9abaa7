"""docs/api.md is what the API says, and its curl lines work with a running proxy."""

import asyncio
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import api_page
from fakes.fixtures import Servers
from web.api import made_setup as made
from web.api.made_setup import MadeSetup, consented, made_setup
from web.api.test_openapi import without_limits

PAGE = api_page.PAGE.read_text()
EXAMPLE = "https://mcp.example.com/mcp"
DEFAULT = "http://127.0.0.1:8787"


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_is_made_from_the_document() -> None:
    assert api_page.page(api_page.document()) == PAGE, "run make docs"


def test_every_operation_has_a_curl_line_and_every_link_leads_somewhere() -> None:
    document = api_page.document()
    entries = [entry for methods in document["paths"].values() for entry in methods.values()]
    headings = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    assert len([block for block in blocks() if "/api/v1" in block]) == len(entries)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors


async def run(script: str, folder: Path, env: dict[str, str]) -> str:
    """Run commands in a shell that stops at the first failure; return what they wrote."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", script),
        cwd=folder,
        env=os.environ | env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, f"{script}\n{out.decode()}"
    return out.decode()


def command(folder: Path) -> Path:
    """Make a folder with the command ``mcp-auth-proxy`` of this interpreter."""
    program = folder / "bin/mcp-auth-proxy"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mcp_auth_proxy "$@"\n')
    program.chmod(0o755)
    return program.parent


def names() -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"server-{number}"


async def things(setup: MadeSetup, name: str, key: str) -> dict[str, str]:
    """Make one thing of each kind, for whoever has a key; return the variables that the curl lines name them by."""
    client = setup.api.nobody
    client.headers["authorization"] = f"Bearer {key}"
    server = await setup.make(name)
    await setup.connect(server["id"], client)
    grants = (await client.get("/grants", params={"server": server["id"]})).json()["items"]
    flow = await setup.headless(server["id"], client, account="another")
    given = await consented(flow["authorization_url"])
    body = {**api_page.BODIES["oauth-clients.create"], "provider": name}
    oauth_client = (await client.post("/oauth-clients", json=body)).json()
    principal = (await client.post("/principals", json={"name": f"user-of-{name}"})).json()
    api_key = (await client.post("/keys", json={"name": name})).json()
    return {
        "SERVER": server["id"],
        "GRANT": grants[0]["id"],
        "FLOW": flow["id"],
        "CLIENT": oauth_client["id"],
        "PRINCIPAL": principal["id"],
        "KEY_ID": api_key["id"],
        "CODE": given["code"],
        "STATE": given["state"],
    }


@pytest.mark.timeout(180)
@pytest.mark.skipif(not shutil.which("curl") or not shutil.which("bash"), reason="curl and bash run them")
async def test_every_curl_line_works(servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_limits(monkeypatch)
    variables, *lines = blocks()
    called = names()
    async with made_setup(servers, tmp_path, issuer=made.NO_ISS) as setup:
        env = {"PATH": f"{command(tmp_path)}:{os.environ['PATH']}"}
        script = variables.replace(DEFAULT, setup.api.proxy.origin)
        assert script != variables
        proxy, key = (await run(f'{script}\necho "$PROXY $KEY"', tmp_path, env)).split()[-2:]
        for line in lines:
            env |= {"PROXY": proxy, "KEY": key, **await things(setup, next(called), key)}
            out = await run(line.replace(EXAMPLE, setup.upstream.url), tmp_path, env)
            assert out or "-X DELETE" in line
