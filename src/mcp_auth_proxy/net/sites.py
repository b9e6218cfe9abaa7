"""Decide whether two hosts belong to one site: the names that one party controls.

A site is a registrable domain: a public suffix and the label before it. The suffixes are those of the public suffix
list, its private part included, so that two customers of ``github.io`` are two sites. Scheme and port do not matter.
"""

import re
from functools import cache
from ipaddress import IPv6Address

from publicsuffixlist import PublicSuffixList

# Browsers read such a host as an IPv4 address, in whatever notation, or not at all (WHATWG URL, "ends in a number").
_ENDS_IN_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")


def same_site(host: str, other: str) -> bool:
    """Return whether two hosts, as in ``urls.Origin.host``, belong to one site.

    An IP address, a public suffix and a single label such as ``localhost`` are each a site of their own. The list is
    loaded only if the hosts differ. That takes 2 MB, and 50 ms the first time, so it is no work for the event loop.
    """
    host, other = _plain(host), _plain(other)
    if host == other:
        return True
    if _is_address(host) or _is_address(other):
        return False
    return _site(host) == _site(other)


def _plain(host: str) -> str:
    """Return a host in one spelling: lower case, no trailing dot, IPv6 in its short form (RFC 5952)."""
    return str(IPv6Address(host)) if ":" in host else host.lower().removesuffix(".")


def _is_address(host: str) -> bool:
    return ":" in host or _ENDS_IN_NUMBER.fullmatch(host) is not None


def _site(host: str) -> str:
    return _public_suffixes().privatesuffix(host) or host


@cache
def _public_suffixes() -> PublicSuffixList:
    """Return the list that is in the package; nothing is downloaded."""
    return PublicSuffixList()
