"""Mapping a raw path to a server: one look-up, and no ambiguous paths."""

from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.models import LOCAL_PRINCIPAL, Account, Principal, Role
from mcp_auth_proxy.proxy import routes


def servers(*names: str, url: str = "https://{}.example/base/mcp?key=1") -> dict[str, ServerSettings]:
    return {name: ServerSettings(name=name, url=url.format(name)) for name in names}


def test_a_server_is_found_under_its_name() -> None:
    found = routes.build(servers("alpha", "beta-2"))
    assert set(found) == {b"/alpha/mcp", b"/beta-2/mcp"}
    assert found[b"/alpha/mcp"].server.name == "alpha"


def test_a_single_server_is_found_without_its_name_too() -> None:
    found = routes.build(servers("alpha"))
    assert set(found) == {b"/alpha/mcp", b"/mcp"}
    assert found[b"/mcp"] is found[b"/alpha/mcp"]


def test_the_target_of_a_route_comes_from_the_configuration() -> None:
    route = routes.build(servers("alpha"))[b"/mcp"]
    assert (route.origin.scheme, route.origin.host, route.origin.port) == ("https", "alpha.example", 443)
    assert (route.target, route.host) == (b"/base/mcp?key=1", b"alpha.example")


@pytest.mark.parametrize(
    "path",
    [
        b"/alpha/mcp/",
        b"//alpha/mcp",
        b"/alpha//mcp",
        b"/alpha/./mcp",
        b"/x/../alpha/mcp",
        b"/alpha%2Fmcp",
        b"/alpha%2fmcp",
        b"/%61lpha/mcp",
        b"/Alpha/mcp",
        b"/alpha/MCP",
        b"/alpha/mcp;x",
        b"/alpha/mcp%00",
        b"alpha/mcp",
        b"/alpha/mcp?x",
        b"",
    ],
)
def test_other_spellings_of_a_path_lead_to_no_server(path: bytes) -> None:  # T27
    assert path not in routes.build(servers("alpha", "beta"))


@pytest.mark.parametrize(
    "path",
    [
        b"//evil.example/mcp",
        b"/a//b",
        b"/..",
        b"/../a",
        b"/a/../b",
        b"/a/..",
        b"/a/./b",
        b"/a/.",
        b"/.",
        b"/%2e%2e/a",
        b"/%2E./a",
        b"/a/.%2e",
        b"/a%2Fb",
        b"/a%2fb",
        b"/a%5cb",
        b"/a\\b",
        b"/\\evil.example",
        b"/a%00b",
    ],
)
def test_an_ambiguous_path_is_not_canonical(path: bytes) -> None:  # T27
    assert not routes.is_canonical_path(path)


@pytest.mark.parametrize(
    "path",
    [
        b"/",
        b"/mcp",
        b"/linear/mcp",
        b"/connect/linear",
        b"/static/a.b.css",
        b"/a/.well-known",
        b"/...",
        b"/a%20b/",
        b"/a..b",
    ],
)
def test_a_canonical_path_is_accepted(path: bytes) -> None:
    assert routes.is_canonical_path(path)


@pytest.mark.parametrize("path", [b"/%6detrics", b"/metric%73", b"/oauth/%53tart", b"/%7a", b"/%5A", b"/%30", b"/a%4F"])
def test_an_encoded_letter_is_seen(path: bytes) -> None:
    assert routes.has_encoded_letters(path)


@pytest.mark.parametrize(
    "path", [b"/metrics", b"/notes%40work/mcp", b"/a%20b", b"/%C3%A9", b"/%2540", b"/a%5Fb", b"/%"]
)
def test_other_paths_have_no_encoded_letter(path: bytes) -> None:
    assert not routes.has_encoded_letters(path)


@given(
    st.lists(st.sampled_from(["a", "mcp", ".", "..", "/", "%2e", "%2E", "%2f", "%2F", "%5C", "\\", "%"])).map("".join)
)
def test_a_canonical_path_has_the_same_segments_decoded_as_raw(tail: str) -> None:
    path = f"/{tail}"
    if routes.is_canonical_path(path.encode()):
        segments = unquote(path).split("/")
        assert len(segments) == len(path.split("/"))
        assert not {".", ".."} & set(segments)
        assert "" not in segments[1:-1]
        assert "\\" not in unquote(path)


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        (b"/mcp", True),
        (b"/nobody/mcp", True),
        (b"/a/b/mcp", False),
        (b"/mcp/", False),
        (b"/xmcp", False),
        (b"/nobody", False),
        (b"/", False),
    ],
)
def test_an_endpoint_is_recognized_by_its_form(path: bytes, endpoint: bool) -> None:
    assert routes.is_endpoint(path) is endpoint


def test_each_of_ten_thousand_servers_is_found() -> None:
    names = [f"s{number}" for number in range(10_000)]
    found = routes.build(servers(*names))
    assert found[b"/s9999/mcp"].server.name == "s9999"
    assert b"/mcp" not in found


# Callers

KEY = b"k" * 32


def caller(name: str, **changes: Any) -> Principal:
    return replace(Principal(id=f"id-of-{name}", name=name), **changes)


def table(found: dict[str, ServerSettings], key: bytes = KEY) -> routes.Routes:
    return routes.Routes(found, session_key=key, credential_fields=[b"x-api-key"])


def test_a_route_of_a_caller_is_made_once_and_then_found_by_a_look_up() -> None:
    all_routes = table(servers("alpha", "beta"))
    ada = caller("ada")
    assert all_routes.get(ada, b"/alpha/mcp") is None
    route = all_routes.find(ada, b"/alpha/mcp")
    assert route is not None
    assert all_routes.get(ada, b"/alpha/mcp") is route is all_routes.find(ada, b"/alpha/mcp")
    assert (route.account, route.principal) == (Account(ada.id, "alpha"), ada.id)
    assert all_routes.get(caller("bob"), b"/alpha/mcp") is None
    assert all_routes.local == {}


def test_a_principal_that_has_changed_gets_routes_of_its_own_again() -> None:
    all_routes = table({"alpha": replace(servers("alpha")["alpha"], grant_owner="shared")})
    member = all_routes.find(caller("ada"), b"/mcp")
    admin = all_routes.find(caller("ada", role=Role.ADMIN), b"/mcp")
    assert member is not None
    assert admin is not None
    assert (member.may_authorize, admin.may_authorize) == (False, True)
    assert member.account == admin.account == Account("project:default", "alpha")
    assert all_routes.get(caller("ada"), b"/mcp") is None


def test_callers_and_their_routes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "ROUTES_KEPT", 6)
    all_routes = table(servers("alpha"))
    callers = [caller(str(number)) for number in range(5)]
    for each in callers:
        for path in (b"/mcp", b"/alpha/mcp"):
            assert all_routes.find(each, path) is not None
    assert [all_routes.get(each, b"/mcp") is not None for each in callers] == [False, False, True, True, True]
    for number in range(10):
        assert all_routes.find(callers[0], b"/alpha@a%d/mcp" % number) is not None
    assert [all_routes.get(each, b"/mcp") is not None for each in callers] == [False] * 5


def test_the_routes_of_everybody_stay_when_those_of_other_accounts_are_dropped() -> None:
    all_routes = table(servers("alpha", "beta"), b"")
    built = dict(all_routes.local)
    for number in range(2 * routes.ROUTES_OF_A_CALLER):
        assert all_routes.find(LOCAL_PRINCIPAL, b"/alpha@a%d/mcp" % number) is not None
        assert built.keys() <= all_routes.local.keys()
        assert len(all_routes.local) <= len(built) + routes.ROUTES_OF_A_CALLER


def test_a_forgotten_principal_has_no_routes_but_everybody_has() -> None:
    all_routes = table(servers("alpha"))
    all_routes.find(caller("ada"), b"/mcp")
    all_routes.forget(caller("ada").id)
    assert all_routes.get(caller("ada"), b"/mcp") is None
    everybody = table(servers("alpha"), b"")
    everybody.forget(LOCAL_PRINCIPAL.id)
    assert everybody.get(LOCAL_PRINCIPAL, b"/mcp") is everybody.local[b"/mcp"]


def test_the_servers_that_are_named_are_those_that_a_caller_may_use() -> None:
    found = servers("alpha", "beta", "gamma")
    found["beta"] = replace(found["beta"], allow=("bob",))
    found["gamma"] = replace(found["gamma"], project="other")
    assert table(found).names(caller("ada")) == ["alpha"]
    assert table(found).names(caller("bob")) == ["alpha", "beta"]
    assert table(found).names(caller("eve", project_id="other")) == ["gamma"]
