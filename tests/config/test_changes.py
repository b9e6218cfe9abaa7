"""What a reload may change, decided from two values of Settings."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from mcp_auth_proxy.config import changes, signing_key
from mcp_auth_proxy.config.changes import ServerChange, compare
from mcp_auth_proxy.config.settings import (
    Address,
    AdminSettings,
    AuthorizationSettings,
    EventSettings,
    ImportSettings,
    InboundSettings,
    JwtSettings,
    KeySource,
    LimitSettings,
    OutboundSettings,
    ServerSettings,
    Settings,
    SignInSettings,
    StoreSettings,
    TrustedHeaderSettings,
    WebhookSettings,
)

KEY = KeySource(kind="file", name="/x/store.key")
BASE = Settings(
    listen=Address("127.0.0.1", 8787),
    public_url=None,
    store=StoreSettings(path=Path("/x/store.db"), keys=(KEY,), default_key=True),
    servers={"a": ServerSettings(name="a", url="https://a.example/mcp")},
    source=Path("/x/mcp-auth-proxy.yaml"),
)

RESTART = {
    "listen": replace(BASE, listen=Address("127.0.0.1", 8788)),
    "health_listen": replace(BASE, health_listen=Address("0.0.0.0", 8788)),
    "health_quit": replace(BASE, health_quit=True),
    "public_url": replace(BASE, public_url="https://proxy.example"),
    "store.url": replace(BASE, store=replace(BASE.store, path=Path("/x/other.db"))),
    "store.import": replace(BASE, store=replace(BASE.store, imports=ImportSettings(files=(Path("/x/export"),)))),
    "inbound.mode": replace(BASE, inbound=InboundSettings(modes=("api_key",))),
    "admin.enabled": replace(BASE, admin=AdminSettings(enabled=False)),
    "admin.token_file": replace(BASE, admin=AdminSettings(token_file=Path("/x/token"))),
    "outbound.ca_bundle": replace(BASE, outbound=OutboundSettings(ca_bundle=Path("/x/ca.pem"))),
    "outbound.trust_proxy": replace(BASE, outbound=OutboundSettings(trust_proxy=True)),
}
NEW_KEYS = replace(BASE, store=replace(BASE.store, keys=(KeySource(kind="env", name="K"), KEY), default_key=False))
APPLIED = {
    "authorization.wait": replace(BASE, authorization=AuthorizationSettings(wait=1)),
    "authorization.open_browser": replace(BASE, authorization=AuthorizationSettings(open_browser="never")),
    "authorization.cold_start": replace(BASE, authorization=AuthorizationSettings(cold_start=False)),
    "authorization.allow_private": replace(BASE, authorization=AuthorizationSettings(allow_private=("10.0.0.1",))),
    "authorization.keep_alive": replace(BASE, authorization=AuthorizationSettings(keep_alive=0)),
    "events.webhook": replace(BASE, events=EventSettings(webhook=WebhookSettings(url="https://a", secret=None))),
    "limits.body": replace(BASE, limits=LimitSettings(body=1)),
    "limits.memory": replace(BASE, limits=LimitSettings(memory=1)),
    "limits.held": replace(BASE, limits=LimitSettings(held=1)),
    "limits.upstream_connections": replace(BASE, limits=LimitSettings(upstream_connections=1)),
    "limits.connections": replace(BASE, limits=LimitSettings(connections=1)),
    "limits.connections_per_address": replace(BASE, limits=LimitSettings(connections_per_address=1)),
    "limits.sse_ping": replace(BASE, limits=LimitSettings(sse_ping=0)),
    "limits.refresh_rate": replace(BASE, limits=LimitSettings(refresh_rate=5)),
    "inbound.trusted_proxies": replace(BASE, inbound=InboundSettings(trusted_proxies=(IPv4Network("10.0.0.0/8"),))),
    "inbound.allow_anonymous": replace(BASE, inbound=InboundSettings(allow_anonymous=True)),
    "inbound.allowed_origins": replace(BASE, inbound=InboundSettings(allowed_origins=("https://a.example",))),
    "inbound.allowed_hosts": replace(BASE, inbound=InboundSettings(allowed_hosts=("proxy.example",))),
    "inbound.provision": replace(BASE, inbound=InboundSettings(provision="listed")),
    "inbound.jwt": replace(BASE, inbound=InboundSettings(jwt=(JwtSettings(issuer="https://a.example", audience="p"),))),
    "inbound.trusted_header": replace(
        BASE,
        inbound=InboundSettings(
            trusted_header=TrustedHeaderSettings(name="x-user", sources=(IPv4Network("10.0.0.0/8"),))
        ),
    ),
    "inbound.sign_in": replace(
        BASE, inbound=InboundSettings(sign_in=SignInSettings(issuer="https://a.example", client_id="proxy"))
    ),
    "admin.adhoc": replace(BASE, admin=AdminSettings(adhoc="member")),
    "admin.popup_origins": replace(BASE, admin=AdminSettings(popup_origins=("https://a.example",))),
    "admin.allow_private": replace(BASE, admin=AdminSettings(allow_private=("10.0.0.1",))),
    "admin.customer_id": replace(BASE, admin=AdminSettings(customer_id="other")),
}


def test_nothing_has_changed() -> None:
    change = compare(BASE, replace(BASE, servers=dict(BASE.servers)))
    assert not change
    assert (change.applied, change.needs_restart, change.servers) == ((), (), ServerChange())


@pytest.mark.parametrize("key", RESTART)
def test_a_key_that_needs_a_restart_is_named_and_keeps_its_value(key: str) -> None:
    change = compare(BASE, RESTART[key])
    assert not change
    assert (change.needs_restart, change.applied, change.settings) == ((key,), (), BASE)


@pytest.mark.parametrize("key", APPLIED)
def test_another_key_is_applied(key: str) -> None:
    change = compare(BASE, APPLIED[key])
    assert change
    assert (change.applied, change.needs_restart, change.settings) == ((key,), (), APPLIED[key])


def test_other_keys_are_applied_even_if_one_needs_a_restart() -> None:
    new = replace(RESTART["listen"], servers={}, limits=LimitSettings(body=1))
    change = compare(BASE, new)
    assert (change.servers.removed, change.applied, change.needs_restart) == (("a",), ("limits.body",), ("listen",))
    assert change.settings == replace(new, listen=BASE.listen)
    # As long as the file says so, it is said again.
    assert compare(change.settings, new).needs_restart == ("listen",)


def test_new_keys_of_the_store_are_for_who_can_check_them() -> None:
    change = compare(BASE, NEW_KEYS)
    assert (change.needs_restart, change.applied, change.settings) == ((), (), BASE)
    assert change.store == NEW_KEYS.store
    taken_up = change.with_store_keys()
    assert (taken_up.applied, taken_up.settings) == (("store.keys",), NEW_KEYS)


def test_the_keys_of_another_store_come_with_it() -> None:
    other = replace(NEW_KEYS, store=replace(NEW_KEYS.store, path=Path("/x/other.db")))
    change = compare(BASE, other)
    assert (change.needs_restart, change.store) == (("store.url", "store.keys"), BASE.store)


def test_a_default_key_that_follows_the_store_is_not_named_too() -> None:
    other = StoreSettings(path=Path("/y/s.db"), keys=(KeySource(kind="file", name="/y/s.key"),), default_key=True)
    assert compare(BASE, replace(BASE, store=other)).needs_restart == ("store.url",)


def test_every_setting_is_either_applied_or_needs_a_restart() -> None:
    sections = {"authorization", "events", "limits", "inbound", "admin", "outbound", "store"}
    keys = {field.name for field in fields(Settings)} - sections - {"servers", "source"}
    for section in sections - {"store"}:
        assert is_dataclass(getattr(BASE, section))
        keys |= {f"{section}.{field.name}" for field in fields(getattr(BASE, section))}
    keys = keys - {"inbound.modes"} | {"inbound.mode", "store.url", "store.keys", "store.import"}
    assert keys == set(RESTART) | set(APPLIED) | {"store.keys"}
    assert set(changes._RESTART) == set(RESTART)
    assert set(changes._APPLIED) == set(APPLIED)


@pytest.mark.parametrize(
    "make", [lambda: ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate], ids=["EC", "Ed25519"]
)
def test_a_signing_key_that_is_read_again_unchanged_is_not_a_change(make: Callable[[], signing_key.PrivateKey]) -> None:
    pem, other = (make().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode() for _ in range(2))
    assert signing_key.read(pem) == signing_key.read(pem)
    assert hash(signing_key.read(pem)) == hash(signing_key.read(pem))
    assert signing_key.read(pem) != signing_key.read(other)
    assert signing_key.read(pem) != pem
