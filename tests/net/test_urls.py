"""URLs, hosts and web origins: one table for each notion that the rest of the package relies on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.urls import Origin


@pytest.mark.parametrize(
    ("url", "origin", "target", "authority"),
    [
        ("https://mcp.example.com/mcp", Origin("https", "mcp.example.com", 443), b"/mcp", "mcp.example.com"),
        ("https://MCP.example.com:443", Origin("https", "mcp.example.com", 443), b"/", "mcp.example.com"),
        ("HTTPS://a.example:8443/", Origin("https", "a.example", 8443), b"/", "a.example:8443"),
        ("http://127.0.0.1:9000/a/b?c=d%20e", Origin("http", "127.0.0.1", 9000), b"/a/b?c=d%20e", "127.0.0.1:9000"),
        ("http://[::1]:9000/m", Origin("http", "::1", 9000), b"/m", "[::1]:9000"),
        ("http://[::1]/m", Origin("http", "::1", 80), b"/m", "[::1]"),
        ("https://h?a=b?c/d", Origin("https", "h", 443), b"/?a=b?c/d", "h"),
        ("https://h/a|b?c={d}", Origin("https", "h", 443), b"/a%7Cb?c=%7Bd%7D", "h"),
        ("https://h./", Origin("https", "h.", 443), b"/", "h."),
    ],
)
def test_a_url_is_parsed(url: str, origin: Origin, target: bytes, authority: str) -> None:
    parsed = urls.parse(url)
    assert (parsed.origin, parsed.target, parsed.origin.authority) == (origin, target, authority)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "spaces"),
        ("https://h /", "spaces"),
        ("https://h/a b", "spaces"),
        ("https://h/\r\nX: y", "spaces"),
        ("https://h/\x00", "spaces"),
        ("https://h\\@evil/", "backslashes"),
        ("https://①②⑦.⓪.⓪.①/", "ASCII"),
        ("https://bücher.example/", "xn--"),
        ("https://h/é", "ASCII"),
        ("javascript:alert(1)", "http:// or https://"),
        ("file:///etc/passwd", "http:// or https://"),
        ("ftp://h/", "http:// or https://"),
        ("//h/path", "http:// or https://"),
        ("h/path", "http:// or https://"),
        ("https:/h", "http:// or https://"),
        ("https://", "host or port"),
        ("https:///path", "host or port"),
        ("https://h:0/", "host or port"),
        ("https://h:99999/", "host or port"),
        ("https://h:x/", "host or port"),
        ("https://h:", "host or port"),
        ("https://h:1:2/", "host or port"),
        ("https://[::1/", "host or port"),
        ("https://::1/", "host or port"),
        ("https://[127.0.0.1]/", "host or port"),
        ("https://[fe80::1%25eth0]/", "host or port"),
        ("https://%31/", "host or port"),
        ("https://a..b/", "host or port"),
        ("https://.a/", "host or port"),
        ("https://" + "a" * 254 + "/", "host or port"),
        ("https://user@h/", "user name"),
        ("https://user:hunter2@h/", "user name"),
        ("https://@h/", "user name"),
        ("https://h/#frag", "fragment"),
        ("https://h/#", "fragment"),
    ],
)
def test_what_is_not_a_plain_http_url_is_refused_without_repeating_it(url: str, problem: str) -> None:  # T2, T5
    with pytest.raises(ValueError, match=problem) as refused:
        urls.parse(url)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("origin", "text", "authority", "serialized"),
    [
        (Origin("https", "a.example", 443), "a.example:443", "a.example", "https://a.example"),
        (Origin("http", "a.example", 80), "a.example:80", "a.example", "http://a.example"),
        (Origin("http", "a.example", 443), "a.example:443", "a.example:443", "http://a.example:443"),
        (Origin("https", "a.example", 8443), "a.example:8443", "a.example:8443", "https://a.example:8443"),
        (Origin("https", "::1", 443), "[::1]:443", "[::1]", "https://[::1]"),
        (Origin("http", "::1", 9000), "[::1]:9000", "[::1]:9000", "http://[::1]:9000"),
    ],
)
def test_an_origin_is_written_in_three_ways(origin: Origin, text: str, authority: str, serialized: str) -> None:
    assert (str(origin), origin.authority, origin.serialized) == (text, authority, serialized)
    assert urls.parse_origin(serialized) == origin
    assert urls.parse(serialized).origin == origin


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://a.example", Origin("https", "a.example", 443)),
        ("HTTP://LOCALHOST:8787", Origin("http", "localhost", 8787)),
        ("http://[::1]:8787", Origin("http", "::1", 8787)),
        ("https://a.example:443", Origin("https", "a.example", 443)),
        ("null", None),
        ("", None),
        ("https://", None),
        ("https://a.example/", None),
        ("https://a.example?x", None),
        ("https://a.example#x", None),
        ("https://u@a.example", None),
        ("https://a.example, https://b.example", None),
        # Not a place to go to, but a listener whose port the system has yet to choose.
        ("http://127.0.0.1:0", Origin("http", "127.0.0.1", 0)),
        ("ftp://a.example", None),
        ("httpſ://a.example", None),
        ("http://\u212a.example", None),
    ],
)
def test_a_web_origin_is_parsed_or_refused(text: str, origin: Origin | None) -> None:
    assert urls.parse_origin(text) == origin


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.example", ("a.example", None)),
        ("A.Example:8080", ("a.example", 8080)),
        ("a.example:", ("a.example", None)),
        ("[FD00::1]:8080", ("fd00::1", 8080)),
        ("[::1]", ("::1", None)),
        ("127.0.0.1:65535", ("127.0.0.1", 65535)),
        ("127.0.0.1:65536", None),
        ("127.0.0.1:-1", None),
        ("127.0.0.1:\u0661", None),
        ("::1", None),
        ("[::1%lo]", None),
        ("[::1]x", None),
        ("[a.example]", None),
        ("u@a.example", None),
        ("a.example,b.example", None),
        ("a.example/", None),
        ("", None),
        (":80", None),
    ],
)
def test_an_authority_is_a_host_with_or_without_a_port(text: str, parts: tuple[str, int | None] | None) -> None:
    assert urls.split_authority(text) == parts


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("LocalHost", True),
        ("localhost.", True),
        ("foo.localhost", True),
        ("a.b.localhost.", True),
        ("127.0.0.1", True),
        ("127.255.255.254", True),
        ("::1", True),
        ("0:0:0:0:0:0:0:1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:7f00:1", True),
        ("localhost..", False),
        ("notlocalhost", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.nip.io", False),
        ("128.0.0.1", False),
        ("::ffff:128.0.0.1", False),
        ("::127.0.0.1", False),
        ("::2", False),
        ("::1%lo", False),
        ("[::1]", False),
        # Spellings that some resolvers accept.
        ("127.1", False),
        ("0x7f.1", False),
        ("2130706433", False),
        ("127.0.0.01", False),
        # Addresses that a listener uses for "all".
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("192.168.1.1", False),
        ("example.com", False),
        ("", False),
    ],
)
def test_loopback_is_what_leads_to_this_machine_only(host: str, loopback: bool) -> None:
    assert urls.is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("url", "raw"),
    [
        ("https://AS.example:443/a?b#c", "https://AS.example:443"),
        ("HTTPS://as.example", "https://as.example"),
        ("https://as.example?b", "https://as.example"),
        ("https://[::1]:1/", "https://[::1]:1"),
    ],
)
def test_the_raw_origin_keeps_host_and_port_as_they_are_written(url: str, raw: str) -> None:  # RFC 8414 §3.3
    assert urls.raw_origin(url) == raw


# What may be fetched, or opened in a browser


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "https://user:pw@h/",
        "https://h/#",
        "https://h\\@evil/",
        "https://h/\r\nX: y",
        "https://①②⑦.⓪.⓪.①/",
        "https://h/a|b",
        'https://h/"',
        "https://h/{x}",
        "https://h/<x>",
        "http://h/",
        "http://10.0.0.1/",
        "http://localhost.evil/",
        "http://127.1/",
        "https://h/" + "x" * 3000,
    ],
)
def test_unacceptable_urls_are_refused(url: str) -> None:  # T2, T5
    with pytest.raises(ValueError, match="must "):
        urls.check(url, http_loopback=True)


@pytest.mark.parametrize(
    "url",
    [
        "https://h",
        "https://H:8443/a?b=c%20d",
        "https://[2001:db8::1]:8443/x",
        "http://localhost:1/",
        "http://foo.localhost/",
        "http://[::1]/",
    ],
)
def test_acceptable_urls_are_parsed(url: str) -> None:
    assert urls.check(url, http_loopback=True).origin.scheme in url


def test_http_must_be_allowed() -> None:
    for url in ("http://127.0.0.1/", "http://mcp.internal/"):
        with pytest.raises(ValueError, match="must be https"):
            urls.check(url, http_loopback=False)
        assert urls.check(url, http_loopback=False, http=True).origin.port == 80


@given(st.text(max_size=40))
def test_arbitrary_text_is_refused_or_parsed(url: str) -> None:
    for text in (url, f"https://{url}"):
        try:
            parsed = urls.check(text, http_loopback=True)
        except ValueError:
            continue
        assert parsed.origin.host in text.lower() and not set(text) & set(" \r\n\\@#\x00")
