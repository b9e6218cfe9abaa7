"""Which stored grants and flows may be used, once the configuration has changed."""

from dataclasses import replace
from typing import Any

import pytest

from mcp_auth_proxy.broker.matching import configured, configured_for, matches
from mcp_auth_proxy.config.settings import OAuthSettings, ServerSettings
from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import DeviceAuthorization, DpopUse, Flow, Grant, GrantType
from store.builders import flow, grant

SERVER = ServerSettings(name="linear", url="https://linear.example/mcp")
DEVICE = DeviceAuthorization(device_code="d", user_code="u", verification_uri="https://as.example/device")


def settings(url: str = SERVER.url, **oauth: Any) -> ServerSettings:
    return replace(SERVER, url=url, oauth=OAuthSettings(**oauth))


def a_flow() -> Flow:
    return replace(flow(), key=grant().key)


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("https://mcp.example/mcp", True),
        ("https://MCP.example:443/another/path", True),
        ("https://mcp.example:8443/mcp", False),
        ("http://mcp.example/mcp", False),
        ("https://evil.example/mcp", False),
        ("https://mcp.example.evil.example/mcp", False),
    ],
)
def test_a_grant_is_used_only_at_the_origin_it_was_requested_for(url: str, same: bool) -> None:  # T49
    stored = replace(grant(), key=replace(grant().key, resource="", upstream="https://mcp.example"))
    assert matches(stored, settings(url, resource="omit")) is same


@pytest.mark.parametrize(
    ("path", "same"),
    [("/mcp", True), ("/mcp?key=1", True), ("/", False), ("", False), ("/mcp/", False), ("/MCP", False), ("/m", False)],
)
@pytest.mark.parametrize("resource", ["", "https://linear.example", "https://linear.example/mcp", "api://notes"])
def test_a_grant_is_used_only_at_the_path_it_was_requested_for(path: str, same: bool, resource: str) -> None:  # T89
    key = replace(grant().key, resource=resource, upstream="https://linear.example", path="/mcp")
    configured = {"": "omit", "api://notes": resource}.get(resource, "auto")
    assert matches(replace(grant(), key=key), settings(f"https://linear.example{path}", resource=configured)) is same


def test_an_empty_path_is_the_same_as_the_root() -> None:
    key = replace(grant().key, resource="https://linear.example", upstream="https://linear.example", path="/")
    for url in ("https://linear.example", "https://linear.example/", "https://LINEAR.example:443"):
        assert matches(replace(grant(), key=key), settings(url))


@pytest.mark.parametrize(
    ("resource", "url", "same"),
    [
        ("https://linear.example/mcp", "https://linear.example/mcp", True),
        ("https://linear.example/mcp", "https://linear.example/mcp/below", True),
        ("https://linear.example", "https://linear.example/other", True),
        ("https://linear.example/mcp?key=1", "https://linear.example/mcp?key=2", True),
        ("https://linear.example/mcp", "https://linear.example/other", False),
        ("https://linear.example/mcp", "https://linear.example/mcp2", False),
        ("https://linear.example/mcp", "https://linear.example/", False),
    ],
)
def test_of_a_grant_from_before_paths_were_stored_the_resource_decides(resource: str, url: str, same: bool) -> None:
    key = replace(grant().key, resource=resource, upstream="https://linear.example")
    assert matches(replace(grant(), key=key), settings(url)) is same


def test_a_grant_from_before_origins_were_stored_is_still_used() -> None:
    old = replace(grant(), key=replace(grant().key, resource=""))
    assert matches(old, settings("https://any.example/mcp", resource="omit"))


def test_a_resource_that_is_not_an_url_is_for_no_server_that_is_not_configured_with_it() -> None:
    exact = "api://notes"
    stored = replace(grant(), key=replace(grant().key, resource=exact, upstream="https://linear.example"))
    assert matches(stored, settings(resource=exact))
    assert not matches(stored, settings())
    assert not matches(stored, settings(resource="omit"))


@pytest.mark.parametrize(
    ("oauth", "same"),
    [
        ({}, True),
        ({"issuer": "https://as.example"}, True),
        ({"issuer": "https://other.example"}, False),
        ({"resource": "https://linear.example/mcp"}, True),
        ({"resource": "https://linear.example/other"}, False),
        ({"resource": "omit"}, False),
        ({"grant": GrantType.DEVICE_CODE}, False),
        ({"grant": GrantType.CLIENT_CREDENTIALS}, False),
        ({"dpop": DpopUse.AUTO}, True),
        ({"dpop": DpopUse.REQUIRED}, False),
        ({"scopes": ("other",), "client_id": "other"}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("stored", [grant(), a_flow()], ids=["grant", "flow"])
def test_issuer_resource_grant_and_binding_must_be_those_configured(
    stored: Grant | Flow, oauth: dict[str, Any], same: bool
) -> None:
    assert matches(stored, settings(**oauth)) is same


def test_a_bound_grant_is_used_only_if_binding_is_allowed() -> None:
    bound = replace(grant(), tokens=replace(grant().tokens, token_type="DPoP"))
    assert matches(bound, settings(dpop=DpopUse.REQUIRED))
    assert not matches(bound, settings(dpop=DpopUse.OFF))
    assert not matches(replace(a_flow(), dpop_key="key"), settings(dpop=DpopUse.OFF))


def test_a_flow_on_another_device_is_for_that_grant_alone() -> None:
    on_device = replace(a_flow(), device=DEVICE)
    assert matches(on_device, settings(grant=GrantType.DEVICE_CODE))
    assert not matches(on_device, settings())


def test_a_removed_server_is_named_in_the_error() -> None:
    assert configured({"linear": SERVER}, "linear") is SERVER
    with pytest.raises(AuthorizationError, match=r"^Server linear is no longer configured\.$"):
        configured({}, "linear")


def test_a_flow_of_a_changed_server_is_refused() -> None:
    assert configured_for({"linear": SERVER}, a_flow()) is SERVER
    with pytest.raises(AuthorizationError, match="Server linear was reconfigured"):
        configured_for({"linear": settings("https://other.example/mcp")}, a_flow())
