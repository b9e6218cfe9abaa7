"""The addresses of those who connect: one notation for each, and which of them are counted together."""

from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

_MAPPED = IPv6Network("::ffff:0:0/96")
"""IPv4 addresses as an IPv6 socket shows them (RFC 4291 §2.5.5.2)."""

_SUBNET = 64
"""Bits of an IPv6 address that a network has; a machine in it may use any of the 2**64 addresses (RFC 4291 §2.5.1)."""


def parse_address(text: str) -> IPAddress:
    """Return an address, without its zone; a mapped one as IPv4. Raises ValueError."""
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def parse_network(text: str) -> IPNetwork:
    """Return an address or a network (CIDR) as a network; a mapped one as IPv4. Raises ValueError."""
    network = ip_network(text.strip("[]"))
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        return IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - _MAPPED.prefixlen))
    return network


def client_of(peer: str, forwarded_for: bytes, trusted: Collection[IPNetwork]) -> str:
    """Return whose request came from an address, for a log: "CLIENT through PEER" if a trusted proxy names the client.

    ``forwarded_for`` is X-Forwarded-For: each proxy has added the address that it saw, so everything before the last
    one that is not a trusted proxy's may be forged.
    """
    try:
        client = address = parse_address(peer)
        for text in reversed(forwarded_for.decode("latin-1").split(",")):
            if not is_in(address, trusted):
                break
            client = address = parse_address(text.strip())
    except ValueError:
        pass
    return peer if str(client) == peer else f"{client} through {peer}"


def is_in(address: IPAddress, networks: Collection[IPNetwork]) -> bool:
    """Return whether an address is in one of the networks."""
    return any(address in network for network in networks)


def limit_key(address: IPAddress) -> IPAddress:
    """Return the address to count a peer by: its own, or the first one of its subnet for IPv6."""
    if isinstance(address, IPv4Address):
        return address
    return IPv6Address(int(address) >> 128 - _SUBNET << 128 - _SUBNET)
