"""``/openapi.json``: it is OpenAPI 3.1, lists every operation, and the API does as it says."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mcp_auth_proxy.web.api import limits
from mcp_auth_proxy.web.api.application import PREFIX, operations
from mcp_auth_proxy.web.api.limits import Rate
from web.api.api_setup import api_setup

CONFIGURATION = """
# A page token is any text to the document, but only ours are accepted; so it is with the ETag of a resource.
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "304", "400", "403", "404", "409", "412"]

# The servers of the test can't be reached, which an answer may say.
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "502"]
"""

RULES = """
[[operations]]
include-operation-id = {operations}
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "403", "404", "409", "412", "422", "502"]
"""
"""Operations whose bodies have rules that no schema has, such as the URLs that are allowed, or fields that depend on
each other; and those that ask servers."""

RULED = [
    "servers.create",
    "servers.update",
    "servers.discover",
    "servers.complete",
    "servers.verify",
    "flows.create",
    "oauth-clients.create",
    "oauth-clients.change",
    "oauth.start",
    "oauth.submit",
]

IDS = """
[[operations]]
include-path-regex = "^{path}"
parameters = {{ "path.{name}" = "{value}" }}
"""
"""An id that exists, so that more is tried than 404."""

EXAMPLES = 8
"""Of each operation and phase."""


def without_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let callers of a proxy that is started later call as often as they like."""
    for limit in ("CALLS", "FLOWS", "FAILED_CREDENTIALS"):
        monkeypatch.setattr(limits, limit, Rate(1e9, 1e9))


async def test_the_document_lists_every_operation(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        response = await api.nobody.get("/openapi.json")
        assert response.headers["content-type"] == "application/json"
        document: dict[str, Any] = response.json()
    assert document["openapi"].startswith("3.1.")
    assert document["servers"] == [{"url": PREFIX}]
    pages = {("GET", "/oauth/start"), ("POST", "/oauth/start")}
    listed = {(method.upper(), path) for path, entries in document["paths"].items() for method in entries}
    assert listed == {(operation.method, operation.path) for operation in operations()} | pages
    ids = [entry["operationId"] for entries in document["paths"].values() for entry in entries.values()]
    assert len(ids) == len(set(ids))


async def test_references_lead_somewhere_and_open_endpoints_need_no_credential(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        document = (await api.nobody.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]

    def check(part: Any) -> None:
        if isinstance(part, dict):
            if "$ref" in part:
                assert part["$ref"].rpartition("/")[2] in schemas
            for each in part.values():
                check(each)
        elif isinstance(part, list):
            for each in part:
                check(each)

    check(document)
    open_ones = [
        path for path, entries in document["paths"].items() for entry in entries.values() if not entry["security"]
    ]
    assert open_ones == ["/openapi.json"]
    assert schemas["NewKey"]["additionalProperties"] is False


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["ada", "ben"])
async def test_schemathesis_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Requests made from the document, valid and not, as an admin and as a member."""
    without_limits(monkeypatch)
    async with api_setup(tmp_path) as api:
        # Grants that can't be renewed: nothing is sent.
        grant = await api.add_grant(f"prn_{name}", refresh_token=None)
        await api.add_grant("prn_ada", "removed")
        body = {
            "provider": "p",
            "client_id": "c",
            "authorization_url": "https://a.example",
            "token_url": "https://a.example",
        }
        client = (await api.ada.post("/oauth-clients", json=body)).json()
        ids = (
            ("/servers/", "id", "notes"),
            ("/grants/", "grant_id", grant.id),
            ("/oauth-clients/", "id", client["id"]),
            ("/principals/", "principal_id", "prn_eve"),
        )
        (tmp_path / "schemathesis.toml").write_text(
            CONFIGURATION
            + RULES.format(operations=json.dumps(RULED))
            + "".join(IDS.format(path=path, name=parameter, value=value) for path, parameter, value in ids)
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{api.proxy.origin}{PREFIX}/openapi.json"),
            *("--url", f"{api.proxy.origin}{PREFIX}", "--header", f"Authorization: Bearer {api.keys[name]}"),
            *("--checks", "all", "--max-examples", str(EXAMPLES), "--seed", "1", "--no-color"),
            *("--generation-database", "none", "--suppress-health-check", "all"),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()
