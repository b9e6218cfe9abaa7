"""Mapping a raw path to a server: one look-up, and no ambiguous paths."""

from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.config.settings import ServerSettings
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
