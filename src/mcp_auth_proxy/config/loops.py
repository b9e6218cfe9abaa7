"""Find servers whose URL leads back to this proxy: one request would go around until no descriptor is left.

Only direct circles can be seen in a configuration. Longer ones end because the proxy counts the hops of a request
(``proxy/headers``).
"""

import asyncio
from collections.abc import Collection, Mapping
from types import MappingProxyType

from mcp_auth_proxy.config.document import located
from mcp_auth_proxy.config.settings import Address, Settings
from mcp_auth_proxy.errors import ConfigError, ConfigurationError, UpstreamUnreachable
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.addresses import IPAddress, addresses_of, is_own, literal, unmapped
from mcp_auth_proxy.net.resolver import Resolver

LOOKUP_TIMEOUT = 5.0
"""Seconds to look up a name; one that takes longer is not checked, because the hop count remains."""

LookedUp = Mapping[str, Collection[IPAddress]]
"""The addresses of names, as far as they were looked up."""

_NONE: LookedUp = MappingProxyType({})


def errors(
    settings: Settings, listening: Address, public_url: str | None, looked_up: LookedUp = _NONE
) -> list[ConfigError]:
    """Return an error for each server whose URL leads to the listening address or to ``public_url``.

    Uses no network. A name that is not in ``looked_up`` is compared as a name.
    """
    own = [listening]
    if public_url is not None:
        origin = urls.parse(public_url).origin
        own.append(Address(origin.host, origin.port))
    found: list[ConfigError] = []
    for name, server in settings.servers.items():
        origin = urls.parse(server.url).origin
        place = next((place for place in own if _leads_to(origin, place, looked_up)), None)
        if place is not None:
            key = "URL" if settings.source is None else f"servers.{name}.url"
            problem = f"leads to this proxy itself ({place}), in a loop: put the address of the MCP server here"
            found.append(ConfigError(key, problem))
    return found


def check_url(url: str, listening: Address, public_url: str) -> None:
    """Raise ValueError if a URL leads to the listening address or to ``public_url``. Uses no network."""
    origin, public = urls.parse(url).origin, urls.parse(public_url).origin
    if any(_leads_to(origin, place, _NONE) for place in (listening, Address(public.host, public.port))):
        raise ValueError("leads to this proxy itself, in a loop: name the address of the MCP server")


async def check(settings: Settings, listening: Address, public_url: str, *, resolver: Resolver) -> None:
    """Raise ConfigurationError if a server's URL leads to the proxy that listens there.

    Looked up are the name that it listens at, and those of servers at its port.
    """
    origins = {urls.parse(server.url).origin for server in settings.servers.values()}
    hosts = {listening.host, *(origin.host for origin in origins if origin.port == listening.port)}
    names = {host for host in hosts if not addresses_of(host)}
    found_addresses = await asyncio.gather(*(_look_up(name, listening.port, resolver) for name in names))
    looked_up = dict(zip(names, found_addresses, strict=True))
    found = errors(settings, listening, public_url, looked_up)
    if found:
        if settings.source is None:
            raise ConfigurationError(found)
        raise ConfigurationError(await asyncio.to_thread(located, found, settings.source), str(settings.source))


async def _look_up(name: str, port: int, resolver: Resolver) -> Collection[IPAddress]:
    try:
        addresses = await resolver.look_up(name, port, owner=f"{name}:{port}", timeout=LOOKUP_TIMEOUT)
    except UpstreamUnreachable:
        return ()
    return [unmapped(address) for address in addresses]


def _leads_to(origin: urls.Origin, place: Address, looked_up: LookedUp) -> bool:
    if origin.port != place.port:
        return False
    if origin.host.removesuffix(".") == place.host.removesuffix("."):
        return True
    targets = addresses_of(origin.host) or looked_up.get(origin.host, ())
    bound = literal(place.host)
    if bound is None or not bound.is_unspecified:
        own = addresses_of(place.host) or looked_up.get(place.host, ())
        return not set(own).isdisjoint(targets)
    # A listener on :: accepts IPv4 too.
    return any(target.version <= bound.version and is_own(target) for target in targets)
