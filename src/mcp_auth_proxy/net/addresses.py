"""Decide which addresses URLs from elsewhere may lead to, against request forgery (RFC 9728 §7.7).

These are the URLs of OAuth documents, and those of servers that were made at run time.

The classes are written out, since ``ipaddress.is_private`` and ``is_global`` miss some (NAT64, 6to4) and differ between
versions of Python.
"""

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.urls import Origin

IPAddress = IPv4Address | IPv6Address

_CLOUD = "cloud platform"
"""What a provider shows only to the machines of its customers: credentials, configuration, name servers.

These addresses are public ones, or private ones that are nobody's own network, so that no server's name may lead there.
"""

_V4_CLASSES = tuple(
    (IPv4Network(network), name)
    for network, name in (
        ("100.100.100.200/32", _CLOUD),  # Alibaba Cloud
        ("161.26.0.0/16", _CLOUD),  # IBM Cloud
        ("166.8.0.0/14", _CLOUD),  # IBM Cloud
        ("168.63.129.16/32", _CLOUD),  # Azure
        ("0.0.0.0/8", "this-network"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "carrier-grade NAT"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "protocol assignment"),
        ("192.0.2.0/24", "documentation"),
        ("192.88.99.0/24", "6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("255.255.255.255/32", "broadcast"),
        ("240.0.0.0/4", "reserved"),
    )
)

_V6_CLASSES = tuple(
    (IPv6Network(network), name)
    for network, name in (
        ("fd00:42::42/128", _CLOUD),  # Scaleway
        ("fd00:ec2::/32", _CLOUD),  # Amazon Web Services
        ("fd20:ce::254/128", _CLOUD),  # Google Cloud
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("64:ff9b:1::/48", "local NAT64"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
        ("2001::/32", "Teredo"),
        ("2001::/23", "protocol assignment"),
        ("2001:db8::/32", "documentation"),
        ("2002::/16", "6to4"),
        ("3fff::/20", "documentation"),
    )
)
_V6_GLOBAL = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")

_PRIVATE_USE = frozenset({"private", "carrier-grade NAT"})

_LOOPBACK = frozenset[IPAddress]({IPv4Address("127.0.0.1"), IPv6Address("::1")})

# Nobody can own a name below these in the public DNS, so such a host is in the operator's own network.
_PRIVATE_SUFFIXES = (".local", ".internal", ".lan", ".home.arpa", ".svc", ".corp", ".intranet")


class AddressRefused(McpAuthProxyError):
    """A host leads to an address that the policy does not allow. No packet was sent there."""


def address_class(address: str) -> str:
    """Return the class of an address in words, such as ``link-local``; empty if it is public.

    Raises ValueError if the text is not an address.
    """
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, IPv4Address):
        return next((name for network, name in _V4_CLASSES if parsed in network), "")
    if parsed.scope_id is not None:
        return "link-local"
    if parsed.ipv4_mapped is not None:
        return address_class(str(parsed.ipv4_mapped))
    if parsed in _NAT64:
        embedded = address_class(str(IPv4Address(int(parsed) & 0xFFFFFFFF)))
        return f"NAT64 of {embedded}" if embedded else ""
    for network, name in _V6_CLASSES:
        if parsed in network:
            return name
    return "" if parsed in _V6_GLOBAL else "reserved"


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """The addresses that the OAuth documents of one server may lead to besides public ones over https.

    ``hosts`` and ``networks`` are allowed whatever their class. ``own`` is host and port of the upstream if it is
    configured by name: there, and nowhere else, private addresses are allowed too, since its own traffic goes there
    anyway. ``http`` allows http there, for an upstream that is configured as http away from loopback. Without
    ``trusted`` the upstream was not named by the configuration: its own address may be private only if it is listed.
    """

    loopback: bool = False
    hosts: tuple[str, ...] = ()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    own: tuple[str, int] | None = None
    http: bool = False
    trusted: bool = True

    @classmethod
    def for_upstream(
        cls, server_url: str, allow_private: Iterable[str] = (), *, trusted: bool = True
    ) -> "AddressPolicy":
        """Return the policy for the documents of a server at this URL; ``allow_private`` are hosts and networks.

        ``trusted``: whether the URL comes from the configuration.
        """
        listed, origin = cls.only(allow_private), urls.parse(server_url).origin
        loopback = urls.is_loopback(origin.host)
        hosts = listed.hosts
        if trusted and not loopback and _is_private_host(origin.host):
            hosts = (*hosts, origin.host)
        return cls(
            loopback=loopback and (trusted or listed._lists(origin.host)),
            hosts=hosts,
            networks=listed.networks,
            own=(origin.host, origin.port),
            http=origin.scheme == "http" and not loopback,
            trusted=trusted,
        )

    @classmethod
    def only(cls, allow_private: Iterable[str]) -> "AddressPolicy":
        """Return the policy that allows public addresses, and these hosts, addresses and networks."""
        hosts: list[str] = []
        networks: list[IPv4Network | IPv6Network] = []
        for entry in allow_private:
            try:
                networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
            except ValueError:
                hosts.append(entry.lower())
        return cls(hosts=tuple(hosts), networks=tuple(networks))

    def allows_http(self, host: str, port: int) -> bool:
        """Return whether http is allowed: on loopback if the policy is, or at the upstream's origin."""
        if self.http and (host, port) == self.own:
            return True
        if not urls.is_loopback(host):
            return False
        return self.loopback or host in self.hosts or (_is_address(host) and self._listed(host))

    def check(self, origin: Origin, addresses: Iterable[str]) -> None:
        """Check all addresses that the host of an origin was resolved to. Raises AddressRefused."""
        for address in addresses:
            if kind := self.refusal(origin.host, origin.port, address):
                raise AddressRefused(f"{origin.host} leads to {address}, a {kind} address")

    def check_literal(self, origin: Origin) -> None:
        """Check a host that is an address, for a forward proxy that resolves names itself. Raises AddressRefused.

        ``0x7f.1``, ``2130706433`` and ``127.0.0.1.`` are addresses too, as system resolvers read them, and so are the
        names of loopback, which may have no address here.
        """
        found = literal(origin.host)
        for address in addresses_of(origin.host) if found is None else (found,):
            if kind := self.refusal(origin.host, origin.port, str(address)):
                raise AddressRefused(f"{origin.host} is {address}, a {kind} address")

    def refusal(self, host: str, port: int, address: str) -> str:
        """Return the class for which a resolved address must not be dialed; empty if it may be."""
        kind = address_class(address)
        if not kind or host in self.hosts or self._listed(address):
            return ""
        if kind == "loopback" and self.loopback:
            return ""
        if kind in _PRIVATE_USE and (host, port) == self.own and self.trusted and not self.loopback:
            return ""
        return kind

    def _lists(self, host: str) -> bool:
        """Return whether a host that is an address or a name of loopback is allowed with all that it leads to."""
        found = addresses_of(host)
        return host in self.hosts or (bool(found) and any(self._listed(str(address)) for address in found))

    def _listed(self, address: str) -> bool:
        parsed = ipaddress.ip_address(address)
        mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
        return any((mapped or parsed) in network for network in self.networks)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_private_host(host: str) -> bool:
    if _is_address(host):
        return bool(address_class(host))
    return "." not in host or host.removesuffix(".").endswith(_PRIVATE_SUFFIXES)


# What leads to this machine


def addresses_of(host: str) -> frozenset[IPAddress]:
    """Return the addresses that a literal or a loopback name leads to; none for other names, which need a look-up."""
    address = literal(host)
    if address is None:
        return _LOOPBACK if urls.is_loopback(host) else frozenset()
    if address.is_unspecified:  # connecting to it leads to loopback
        return frozenset(loopback for loopback in _LOOPBACK if loopback.version == address.version)
    return frozenset({address})


def literal(host: str) -> IPAddress | None:
    """Return the address that a host is, in any spelling that system resolvers read (``127.1``, ``0x7f.1``)."""
    try:
        return unmapped(host) if ":" in host else IPv4Address(socket.inet_aton(host.removesuffix(".")))
    except (OSError, ValueError):
        return None


def unmapped(text: str) -> IPAddress:
    """Return an address; an IPv4 address that is mapped into IPv6 as itself. Raises ValueError."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def is_own(address: IPAddress) -> bool:
    """Return whether an address is one of this machine: what goes there also comes from there. No packet is sent."""
    if address.is_loopback:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((str(address), 9))
            return ipaddress.ip_address(sock.getsockname()[0]) == address
    except OSError:
        return False
