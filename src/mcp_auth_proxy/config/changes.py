"""Compare two configurations: what differs, and which differences a running proxy can apply. Pure functions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mcp_auth_proxy.config.settings import InboundSettings, ServerSettings, Settings, StoreSettings

STORE_KEYS = "store.keys"

_RESTART: Mapping[str, Callable[[Settings], object]] = {
    "listen": lambda settings: settings.listen,
    "health_listen": lambda settings: settings.health_listen,
    "health_quit": lambda settings: settings.health_quit,
    "public_url": lambda settings: settings.public_url,
    "store.url": lambda settings: settings.store.postgresql or settings.store.path,
    "store.import": lambda settings: settings.store.imports.files,
    "inbound.mode": lambda settings: frozenset(settings.inbound.modes),
    "admin.enabled": lambda settings: settings.admin.enabled,
    "admin.token_file": lambda settings: settings.admin.token_file,
    "outbound.ca_bundle": lambda settings: settings.outbound.ca_bundle,
    "outbound.trust_proxy": lambda settings: settings.outbound.trust_proxy,
}
"""The keys that only a restart can change, and how to find their values."""

_APPLIED: Mapping[str, Callable[[Settings], object]] = {
    "authorization.wait": lambda settings: settings.authorization.wait,
    "authorization.open_browser": lambda settings: settings.authorization.open_browser,
    "authorization.cold_start": lambda settings: settings.authorization.cold_start,
    "authorization.allow_private": lambda settings: settings.authorization.allow_private,
    "authorization.keep_alive": lambda settings: settings.authorization.keep_alive,
    "limits.body": lambda settings: settings.limits.body,
    "limits.memory": lambda settings: settings.limits.memory,
    "limits.held": lambda settings: settings.limits.held,
    "limits.upstream_connections": lambda settings: settings.limits.upstream_connections,
    "limits.connections": lambda settings: settings.limits.connections,
    "limits.connections_per_address": lambda settings: settings.limits.connections_per_address,
    "limits.sse_ping": lambda settings: settings.limits.sse_ping,
    "limits.refresh_rate": lambda settings: settings.limits.refresh_rate,
    "inbound.allowed_hosts": lambda settings: settings.inbound.allowed_hosts,
    "inbound.allowed_origins": lambda settings: settings.inbound.allowed_origins,
    "inbound.trusted_proxies": lambda settings: settings.inbound.trusted_proxies,
    "inbound.allow_anonymous": lambda settings: settings.inbound.allow_anonymous,
    "inbound.provision": lambda settings: settings.inbound.provision,
    "inbound.jwt": lambda settings: settings.inbound.jwt,
    "inbound.trusted_header": lambda settings: settings.inbound.trusted_header,
    "inbound.sign_in": lambda settings: settings.inbound.sign_in,
    "events.webhook": lambda settings: settings.events.webhook,
    "admin.adhoc": lambda settings: settings.admin.adhoc,
    "admin.popup_origins": lambda settings: settings.admin.popup_origins,
    "admin.allow_private": lambda settings: settings.admin.allow_private,
    "admin.customer_id": lambda settings: settings.admin.customer_id,
}
"""The keys besides ``servers`` that a running proxy applies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerChange:
    """Names of servers, in the order of their configuration. Falsy if nothing has changed."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        parts = {"added": self.added, "removed": self.removed, "changed": self.changed}
        return "; ".join(f"{verb} {', '.join(names)}" for verb, names in parts.items() if names)


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsChange:
    """The changes that a reload makes. Falsy if there are none to apply."""

    settings: Settings
    """The settings afterwards: the new ones, with the old values of the keys that need a restart."""
    servers: ServerChange
    applied: tuple[str, ...]
    """The other keys that change now."""
    needs_restart: tuple[str, ...]
    """The keys that keep their old values until the proxy is started again."""
    store: StoreSettings
    """The store with its new keys, which are taken up only if they open it."""

    def __bool__(self) -> bool:
        return bool(self.servers or self.applied)

    def with_store_keys(self) -> "SettingsChange":
        """Return the change for a proxy that has taken up the new keys of its store."""
        return replace(self, settings=replace(self.settings, store=self.store), applied=(*self.applied, STORE_KEYS))


def compare_servers(old: Mapping[str, ServerSettings], new: Mapping[str, ServerSettings]) -> ServerChange:
    """Return which servers were added, removed or changed; a secret that was read again counts as a setting."""
    return ServerChange(
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        changed=tuple(name for name in new if name in old and old[name] != new[name]),
    )


def compare(old: Settings, new: Settings) -> SettingsChange:
    """Return the changes that take a running proxy from ``old`` to ``new``."""
    new_inbound = _with_modes_of(old.inbound, new.inbound)
    store = _with_new_keys(old.store, new.store)
    # The keys of another store come with it.
    other_keys = (STORE_KEYS,) if store is old.store and _keys(old.store) != _keys(new.store) else ()
    settings = replace(
        new,
        listen=old.listen,
        health_listen=old.health_listen,
        health_quit=old.health_quit,
        public_url=old.public_url,
        store=old.store,
        inbound=new_inbound,
        admin=replace(new.admin, enabled=old.admin.enabled, token_file=old.admin.token_file),
        outbound=old.outbound,
    )
    return SettingsChange(
        settings=settings,
        servers=compare_servers(old.servers, new.servers),
        applied=_different(_APPLIED, old, settings),
        needs_restart=(*_different(_RESTART, old, new), *other_keys),
        store=store,
    )


def _with_new_keys(old: StoreSettings, new: StoreSettings) -> StoreSettings:
    if (new.postgresql, new.path) != (old.postgresql, old.path):
        return old
    return replace(old, keys=new.keys, default_key=new.default_key, keys_named=new.keys_named)


def _keys(store: StoreSettings) -> object:
    """Return the keys of a store; None for the default, which follows the store."""
    return None if store.default_key else store.keys


def _with_modes_of(old: InboundSettings, new: InboundSettings) -> InboundSettings:
    """Return new settings with the modes of the old ones, and with whatever those modes need, if the modes differ."""
    if frozenset(old.modes) == frozenset(new.modes):
        return replace(new, modes=old.modes)
    return replace(new, modes=old.modes, jwt=old.jwt, trusted_header=old.trusted_header, sign_in=old.sign_in)


def _different(keys: Mapping[str, Callable[[Settings], object]], old: Settings, new: Settings) -> tuple[str, ...]:
    return tuple(key for key, value in keys.items() if value(old) != value(new))
