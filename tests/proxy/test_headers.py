"""Heads of requests and responses on their way through the proxy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.net.http_head import HOPS, Fields
from mcp_auth_proxy.proxy.headers import (
    FieldRules,
    encoded_response_fields,
    is_in_loop,
    request_head,
    response_headers,
)
from mcp_auth_proxy.proxy.session_ids import SessionIds

TOKEN = b"Bearer ours"


def fields(head: bytes) -> list[tuple[bytes, bytes]]:
    lines = head.split(b"\r\n")
    assert lines[-2:] == [b"", b""]
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines[1:-2])]


def sent(*headers: tuple[bytes, bytes], length: int | None = None) -> list[tuple[bytes, bytes]]:
    """Return the fields of the request without the hop count, which is last of those made from the client's."""
    found = fields(request_head(b"POST", b"/mcp", b"up.example", Fields(list(headers)), TOKEN, length))
    return [field for field in found if field[0] != HOPS]


def test_a_request_head_is_written_from_scratch() -> None:
    head = request_head(
        b"POST",
        b"/mcp?a=b",
        b"up.example:8443",
        Fields([(b"host", b"127.0.0.1:8787"), (b"content-length", b"9"), (b"accept", b"application/json")]),
        TOKEN,
        5,
    )
    assert head == (
        b"POST /mcp?a=b HTTP/1.1\r\nhost: up.example:8443\r\naccept: application/json\r\n"
        b"mcp-auth-proxy-hops: 1\r\nauthorization: Bearer ours\r\ncontent-length: 5\r\n\r\n"
    )


def test_without_token_and_body_there_is_neither_authorization_nor_length() -> None:
    head = request_head(b"GET", b"/", b"h", Fields([(b"authorization", b"Bearer theirs")]), None, None)
    assert head == b"GET / HTTP/1.1\r\nhost: h\r\nmcp-auth-proxy-hops: 1\r\n\r\n"


@pytest.mark.parametrize(
    "name",
    [
        # T31
        "authorization", "Authorization", "cookie", "cookie2", "authorization_", "_authorization", "cookie_",
        # T33
        "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-anything", "x_forwarded_for",
        "x_forwarded-proto", "x.forwarded.for", "x-real-ip", "x_real_ip",
        # T88
        "true-client-ip", "True-Client-Ip", "true_client_ip", "cf-connecting-ip", "cf_connecting-ip", "x-client-ip",
        "x_client_ip", "x-remote-user", "x_remote_user", "remote-user", "remote_user", "x-ssl-client-verify",
        "x-ssl-client-s-dn", "x_ssl_cert", "x-original-url", "x_original_url", "x-rewrite-url", "x.rewrite.url",
        "x-http-method-override", "x_http_method_override", "x-http-method", "x-method-override", "x-original-uri",
        "x-cluster-client-ip", "fastly-client-ip", "client_ip", "x-remote-addr", "x-originating-ip", "x-forwarded",
        "cf-connecting-ipv6", "x-client-cert", "x_client_cert_dn", "ssl-client-verify", "ssl_client_s_dn",
        "wl-proxy-client-ip", "x-amzn-oidc-identity", "x-goog-authenticated-user-email", "x-ms-client-principal-name",
        "x-webauth-user", "x-original-host", "x-envoy-original-path", "x-accel-mapping", "x_sendfile_type",
        # hop-by-hop and framing
        "connection", "keep-alive", "proxy-connection", "proxy-authorization", "proxy_authorization",
        "proxy-authenticate", "te", "trailer", "transfer-encoding", "transfer_encoding", "upgrade",
        "content-length", "content_length", "expect", "http2-settings", "host", "origin",
    ],
)  # fmt: skip
def test_fields_about_the_client_or_one_hop_are_dropped(name: str) -> None:
    assert sent((name.encode(), b"1")) == [(b"host", b"up.example"), (b"authorization", TOKEN)]


@pytest.mark.parametrize(
    "name",
    [
        "accept", "accept-encoding", "content-type", "mcp-session-id", "mcp-protocol-version", "mcp-method",
        "last-event-id", "traceparent", "via", "x-custom", "x_custom", "mcp-param-region", "referer", "user-agent",
    ],
)  # fmt: skip
def test_other_fields_pass_unchanged(name: str) -> None:
    # T36: Accept-Encoding is among them, so that a gzip body passes as it is.
    assert (name.encode(), b"gzip;q=1, \xe9") in sent((name.encode(), b"gzip;q=1, \xe9"))


def test_repeated_fields_keep_their_order() -> None:
    assert [v for n, v in sent((b"x-a", b"1"), (b"accept", b"2"), (b"x-a", b"3")) if n == b"x-a"] == [b"1", b"3"]


@pytest.mark.parametrize("listed", [b"authorization", b"Authorization, host", b"keep-alive ,authorization,,"])
def test_connection_can_not_remove_what_we_add(listed: bytes) -> None:
    # T32
    got = sent((b"connection", listed), (b"accept", b"a"), length=3)
    assert got == [
        (b"host", b"up.example"),
        (b"accept", b"a"),
        (b"authorization", TOKEN),
        (b"content-length", b"3"),
    ]


def test_fields_listed_in_connection_are_dropped_wherever_they_are() -> None:
    got = sent(
        (b"x-hop", b"1"), (b"connection", b"X-Hop"), (b"accept", b"a"), (b"connection", b"x-hop2"), (b"x-hop2", b"2")
    )
    assert got == [(b"host", b"up.example"), (b"accept", b"a"), (b"authorization", TOKEN)]


@pytest.mark.parametrize("bad", [b"a\r\nx: y", b"a\nx: y", b"a\rb", b"a\0b", b"\r\n\r\n"])
def test_a_value_that_breaks_its_line_is_refused(bad: bytes) -> None:
    with pytest.raises(ValueError, match="line break"):
        request_head(b"GET", b"/", b"h", Fields([(b"x-a", bad)]), None, None)
    with pytest.raises(ValueError, match="line break"):
        request_head(b"GET", b"/", b"h", Fields([]), b"Bearer " + bad, None)
    with pytest.raises(ValueError, match="line break"):
        request_head(b"GET", b"/" + bad, b"h", Fields([]), None, None)


def test_a_target_with_a_space_is_refused() -> None:
    with pytest.raises(ValueError, match="space"):
        request_head(b"GET", b"/ HTTP/1.1", b"h", Fields([]), None, None)


names = st.from_regex(rb"\A[a-z0-9_-]{1,12}\Z") | st.sampled_from([b"authorization", b"connection", b"cookie", b"te"])
values = st.from_regex(rb"\A[ -~]{0,20}\Z")


@given(st.lists(st.tuples(names, values), max_size=12))
def test_every_head_has_our_token_and_host_exactly_once(headers: list[tuple[bytes, bytes]]) -> None:
    got = sent(*headers, length=0)
    assert got[0] == (b"host", b"up.example")
    assert [v for n, v in got if n == b"authorization"] == [TOKEN]
    assert [v for n, v in got if n == b"content-length"] == [b"0"]
    assert all(pair in headers for pair in got[1:-2])


def test_response_fields_pass_except_those_of_the_hop_the_login_and_the_origin() -> None:
    # T34
    got = response_headers(
        [
            (b"Content-Type", b"application/json"),
            (b"Content-Length", b"2"),
            (b"Content-Encoding", b"gzip"),
            (b"Cache-Control", b"max-age=1"),
            (b"Mcp-Session-Id", b"s"),
            (b"Retry-After", b"3"),
            (b"Access-Control-Allow-Origin", b"*"),
            (b"Set-Cookie", b"a=b"),
            (b"Set-Cookie2", b"a=b"),
            (b"WWW-Authenticate", b"Bearer"),
            (b"Proxy-Authenticate", b"Basic"),
            (b"Transfer-Encoding", b"chunked"),
            (b"Connection", b"keep-alive, X-Hop"),
            (b"X-Hop", b"1"),
            (b"Keep-Alive", b"timeout=5"),
            (b"Trailer", b"x"),
            (b"Upgrade", b"h2c"),
            (b"Alt-Svc", b"h3"),
            (b"Strict-Transport-Security", b"max-age=1"),
            (b"Clear-Site-Data", b'"*"'),
        ]
    )
    assert got == [
        (b"content-type", b"application/json"),
        (b"content-length", b"2"),
        (b"content-encoding", b"gzip"),
        (b"cache-control", b"max-age=1"),
        (b"mcp-session-id", b"s"),
        (b"retry-after", b"3"),
        (b"access-control-allow-origin", b"*"),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "X-Accel-Redirect", "x-accel-redirect", "x_accel_redirect", "X-Accel_Limit-Rate", "X-Accel-Expires",
        "X-Accel-Charset", "X-Sendfile", "x_sendfile", "X-Sendfile2", "X-Reproxy-URL", "X_Reproxy_File",
        "X-Lighttpd-Send-File", "x_lighttpd_sendfile", "Set_Cookie", "Transfer_Encoding", "Content_Length",
        "X_Accel_Buffering", "X-LiteSpeed-Location", "x_litespeed_cache_control",
    ],
)  # fmt: skip
def test_commands_to_a_web_server_do_not_reach_it(name: str) -> None:
    # T88
    got = response_headers([(b"Content-Type", b"application/json"), (name.encode(), b"no")])
    assert [field for field, _ in got] == [b"content-type", b"cache-control"]


def test_only_the_value_no_of_accel_buffering_passes() -> None:
    # T88: without it, nginx would hold events back.
    fields = [(b"X-Accel-Buffering", value) for value in (b"no", b"yes", b"No", b"", b"no, yes")]
    got = [(name, value) for name, value in response_headers(fields) if name.startswith(b"x-")]
    assert got == [(b"x-accel-buffering", b"no"), (b"x-accel-buffering", b"No")]


@pytest.mark.parametrize("kind", [b"text/event-stream", b"Text/Event-Stream; charset=utf-8"])
@pytest.mark.parametrize("sent", [[], [b"yes"], [b"No"]])
def test_every_event_stream_asks_a_web_server_once_not_to_buffer_it(kind: bytes, sent: list[bytes]) -> None:
    commands = [(b"x-accel-buffering", value) for value in sent]
    for fields in ([(b"content-type", kind), *commands], [*commands, (b"content-type", kind)]):
        got = [value for name, value in response_headers(fields) if name == b"x-accel-buffering"]
        assert got == [b"No" if b"No" in sent else b"no"]


@pytest.mark.parametrize("headers", [[], [(b"connection", b"cache-control"), (b"cache-control", b"public")]])
def test_a_response_without_cache_control_gets_no_store(headers: list[tuple[bytes, bytes]]) -> None:
    # T38
    assert response_headers([(b"content-type", b"application/json"), *headers])[1:] == [(b"cache-control", b"no-store")]


def test_connection_can_not_remove_the_framing_of_a_response() -> None:
    got = response_headers([(b"connection", b"content-length"), (b"content-length", b"2")])
    assert (b"content-length", b"2") in got


@pytest.mark.parametrize(
    ("headers", "inert"),
    [
        ([(b"content-type", b"application/json")], False),
        ([(b"Content-Type", b"Application/JSON; charset=utf-8")], False),
        ([(b"content-type", b"text/event-stream")], False),
        ([(b"content-type", b"text/html")], True),
        ([(b"content-type", b"image/svg+xml")], True),
        ([(b"content-type", b"application/json, text/html")], True),
        ([(b"content-type", b"application/json"), (b"content-type", b"text/html")], True),
        ([(b"content-type", b"application/json"), (b"connection", b"content-type")], True),
        ([], True),
    ],
)
def test_what_a_browser_could_show_as_a_page_is_made_inert(headers: list[tuple[bytes, bytes]], inert: bool) -> None:
    # Script in it would run in the proxy's origin, and from there call every other server.
    policies = [value for name, value in response_headers(headers) if name == b"content-security-policy"]
    assert policies == ([b"default-src 'none'; sandbox"] if inert else [])


# T85


@pytest.mark.parametrize(
    ("came", "goes"),
    [
        ([], b"1"),
        ([(HOPS, b"0")], b"1"),
        ([(HOPS, b"2")], b"3"),
        # The count of a proxy is not read from a spelling that none writes, and no listing removes it.
        ([(b"mcp_auth_proxy_hops", b"2")], b"1"),
        ([(HOPS, b"1"), (b"connection", HOPS)], b"2"),
    ],
)
def test_each_proxy_writes_the_hop_count_itself(came: list[tuple[bytes, bytes]], goes: bytes) -> None:
    client = Fields(came)
    assert not is_in_loop(client)
    head = request_head(b"POST", b"/mcp", b"up.example", client, TOKEN, 0)
    assert [value for name, value in fields(head) if b"hops" in name] == [goes]


@pytest.mark.parametrize("values", [[b"3"], [b"4"], [b"-1"], [b"1.5"], [b""], [b"1, 1"], [b"0" * 9], [b"1", b"1"]])
def test_a_count_that_is_too_high_or_no_proxy_wrote_is_a_loop(values: list[bytes]) -> None:
    assert is_in_loop(Fields([(HOPS, value) for value in values]))


def test_the_hop_count_is_not_returned() -> None:
    assert HOPS not in dict(response_headers([(HOPS, b"1"), (b"Mcp-Auth-Proxy-Hops", b"1")]))


def test_a_response_is_encoded_once_for_all_callers_unless_it_has_a_session_id() -> None:
    key = bytes(32)
    ada, bob = (
        FieldRules(sessions=SessionIds(key, principal=name, server="s", account="a")) for name in ("ada", "bob")
    )
    plain, in_session = Fields([(b"x-a", b"1")]), Fields([(b"x-a", b"1"), (b"mcp-session-id", b"s1")])
    assert encoded_response_fields(plain, ada) is encoded_response_fields(plain, bob)
    for rules in (ada, bob, ada):
        assert rules.sessions is not None
        assert b"mcp-session-id: %b\r\n" % rules.sessions.sign(b"s1") in encoded_response_fields(in_session, rules)
