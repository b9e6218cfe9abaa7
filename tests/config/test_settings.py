"""The settings know the names of their keys in the file."""

from mcp_auth_proxy.config.settings import ServerSettings, server_key


def test_a_server_names_its_keys_as_in_the_file() -> None:
    server = ServerSettings(name="notes", url="https://mcp.example/mcp")
    assert server.key("url") == "servers.notes.url"
    assert server.key("oauth.resource") == server_key("notes", "oauth.resource") == "servers.notes.oauth.resource"
