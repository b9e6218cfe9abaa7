"""Which addresses may be dialed for the documents of a server."""

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.net.addresses import AddressPolicy, address_class

PUBLIC = AddressPolicy.for_upstream("https://mcp.example.com/mcp")
LOCAL = AddressPolicy.for_upstream("http://127.0.0.1:3000/mcp")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("0.0.0.0", "this-network"),
        ("10.255.0.1", "private"),
        ("100.64.0.1", "carrier-grade NAT"),
        ("127.0.0.1", "loopback"),
        ("169.254.169.254", "link-local"),
        ("172.31.255.255", "private"),
        ("192.0.0.192", "protocol assignment"),
        ("192.0.2.1", "documentation"),
        ("192.88.99.1", "6to4 relay"),
        ("192.168.1.1", "private"),
        ("198.19.0.1", "benchmarking"),
        ("198.51.100.7", "documentation"),
        ("203.0.113.7", "documentation"),
        ("224.0.0.1", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "broadcast"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("::127.0.0.1", "reserved"),
        ("fd00::1", "private"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("fec0::1", "site-local"),
        ("ff02::1", "multicast"),
        ("2001:db8::1", "documentation"),
        ("2001::1", "Teredo"),
        ("2001:2::1", "protocol assignment"),
        ("2002:7f00:1::", "6to4"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:169.254.169.254", "link-local"),
        ("64:ff9b::a9fe:a9fe", "NAT64 of link-local"),
        ("64:ff9b::7f00:1", "NAT64 of loopback"),
        ("64:ff9b:1::1", "local NAT64"),
        ("100::1", "reserved"),
        ("100.100.100.200", "cloud platform"),
        ("100.100.100.201", "carrier-grade NAT"),
        ("161.26.0.10", "cloud platform"),
        ("166.11.255.255", "cloud platform"),
        ("168.63.129.16", "cloud platform"),
        ("fd00:42::42", "cloud platform"),
        ("fd00:ec2::254", "cloud platform"),
        ("fd00:ec2::23", "cloud platform"),
        ("fd20:ce::254", "cloud platform"),
        ("::ffff:168.63.129.16", "cloud platform"),
        ("64:ff9b::168.63.129.16", "NAT64 of cloud platform"),
        ("64:ff9b::100.100.100.200", "NAT64 of cloud platform"),
        ("64:ff9b:1::168.63.129.16", "local NAT64"),
        ("2002:a83f:8110::1", "6to4"),
        ("2001:0:a83f:8110::1", "Teredo"),
        ("::168.63.129.16", "reserved"),
        ("::ffff:0:168.63.129.16", "reserved"),
        ("0.1.2.3", "this-network"),
        ("100.127.255.255", "carrier-grade NAT"),
        ("169.254.170.2", "link-local"),
        ("239.255.255.255", "multicast"),
        ("fe80::a9fe:a9fe", "link-local"),
        ("168.63.129.15", ""),
        ("168.63.129.17", ""),
        ("100.63.255.255", ""),
        ("100.128.0.0", ""),
        ("161.27.0.0", ""),
        ("166.12.0.0", ""),
        ("8.8.8.8", ""),
        ("172.32.0.1", ""),
        ("2606:4700::1111", ""),
        ("::ffff:8.8.8.8", ""),
        ("64:ff9b::808:808", ""),
    ],
)
def test_the_class_of_an_address_is_known(address: str, expected: str) -> None:  # T2, T89
    assert address_class(address) == expected


@given(st.ip_addresses())
def test_an_address_called_public_is_global_for_the_library_too(
    address: IPv4Address | IPv6Address,
) -> None:
    if not address_class(str(address)) and not str(address).startswith("64:ff9b:") and "ffff" not in str(address):
        assert address.is_global


def test_a_public_upstream_leads_to_public_addresses_only() -> None:  # T1, T2
    assert PUBLIC.refusal("as.example.com", 443, "8.8.8.8") == ""
    for address in ("127.0.0.1", "169.254.169.254", "10.0.0.1", "::1", "fd00::1", "64:ff9b::a9fe:a9fe"):
        assert PUBLIC.refusal("as.example.com", 443, address)
    assert not PUBLIC.allows_http("127.0.0.1", 80)
    assert not PUBLIC.allows_http("mcp.example.com", 443)


def test_an_upstream_on_loopback_opens_loopback_and_nothing_else() -> None:
    assert LOCAL.refusal("127.0.0.1", 9000, "127.0.0.1") == ""
    assert LOCAL.refusal("localhost", 9000, "::1") == ""
    assert LOCAL.allows_http("127.0.0.1", 9000)
    assert LOCAL.allows_http("localhost", 9000)
    assert LOCAL.refusal("metadata", 80, "169.254.169.254") == "link-local"
    assert LOCAL.refusal("127.0.0.1", 3000, "10.0.0.1") == "private"
    assert LOCAL.refusal("as", 443, "64:ff9b::7f00:1") == "NAT64 of loopback"
    assert not LOCAL.allows_http("as.example.com", 80)


@pytest.mark.parametrize("host", ["10.1.2.3", "mcp", "mcp.ns.svc", "mcp.corp.internal"])
def test_a_private_upstream_opens_its_own_host(host: str) -> None:
    policy = AddressPolicy.for_upstream(f"https://{host}/mcp")

    assert policy.refusal(host, 8443, "10.1.2.3") == ""
    assert policy.refusal("other", 443, "10.1.2.4") == "private"
    assert not policy.allows_http(host, 80)


def test_an_upstream_by_name_may_be_private_at_its_own_origin() -> None:  # T3
    assert PUBLIC.refusal("mcp.example.com", 443, "10.0.0.1") == ""
    assert PUBLIC.refusal("mcp.example.com", 8443, "10.0.0.1") == "private"
    for address in ("127.0.0.1", "169.254.169.254"):
        assert PUBLIC.refusal("mcp.example.com", 443, address)


@pytest.mark.parametrize("address", ["168.63.129.16", "100.100.100.200", "fd00:ec2::254", "64:ff9b::168.63.129.16"])
def test_no_name_of_a_server_leads_to_a_cloud_platform_unless_that_is_listed(address: str) -> None:  # T89
    for policy in (PUBLIC, LOCAL, AddressPolicy.for_upstream("https://mcp/mcp", ["10.0.0.0/8", "100.64.0.0/16"])):
        assert "cloud platform" in policy.refusal("as.example.com", 443, address)
        assert "cloud platform" in policy.refusal("mcp.example.com", 443, address)
    listed = AddressPolicy.for_upstream("https://mcp.example.com/mcp", [address])
    assert listed.refusal("as.example.com", 443, address) == ""


def test_an_http_upstream_opens_http_at_its_own_origin_only() -> None:
    policy = AddressPolicy.for_upstream("http://mcp.ns.svc:8080/mcp")

    assert policy.allows_http("mcp.ns.svc", 8080)
    assert not policy.allows_http("mcp.ns.svc", 80)
    assert not policy.allows_http("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("entry", "host", "address"),
    [
        ("as.corp.example", "as.corp.example", "10.0.0.9"),
        ("AS.corp.example", "as.corp.example", "169.254.1.1"),
        ("10.0.0.0/8", "as.corp.example", "10.0.0.9"),
        ("10.0.0.9", "as.corp.example", "::ffff:10.0.0.9"),
        ("fd00::/8", "as.corp.example", "fd00::9"),
        ("[::1]", "as.corp.example", "::1"),
    ],
)
def test_entries_of_allow_private_are_allowed(entry: str, host: str, address: str) -> None:
    policy = AddressPolicy.for_upstream("https://mcp.example.com/mcp", [entry])

    assert policy.refusal(host, 443, address) == ""
    assert policy.refusal("other.example", 443, "192.168.0.1") == "private"
    assert not policy.allows_http(host, 80)


@pytest.mark.parametrize("entry", ["127.0.0.1", "127.0.0.0/8"])
def test_http_to_loopback_is_allowed_if_allow_private_lists_it(entry: str) -> None:
    assert AddressPolicy.for_upstream("https://mcp.example.com/mcp", [entry]).allows_http("127.0.0.1", 9000)
