"""Host and Origin: which names of the proxy are accepted, and which pages may send requests."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.config.settings import Address, InboundSettings
from mcp_auth_proxy.config.values import allowed_host
from mcp_auth_proxy.net.urls import is_loopback
from mcp_auth_proxy.web.guard import Guard

LOOPBACK = Address("127.0.0.1", 8787)
EVERYWHERE = Address("0.0.0.0", 8787)
PUBLIC = "https://mcp.example.com"
PATHS = [b"/linear/mcp", b"/mcp", b"/", b"/connect/linear", b"/oauth/callback", b"/api/v1/x", b"/unknown"]
PROBES = [b"/healthz", b"/readyz", b"/metrics"]


def guard(listen: Address = LOOPBACK, public_url: str | None = None, allowed: tuple[str, ...] = ()) -> Guard:
    return Guard(
        listen=listen,
        public_url=public_url or f"http://{listen}",
        inbound=InboundSettings(allowed_hosts=tuple(allowed_host(name) for name in allowed)),
    )


def status(
    subject: Guard,
    host: bytes | None = b"127.0.0.1:8787",
    *origins: bytes,
    path: bytes = b"/linear/mcp",
    fetch_site: bytes | None = None,
    page_write: bool = False,
) -> int:
    """The status of the refusal; 200 if there is none."""
    headers = [(b"accept", b"*/*")]
    if host is not None:
        headers.append((b"host", host))
    headers += [(b"origin", origin) for origin in origins]
    if fetch_site is not None:
        headers.append((b"sec-fetch-site", fetch_site))
    refused = subject.refusal(path, headers, endpoint=path.endswith(b"/mcp"), page_write=page_write)
    return 200 if refused is None else refused[0]


# Host

LOOPBACK_HOSTS = [
    b"127.0.0.1:8787",
    b"127.0.0.1",
    b"127.0.0.1:",
    b"127.9.9.9:8787",
    b"localhost:8787",
    b"localhost:1",
    b"LOCALHOST:8787",
    b"[::1]:8787",
    b"[::1]",
    b"[0:0:0:0:0:0:0:1]:8787",
    b"[::ffff:127.0.0.1]:8787",
    # Nobody can register these names (RFC 6761 §6.3).
    b"localhost.:8787",
    b"foo.localhost:8787",
]
FOREIGN_HOSTS = [
    b"evil.example",
    b"evil.example:8787",
    b"localhost.evil.example",
    b"127.0.0.1.evil.example:8787",
    b"127.0.0.1.nip.io:8787",
    b"evil.example#127.0.0.1",
    b"127.0.0.1@evil.example",
    b"127.0.0.1:8787@evil.example",
    b"evil.example@127.0.0.1",
    b"evil.example\\@127.0.0.1",
    b"127.0.0.1,evil.example",
    b"127.0.0.1 evil.example",
    b"127.0.0.1\tevil.example",
    b"local\thost",
    b"127.0.0.1/evil",
    b"127.0.0.1?evil",
    b"127.0.0.1:99999",
    b"127.0.0.1:80:80",
    b"127.0.0.1:-1",
    b"127.0.0.1:abc",
    b"127.0.0.1:\xb2",
    b"[::1",
    b"::1",
    b"[::1]evil.example",
    b"[evil.example]",
    b"[::2]:8787",
    b"0.0.0.0:8787",
    b"[::]:8787",
    b"169.254.169.254",
    b"10.0.0.1:8787",
    b"2130706433",
    b"0x7f.1",
    b"127.1",
    b"localhost..",
    b"l\xf6calhost",
    b"\xb9\xb2\xb7.0.0.1",
    b"%6cocalhost",
    b"",
    b" ",
    b":8787",
    b"null",
    b"mcp.example.com",
]


@pytest.mark.parametrize("host", LOOPBACK_HOSTS)
@pytest.mark.parametrize("path", PATHS + PROBES)
@pytest.mark.parametrize("listen", [LOOPBACK, Address("::1", 8787), Address("localhost", 8787), EVERYWHERE], ids=str)
def test_this_machine_reaches_every_route_by_loopback_names(listen: Address, path: bytes, host: bytes) -> None:
    """A web page can't have a loopback name in Host: its browser sends the name that it was led to."""
    assert status(guard(listen), host, path=path) == 200


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
@pytest.mark.parametrize("path", PATHS + PROBES)
def test_a_foreign_host_is_refused_on_every_route_of_a_loopback_proxy(path: bytes, host: bytes) -> None:  # T41
    assert status(guard(), host, path=path) == 421


@pytest.mark.parametrize("host", FOREIGN_HOSTS[:-1])
@pytest.mark.parametrize("path", PATHS)
def test_a_foreign_host_is_refused_on_a_network_address(path: bytes, host: bytes) -> None:  # T41
    assert status(guard(EVERYWHERE, PUBLIC, ("proxy.internal",)), host, path=path) == 421


@pytest.mark.parametrize("path", PROBES)
@pytest.mark.parametrize("host", [b"10.42.0.17:8787", b"[fd00::17]:8787", b"pod-1"])
def test_probes_may_come_with_the_address_of_the_pod(path: bytes, host: bytes) -> None:
    assert status(guard(EVERYWHERE, PUBLIC), host, path=path) == 200
    assert status(guard(EVERYWHERE, PUBLIC), host) == 421


def test_a_probe_does_not_open_other_routes_to_its_host() -> None:
    subject = guard(EVERYWHERE, PUBLIC)
    assert status(subject, b"10.42.0.17:8787", path=b"/healthz") == 200
    assert status(subject, b"10.42.0.17:8787", path=b"/linear/mcp") == 421


@pytest.mark.parametrize("listen", [LOOPBACK, EVERYWHERE], ids=str)
@pytest.mark.parametrize("host", [b"mcp.example.com", b"MCP.Example.COM:443", b"mcp.example.com:8787"])
def test_the_public_name_is_accepted_on_every_route(listen: Address, host: bytes) -> None:
    assert status(guard(listen, PUBLIC), host) == 200


@pytest.mark.parametrize(
    ("allowed", "host", "good"),
    [
        ("proxy.internal", b"proxy.internal", True),
        ("proxy.internal", b"proxy.internal:8787", True),
        ("Proxy.Internal", b"PROXY.internal", True),
        ("proxy.internal", b"x.proxy.internal", False),
        ("proxy.internal:8787", b"proxy.internal:8787", True),
        ("proxy.internal:8787", b"proxy.internal:80", False),
        ("proxy.internal:8787", b"proxy.internal", False),
        ("proxy.internal:80", b"proxy.internal", True),
        ("proxy.internal:443", b"proxy.internal", True),
        ("10.42.0.17", b"10.42.0.17:8787", True),
        ("[fd00::17]", b"[fd00::17]:8787", True),
        ("[fd00::17]:8787", b"[fd00::17]:8787", True),
        ("[fd00::17]:8787", b"[fd00::18]:8787", False),
    ],
)
def test_allowed_hosts_are_names_with_a_port_or_any(allowed: str, host: bytes, good: bool) -> None:
    assert status(guard(EVERYWHERE, PUBLIC, (allowed,)), host) == (200 if good else 421)


def test_two_hosts_are_refused_if_one_is_foreign() -> None:  # T26
    for hosts in ([b"127.0.0.1", b"evil.example"], [b"evil.example", b"127.0.0.1"]):
        headers = [(b"host", host) for host in hosts]
        assert guard().refusal(b"/linear/mcp", headers, endpoint=True, page_write=False) is not None


def test_no_host_is_refused() -> None:  # T26
    assert status(guard(), None) == 400


def test_the_refusal_names_the_keys_and_shows_only_the_start_of_the_host() -> None:
    refused = guard().refusal(b"/", [(b"host", b"x" * 10_000)], endpoint=False, page_write=False)
    assert refused is not None
    assert "inbound.allowed_hosts" in refused[1]
    assert "public_url" in refused[1]
    assert len(refused[1]) < 400


# Origin

FOREIGN_ORIGINS = [
    b"https://evil.example",
    b"http://evil.example:8787",
    b"null",
    b"",
    b"file://",
    b"http://127.0.0.1:8787.evil.example",
    b"http://localhost.evil.example:8787",
    b"http://127.0.0.1:8787@evil.example",
    b"http://evil@127.0.0.1:8787",
    b"http://@127.0.0.1:8787",
    b"http://evil.example\\@127.0.0.1:8787",
    b"http://evil.example#@127.0.0.1:8787",
    b"http://127.0.0.1:8787/evil",
    b"http://127.0.0.1:8787?evil",
    b"http://127.0.0.1:8787#evil",
    b"http://127.0.0.1:8787 http://evil.example",
    b"http://127.0.0.1:8787,http://evil.example",
    b"http://127.0.0.1:87\t87",
    b"http://l\xf6calhost:8787",
    b"http://127.0.0.1:99999",
    b"http://127.0.0.1:abc",
    b"http://[::1:8787",
    b"http:127.0.0.1:8787",
    b"//127.0.0.1:8787",
    b"127.0.0.1:8787",
    b"chrome-extension://127.0.0.1:8787",
    b"javascript://127.0.0.1:8787",
    # Another port of this machine is another site.
    b"http://127.0.0.1:3000",
    b"http://localhost",
    b"https://127.0.0.1",
]


@pytest.mark.parametrize("path", PATHS + PROBES)
@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_a_foreign_origin_is_refused_on_every_route(path: bytes, origin: bytes) -> None:  # T41
    assert status(guard(), b"127.0.0.1:8787", origin, path=path) == 403
    assert status(guard(EVERYWHERE, PUBLIC), b"mcp.example.com", origin, path=path) == 403


@pytest.mark.parametrize(
    "origin",
    [b"http://127.0.0.1:8787", b"http://localhost:8787", b"http://[::1]:8787", b"HTTP://LOCALHOST:8787"],
)
@pytest.mark.parametrize("path", PATHS)
def test_our_own_origin_is_accepted(path: bytes, origin: bytes) -> None:
    assert status(guard(), b"127.0.0.1:8787", origin, path=path) == 200


@pytest.mark.parametrize("listen", [LOOPBACK, EVERYWHERE], ids=str)
@pytest.mark.parametrize("origin", [b"https://mcp.example.com", b"https://mcp.example.com:443"])
def test_the_public_origin_is_accepted(listen: Address, origin: bytes) -> None:
    assert status(guard(listen, PUBLIC), b"mcp.example.com", origin) == 200


def test_loopback_origins_are_refused_on_a_network_address() -> None:
    assert status(guard(EVERYWHERE, PUBLIC), b"mcp.example.com", b"http://localhost:8787") == 403


@pytest.mark.parametrize("second", [b"http://127.0.0.1:8787", b"https://evil.example"])
def test_two_origins_are_refused(second: bytes) -> None:  # T41
    subject = guard()
    for _ in range(2):
        assert status(subject, b"127.0.0.1:8787", b"http://127.0.0.1:8787", second) == 403


def test_requests_without_an_origin_are_accepted() -> None:
    assert status(guard()) == 200


# Fetch Metadata, and writes to pages


@pytest.mark.parametrize("site", [b"cross-site", b"same-site"])
def test_pages_of_other_sites_can_not_reach_an_endpoint(site: bytes) -> None:  # T41
    """Not even with a GET, which a browser may send without an Origin."""
    assert status(guard(), path=b"/linear/mcp", fetch_site=site) == 403


@pytest.mark.parametrize("site", [b"cross-site", b"same-site", b"none"])
def test_pages_are_reached_from_elsewhere(site: bytes) -> None:
    """The authorization server leads the browser to the callback."""
    assert status(guard(), path=b"/oauth/callback", fetch_site=site) == 200


@pytest.mark.parametrize("path", [b"/", b"/api/v1/grants", b"/api/v1/unknown", b"/connect/linear", b"/unknown"])
@pytest.mark.parametrize(
    ("origin", "site", "good"),
    [
        (None, None, True),  # no browser
        (None, b"same-origin", True),
        (None, b"none", True),
        (None, b"cross-site", False),
        (None, b"same-site", False),
        (b"http://127.0.0.1:8787", b"same-origin", True),
        (b"http://127.0.0.1:8787", None, True),
        (b"http://127.0.0.1:8787", b"cross-site", False),
        (b"http://localhost:8787", None, False),  # good for reading, but not the page that was asked for
        (b"https://evil.example", b"cross-site", False),
        (b"null", None, False),
    ],
)
def test_only_our_own_pages_may_write(path: bytes, origin: bytes | None, site: bytes | None, good: bool) -> None:  # T42
    origins = () if origin is None else (origin,)
    found = status(guard(), b"127.0.0.1:8787", *origins, path=path, fetch_site=site, page_write=True)
    assert found == (200 if good else 403)


def test_our_own_page_may_write_behind_a_proxy_that_changes_the_host() -> None:
    subject = guard(EVERYWHERE, PUBLIC, ("proxy.internal",))
    origin = b"https://mcp.example.com"
    assert status(subject, b"proxy.internal:8787", origin, path=b"/", page_write=True) == 200


# What is remembered


def test_results_do_not_change_however_many_values_are_checked() -> None:
    subject = guard()
    for port in range(1, 500):
        assert status(subject, b"127.0.0.1:%d" % port) == 200
        assert status(subject, b"evil%d.example" % port) == 421
    assert status(subject, b"localhost:9") == 200


@given(st.text(string.ascii_letters + string.digits + ".:-_@/\\[]# \t%", max_size=30).map(str.encode) | st.binary())
def test_a_host_with_a_port_is_accepted_only_if_the_host_is(value: bytes) -> None:
    if status(guard(), value) == 200:
        name, _, port = (
            value.decode("ascii").rpartition(":") if b":" in value.split(b"]")[-1] else (value.decode(), "", "")
        )
        assert is_loopback(name.strip("[]"))
        assert port == "" or port.isdigit()


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: f"http://{text}".encode("utf-8", "replace")))
def test_judging_an_origin_never_raises(value: bytes) -> None:
    assert status(guard(), b"127.0.0.1", value) in (200, 403)


def test_invented_hosts_do_not_evict_the_real_one_for_good() -> None:
    subject = guard()
    for port in range(1, 500):
        assert status(subject, b"localhost:%d" % port) == 200
    assert status(subject, b"127.0.0.1:8787") == 200
    assert subject.knows(b"127.0.0.1:8787")
    assert not subject.knows(b"evil.example")
    assert not subject.knows(b"")
