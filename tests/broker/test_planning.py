"""What a stored grant or flow is good for, once the configuration has changed."""

from dataclasses import replace

import pytest

from mcp_auth_proxy.broker.planning import Authorizer, is_for
from mcp_auth_proxy.config.settings import OAuthSettings, ServerSettings
from store.builders import grant

OMIT = OAuthSettings(resource="omit")


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
def test_a_grant_is_for_the_origin_that_it_was_asked_for(url: str, same: bool) -> None:  # T49
    key = replace(grant().key, resource="", upstream="https://mcp.example")
    assert is_for(key, ServerSettings(name="linear", url=url, oauth=OMIT)) is same


def test_a_grant_from_before_origins_were_kept_is_still_good() -> None:
    old = replace(grant(), key=replace(grant().key, resource=""))
    assert Authorizer.serves(old, ServerSettings(name="linear", url="https://any.example/mcp", oauth=OMIT))
