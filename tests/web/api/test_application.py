"""What holds for every call: who may make it, how it is refused, how often it may be made."""

from pathlib import Path

from web.api.api_setup import api_setup, assert_problem


async def test_no_credential_is_401_everywhere_but_for_the_document(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        for method, path in [("GET", "/events"), ("GET", "/nothing"), ("DELETE", "/events")]:
            response = await api.nobody.request(method, path)
            assert_problem(response, 401, "unauthenticated")
            assert response.headers["www-authenticate"].startswith("Bearer")
        assert (await api.nobody.get("/openapi.json")).status_code == 200


async def test_unknown_paths_and_methods_are_problems_too(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        assert_problem(await api.ada.get("/nothing"), 404, "not-found")
        assert_problem(await api.ada.get("/events/1/2"), 404, "not-found")
        refused = await api.ada.put("/events")
        assert_problem(refused, 405, "method-not-allowed")
        assert refused.headers["allow"] == "GET, HEAD"
        assert (await api.ada.head("/events")).status_code == 200


async def test_what_is_for_admins_is_403_for_members(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        assert_problem(await api.ben.get("/events"), 403, "forbidden")
        assert (await api.ada.get("/events")).json() == {"items": [], "page": {"next_page_token": None}}
