"""What the documentation announces does not exist yet, and answers as documented."""

from pathlib import Path

import httpx2
import pytest

from fakes.proxy import running_proxy

REFERENCE = Path(__file__).resolve().parents[2] / "docs/configuration.md"
MISSING_ROUTES = ["/api/v1/", "/static/"]


def announced() -> str:
    return REFERENCE.read_text().partition("## Announced, not in this version")[2]


@pytest.mark.parametrize("what", [*MISSING_ROUTES, "keys rotate", "PostgreSQL", "cold_start"])
def test_the_list_is_complete(what: str) -> None:
    assert what in announced()


async def test_announced_routes_are_404(tmp_path: Path) -> None:
    async with (
        running_proxy(tmp_path, {"a": "https://a.example/mcp"}) as proxy,
        httpx2.AsyncClient(trust_env=False) as client,
    ):
        for route in MISSING_ROUTES:
            for path in (route, f"{route.rstrip('/')}/servers"):
                assert (await client.get(f"{proxy.origin}{path}")).status_code == 404, path
        page = await client.get(proxy.origin)
    assert (page.status_code, f"{proxy.origin}/a/mcp" in page.text) == (200, True)
