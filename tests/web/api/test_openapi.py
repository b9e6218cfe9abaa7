"""``/openapi.json``: it is OpenAPI 3.1, lists every operation, and the API does as it says."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from mcp_auth_proxy.web.api import limits
from mcp_auth_proxy.web.api.application import PREFIX, operations
from mcp_auth_proxy.web.api.limits import Rate
from web.api.api_setup import api_setup

# A page token is any text to the document, but only ours are accepted; so it is with the ETag of a resource.
CONFIGURATION = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "304", "400", "403", "404", "409", "412"]
"""

EXAMPLES = 8
"""Of each operation and phase."""


async def test_the_document_lists_every_operation(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        response = await api.nobody.get("/openapi.json")
        assert response.headers["content-type"] == "application/json"
        document: dict[str, Any] = response.json()
    assert document["openapi"].startswith("3.1.")
    assert document["servers"] == [{"url": PREFIX}]
    listed = {(method.upper(), path) for path, entries in document["paths"].items() for method in entries}
    assert listed == {(operation.method, operation.path) for operation in operations()} | {("GET", "/oauth/start")}
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
    for limit in ("CALLS", "FLOWS", "FAILED_CREDENTIALS"):
        monkeypatch.setattr(limits, limit, Rate(1e9, 1e9))
    async with api_setup(tmp_path) as api:
        # Grants that can't be renewed: nothing is sent.
        await api.add_grant("prn_ben", refresh_token=None)
        await api.add_grant("prn_ada", "removed")
        (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
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
