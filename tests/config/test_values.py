"""Parsing the values of the configuration."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.config import values
from mcp_auth_proxy.config.servers import single_name
from mcp_auth_proxy.config.settings import Address

UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "": 1}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("500ms", 0.5), ("2m", 120), ("1h", 3600), ("7", 7), ("0", 0), ("0s", 0), ("1.5s", 1.5), ("3 s", 3)],
)
def test_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert values.duration(text) == seconds


@given(st.integers(min_value=0, max_value=8000), st.sampled_from(sorted(UNITS)))
def test_every_whole_number_with_a_unit_is_a_duration(number: int, unit: str) -> None:
    assert values.duration(f"{number}{unit}") == pytest.approx(number * UNITS[unit])


@pytest.mark.parametrize(
    "text", ["", "s", "-1s", "1w", "1e3", "inf", "nan", "1s2m", " 1s", "1s\n", "٣s", "9" * 400, "400h" * 9]
)
def test_an_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        values.duration(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [("16MiB", 16 * 2**20), ("1MB", 10**6), ("10", 10), ("1.5KiB", 1536), ("2 GB", 2 * 10**9), ("5B", 5)],
)
def test_size_is_read_in_bytes(text: str, number: int) -> None:
    assert values.size(text) == number


@given(st.integers(min_value=1, max_value=1000), st.sampled_from(["KiB", "MiB"]))
def test_binary_sizes_are_powers_of_two(number: int, unit: str) -> None:
    assert values.size(f"{number}{unit}") == number * {"KiB": 2**10, "MiB": 2**20}[unit]


@pytest.mark.parametrize("text", ["", "0", "-1", "16mib", "16M", "0.1B", "9" * 400, "2000GiB"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        values.size(text)


@given(
    st.text(max_size=30),
    st.sampled_from(
        [values.duration, values.size, values.count, values.host, values.port, values.address,
         values.allowed_host, values.allowed_origin,
         values.private_target, values.url, values.public_url, values.issuer, values.client_metadata_url,
         values.resource, values.scope]
    ),
)  # fmt: skip
def test_readers_raise_nothing_but_value_error(text: str, read: Callable[[str], object]) -> None:
    for candidate in (text, f"https://{text}", f"http://[{text}]/", f"a:{text}", f"{text}/8"):
        try:
            read(candidate)
        except ValueError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8787", Address("127.0.0.1", 8787)),
        ("[::1]:0", Address("::1", 0)),
        ("LocalHost:80", Address("localhost", 80)),
    ],
)
def test_address_is_host_and_port(text: str, address: Address) -> None:
    assert values.address(text) == address
    assert values.address_or_port(text) == address


def test_a_port_alone_is_one_of_loopback() -> None:
    assert values.address_or_port("9000") == Address("127.0.0.1", 9000)
    for text in ("65536", "", "nowhere", ":9000", "²"):
        with pytest.raises(ValueError, match=r"HOST:PORT|the port must be|has no host"):
            values.address_or_port(text)


@pytest.mark.parametrize(
    "text", ["8787", ":8787", "::1:8787", "host:", "host:70000", "host:-1", "a b:1", "[::1%eth0]:1"]
)
def test_an_invalid_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        values.address(text)


@pytest.mark.parametrize(
    "text",
    ["example.com", "ftp://example.com", "https://", "https://u:hunter2@example.com", "https://@example.com",
     "https://example.com/#", "https://exa mple.com", "https://example.com/\\evil", "https://example.com:", "https:///mcp",
     "https://example.com:99999", "https://[::1", "https://[fe80::1%25eth0]/", "https://bücher.example", "https://a%2eb/",
     "https://example.com/\n", "javascript:alert(1)"],
)  # fmt: skip
def test_an_invalid_url_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        values.url(text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", ["https://a.example/x?y=z", "http://[::1]:8080/mcp", "HTTPS://A.example"])
def test_a_plain_url_is_accepted(text: str) -> None:
    assert values.url(text).origin.scheme in ("http", "https")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("https://Proxy.Example.com/", "https://proxy.example.com"),
        ("http://127.0.0.1:8787", "http://127.0.0.1:8787"),
        ("http://localhost:1", "http://localhost:1"),
    ],
)
def test_public_url_loses_its_slash(text: str, read: str) -> None:
    assert values.public_url(text) == read


@pytest.mark.parametrize(
    "text", ["http://proxy.example.com", "https://p.example/x", "https://p.example?x", "p.example"]
)
def test_public_url_must_be_an_origin_that_codes_may_return_to(text: str) -> None:
    with pytest.raises(ValueError):
        values.public_url(text)


@pytest.mark.parametrize("text", ["Proxy.internal", "10.0.0.1:8787", "[::1]", "[::1]:80"])
def test_allowed_host_is_host_with_or_without_port(text: str) -> None:
    assert values.allowed_host(text) == text.lower()


@pytest.mark.parametrize("text", ["http://a", "a:b", "a/b", "*", ""])
def test_an_invalid_allowed_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        values.allowed_host(text)


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("http://localhost:6274", "http://localhost:6274"),
        ("HTTPS://App.Example:443", "https://app.example"),
        ("http://[::1]:80", "http://[::1]"),
        ("chrome-extension://abcdefghijklmnop", "chrome-extension://abcdefghijklmnop"),
        ("vscode-webview://0a1b:5", "vscode-webview://0a1b:5"),
    ],
)
def test_an_allowed_origin_is_read_as_browsers_write_it(text: str, origin: str) -> None:
    assert values.allowed_origin(text) == origin


@pytest.mark.parametrize(
    "text",
    [
        "*", "null", "", "localhost:6274", "http://", "http://*", "http://*.example", "http://localhost:6274/",
        "http://localhost/x", "http://user@localhost", "http://localhost:", "http://localhost:0", "http://a b",
        "http://localhost:99999", "http://a?b", "http://a#b", "file://", "1x://a", "http:/a", "http://ä.example",
    ],
)  # fmt: skip
def test_an_invalid_allowed_origin_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|is not a URL"):
        values.allowed_origin(text)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://mcp.linear.app/mcp", "linear"),
        ("https://www.example.com/", "example"),
        ("https://api.mcp.example.com", "example"),
        ("https://API.GitHubCopilot.com/mcp", "githubcopilot"),
        ("https://example.com", "example"),
        ("http://localhost:9000/mcp", "server"),
        ("http://a.localhost/mcp", "server"),
        ("http://10.1.2.3/mcp", "server"),
        ("http://[::1]:9/mcp", "server"),
        ("https://mcp/", "server"),
        ("https://a_b.example", "a-b"),
        ("https://___.example", "server"),
        ("https://static.example", "server"),
    ],
)
def test_a_single_server_is_named_after_its_host(url: str, name: str) -> None:
    assert single_name(url) == name


@pytest.mark.parametrize("text", ["proxy.internal", "10.0.0.1/8", "10.0.0.0/99", "10.0.0.1:80", "*"])
def test_a_trusted_proxy_is_an_address_or_a_network(text: str) -> None:
    with pytest.raises(ValueError, match="must be an address or a network such as"):
        values.network(text)
