"""Which addresses the proxy may listen on."""

from pathlib import Path

import pytest

from mcp_auth_proxy.config.listeners import probed
from mcp_auth_proxy.config.load import load, single
from mcp_auth_proxy.config.reload import ConfigFile
from mcp_auth_proxy.config.settings import Address, Settings
from mcp_auth_proxy.errors import ConfigurationError

SERVERS = "servers: {a: {url: 'https://a.example/mcp'}}\n"
ALLOWED = "inbound: {allow_anonymous: true}\n"


def served(folder: Path, text: str, *, listen: str | None = None, flag: bool = False) -> Settings:
    """The settings as ``serve`` reads them."""
    path = folder / "c.yaml"
    path.write_text(text + SERVERS)
    return load(path, environ={}, listen=listen, allow_anonymous=flag)


def errors_of(folder: Path, text: str, **flags: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        served(folder, text, listen=flags.get("listen"))
    return [str(error) for error in caught.value.errors]


@pytest.mark.parametrize("address", ["0.0.0.0:8787", "[::]:8787", "192.0.2.1:8787", "proxy.internal:8787"])
def test_a_listener_beyond_loopback_has_to_be_allowed(tmp_path: Path, address: str) -> None:
    key = f'listen: "{address}"\n'
    (error,) = errors_of(tmp_path, key)
    assert error.startswith(f"inbound.allow_anonymous: must be true to listen on {address} (or give serve the flag")
    assert errors_of(tmp_path, "", listen=address) == [error]
    assert errors_of(tmp_path, key + "inbound: {allow_anonymous: false}\n") == [error]
    assert served(tmp_path, key + ALLOWED).inbound.allow_anonymous
    assert str(served(tmp_path, key, flag=True).listen) == address
    assert str(served(tmp_path, ALLOWED, listen=address).listen) == address


@pytest.mark.parametrize("address", ["127.0.0.1:8787", "127.9.9.9:0", "[::1]:8787", "localhost:8787", "a.localhost:1"])
def test_a_listener_on_loopback_needs_no_leave(tmp_path: Path, address: str) -> None:
    assert str(served(tmp_path, f'listen: "{address}"\n').listen) == address


def test_the_flag_of_another_address_counts_and_not_the_file(tmp_path: Path) -> None:
    assert served(tmp_path, "listen: 0.0.0.0:8787\n", listen="127.0.0.1:8787").listen == Address("127.0.0.1", 8787)


def test_commands_that_do_not_listen_need_no_leave(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("listen: 0.0.0.0:8787\n" + SERVERS)
    assert load(path, environ={}).listen == Address("0.0.0.0", 8787)


def test_a_reload_needs_it_too(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("listen: 0.0.0.0:8787\n" + SERVERS)
    with pytest.raises(ConfigurationError, match=r"inbound\.allow_anonymous"):
        ConfigFile(path, environ={}).read()
    assert ConfigFile(path, environ={}, allow_anonymous=True).read().listen == Address("0.0.0.0", 8787)


def test_one_url_needs_the_flag() -> None:
    with pytest.raises(ConfigurationError, match=r"inbound\.allow_anonymous: .*--allow-anonymous"):
        single("https://a.example/mcp", environ={}, listen="0.0.0.0:0")
    assert single("https://a.example/mcp", environ={}, listen="0.0.0.0:0", allow_anonymous=True).listen.port == 0


def test_the_health_endpoints_may_be_anywhere(tmp_path: Path) -> None:
    found = served(tmp_path, "health_listen: 0.0.0.0:8788\nhealth_quit: true\n")
    assert (found.health_listen, found.health_quit) == (Address("0.0.0.0", 8788), True)
    found = served(tmp_path, "")
    assert (found.health_listen, found.health_quit) == (None, False)


@pytest.mark.parametrize("address", ["127.0.0.1:8787", "0.0.0.0:8787"])
def test_they_need_an_address_of_their_own(tmp_path: Path, address: str) -> None:
    (error,) = errors_of(tmp_path, f"health_listen: {address}\n")
    assert error.startswith("health_listen: must be another address than listen (127.0.0.1:8787)")
    free = address.replace("8787", "0")
    assert str(served(tmp_path, f"listen: 127.0.0.1:0\nhealth_listen: {free}\n").health_listen) == free


def test_a_quit_without_a_listener_of_its_own_is_refused(tmp_path: Path) -> None:
    (error,) = errors_of(tmp_path, "health_quit: true\n")
    assert error.startswith("health_quit: needs health_listen")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", "127.0.0.1:8787"),
        ("listen: 0.0.0.0:9000\n", "127.0.0.1:9000"),
        ('listen: "[::]:9000"\n', "[::1]:9000"),
        ("listen: 192.0.2.1:9000\n", "192.0.2.1:9000"),
        ("health_listen: 0.0.0.0:9001\n", "127.0.0.1:9001"),
        ("health_listen: 192.0.2.1:9001\n", "192.0.2.1:9001"),
    ],
)
def test_what_is_asked_about_the_health(tmp_path: Path, text: str, address: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text + SERVERS)
    assert str(probed(path)) == address
