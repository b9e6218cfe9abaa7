"""Addresses of peers: one notation, who is counted together, and whom a trusted proxy names."""

from ipaddress import ip_address, ip_network

import pytest

from mcp_auth_proxy.net.peers import client_of, limit_key, parse_address, parse_network

TRUSTED = [parse_network("10.0.0.0/8"), parse_network("fd00::/8")]


@pytest.mark.parametrize(
    ("text", "read", "counted"),
    [
        ("203.0.113.5", "203.0.113.5", "203.0.113.5"),
        ("::ffff:203.0.113.5", "203.0.113.5", "203.0.113.5"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::1", "fe80::"),
        ("::1", "::1", "::"),
    ],
)
def test_an_address_has_one_notation_and_ipv6_is_counted_by_network(text: str, read: str, counted: str) -> None:  # T83
    assert (str(parse_address(text)), str(limit_key(parse_address(text)))) == (read, counted)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("10.0.0.1", "10.0.0.1/32"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("[::1]", "::1/128"),
        ("::ffff:10.0.0.1", "10.0.0.1/32"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::/0", "::/0"),
    ],
)
def test_a_network_is_read(text: str, read: str) -> None:
    assert parse_network(text) == ip_network(read)


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [  # T33
        ("203.0.113.5", b"192.0.2.1", "203.0.113.5"),
        ("10.0.0.1", b"", "10.0.0.1"),
        ("10.0.0.1", b"192.0.2.1", "192.0.2.1 through 10.0.0.1"),
        ("10.0.0.1", b"198.51.100.9, 192.0.2.1", "192.0.2.1 through 10.0.0.1"),
        ("10.0.0.1", b"198.51.100.9, 192.0.2.1, 10.0.0.2,fd00::1", "192.0.2.1 through 10.0.0.1"),
        ("10.0.0.1", b"10.0.0.3, 10.0.0.2", "10.0.0.3 through 10.0.0.1"),
        ("10.0.0.1", b"::ffff:192.0.2.1", "192.0.2.1 through 10.0.0.1"),
        ("10.0.0.1", b"192.0.2.1, unknown", "10.0.0.1"),
        ("10.0.0.1", b"unknown, 10.0.0.2", "10.0.0.2 through 10.0.0.1"),
        ("10.0.0.1", b"\xff, \x1b[31m", "10.0.0.1"),
        ("fd00::2", b"2001:db8::1", "2001:db8::1 through fd00::2"),
    ],
)
def test_only_trusted_proxies_name_the_client(peer: str, forwarded_for: bytes, client: str) -> None:
    assert client_of(peer, forwarded_for, TRUSTED) == client


def test_what_is_no_address_is_refused() -> None:
    for text in ("a.example", "10.0.0.0/33", "10.0.0.1/8", ""):
        with pytest.raises(ValueError):
            parse_network(text)
    assert ip_address("10.0.0.1") in TRUSTED[0]
