"""The forward proxy of the environment and NO_PROXY: one reading for upstreams and OAuth documents."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.errors import ConfigurationError
from mcp_auth_proxy.net import forward_proxy
from mcp_auth_proxy.net.urls import Origin


@pytest.mark.parametrize(
    ("no_proxy", "host", "direct"),
    [
        ("", "a.example", False),
        (" , ,", "a.example", False),
        ("*", "a.example", True),
        ("*", "10.1.2.3", True),
        ("*:443", "a.example", True),
        ("*:8443", "a.example", False),
        # Domains: with all below them, however they are written.
        ("a.example", "a.example", True),
        ("a.example", "a.example.", True),
        ("a.example.", "a.example", True),
        ("A.example , b.example", "a.example", True),
        ("b.example a.example", "a.example", True),
        ("example", "a.example", True),
        (".example", "a.example", True),
        ("*.example", "a.example", True),
        (".a.example", "a.example", True),
        ("*.a.example", "a.example", True),
        ("ample", "a.example", False),
        ("b.a.example", "a.example", False),
        ("a.example:443", "a.example", True),
        (".example:443", "a.example", True),
        ("a.example:8443", "a.example", False),
        ("localhost", "localhost.example", False),
        # Addresses and networks.
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.1.2.3/8", "10.9.9.9", True),
        ("10.0.0.0/8:443", "10.1.2.3", True),
        ("10.0.0.0/8:8443", "10.1.2.3", False),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "::ffff:10.1.2.3", True),
        ("10.0.0.0/8", "10.example", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3:443", "10.1.2.3", True),
        ("10.1.2.3:8443", "10.1.2.3", False),
        ("10.1.2.4", "10.1.2.3", False),
        ("10.1.2.3", "x.10.1.2.3", False),
        ("example", "10.1.2.3", False),
        ("0.0.0.0/0", "a.example", False),
        ("0.0.0.0/0", "2001:db8::1", False),
        ("2001:db8::/32", "2001:db8::1", True),
        ("2001:DB8::1", "2001:db8::1", True),
        ("[2001:db8::1]", "2001:db8::1", True),
        ("[2001:db8::1]:443", "2001:db8::1", True),
        ("[2001:db8::1]:8443", "2001:db8::1", False),
        ("[2001:db8::/32]:443", "2001:db8::1", True),
        ("2001:db8::2", "2001:db8::1", False),
        # Loopback never goes through a proxy.
        ("", "localhost", True),
        ("", "localhost.", True),
        ("", "foo.localhost", True),
        ("", "127.0.0.1", True),
        ("", "::1", True),
        ("", "::ffff:127.0.0.1", True),
        ("", "0x7f.1", False),
    ],
)
def test_no_proxy_lists_hosts_that_are_reached_directly(
    no_proxy: str, host: str, direct: bool, caplog: pytest.LogCaptureFixture
) -> None:
    proxies = forward_proxy.from_environment({"https_proxy": "http://p:3128", "no_proxy": no_proxy})
    assert (proxies.towards(Origin("https", host, 443)) is None) == direct
    assert caplog.text == ""


@pytest.mark.parametrize(
    "entry",
    [
        "10.0.0.0/99",
        "10.0.0.0/x",
        "10.0.0.*",
        "10.",
        "192.168",
        "999.1.1.1",
        "host:notaport",
        "host:",
        "host:0",
        "host:65536",
        ":443",
        "a..example",
        "a*.example",
        "**",
        ".",
        "http://a.example",
        "a.example/path",
        "[::1",
        "[::1]x",
        "[::1]:x",
        "[fd00::]/8",
        "fe80::1%eth0",
        "bücher.example",
        "%",
        "<local>",
    ],
)
def test_an_entry_that_nothing_can_match_is_named_and_ignored(entry: str, caplog: pytest.LogCaptureFixture) -> None:
    environ = {"https_proxy": "http://p:3128", "no_proxy": f"a.example,{entry},b.example"}
    with caplog.at_level(logging.WARNING):
        proxies = forward_proxy.from_environment(environ)

    (record,) = caplog.records
    assert repr(entry) in record.getMessage()
    assert "NO_PROXY" in record.getMessage()
    assert proxies == forward_proxy.from_environment({**environ, "no_proxy": "a.example,b.example"})


def test_all_odd_entries_are_named_in_one_line_without_a_password(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        forward_proxy.from_environment({"NO_PROXY": f"host:x, 10., http://me:hidden@p:1, {'x' * 500}:y"})

    (record,) = caplog.records
    assert "'host:x', '10.', 'p:1'" in record.getMessage()
    assert "hidden" not in record.getMessage()
    assert len(record.getMessage()) < 500


@given(st.text(max_size=40), st.sampled_from(["a.example", "10.1.2.3", "2001:db8::1"]))
def test_reading_an_entry_never_raises(entry: str, host: str) -> None:
    logging.disable()
    try:
        proxies = forward_proxy.from_environment({"https_proxy": "http://p:3128", "no_proxy": entry})
    finally:
        logging.disable(logging.NOTSET)
    assert proxies.towards(Origin("https", host, 443)) in (None, proxies.https)


def test_plain_http_is_reached_directly() -> None:
    proxies = forward_proxy.from_environment({"HTTPS_PROXY": "p:3128", "HTTP_PROXY": "p:3128"})
    assert proxies.towards(Origin("http", "a.example", 80)) is None
    assert proxies.towards(Origin("https", "a.example", 443)) == forward_proxy.ForwardProxy("p", 3128)


def test_lower_case_names_take_precedence() -> None:
    proxies = forward_proxy.from_environment({"https_proxy": "lower:1", "HTTPS_PROXY": "upper:1"})
    assert proxies.https == forward_proxy.ForwardProxy("lower", 1)


@pytest.mark.parametrize("url", ["socks5://p:1", "http://", "http://p:x", "http://[", "https://user:hidden@p:1"])
def test_the_error_for_an_unusable_proxy_url_does_not_show_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match="HTTPS_PROXY") as caught:
        forward_proxy.from_environment({"HTTPS_PROXY": url})
    assert "hidden" not in str(caught.value)


def test_a_proxy_shows_no_password() -> None:
    proxies = forward_proxy.from_environment({"HTTPS_PROXY": "http://me:hidden@p:1"})
    assert "hidden" not in repr(proxies)
    assert proxies.https is not None
    assert proxies.https.authorization not in repr(proxies)
