"""The example and the reference page know every key."""

import dataclasses
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.settings import (
    AccountSettings,
    AdminSettings,
    AuthorizationSettings,
    EventSettings,
    IdpSettings,
    InboundSettings,
    JwtSettings,
    LimitSettings,
    OAuthSettings,
    OutboundSettings,
    ServerSettings,
    Settings,
    SignInSettings,
    TrustedHeaderSettings,
    WebhookSettings,
)
from mcp_auth_proxy.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "config.example.yaml"
REFERENCE = ROOT / "docs" / "configuration.md"
SECTIONS: dict[str, type] = {
    "": Settings,
    "authorization.": AuthorizationSettings,
    "limits.": LimitSettings,
    "inbound.": InboundSettings,
    "inbound.jwt[].": JwtSettings,
    "inbound.trusted_header.": TrustedHeaderSettings,
    "inbound.sign_in.": SignInSettings,
    "admin.": AdminSettings,
    "events.": EventSettings,
    "events.webhook.": WebhookSettings,
    "outbound.": OutboundSettings,
    "servers.*.": ServerSettings,
    "servers.*.accounts.*.": AccountSettings,
    "servers.*.oauth.": OAuthSettings,
    "servers.*.oauth.idp.": IdpSettings,
}
NOT_KEYS = {
    "source",
    *(f"servers.*.{field}" for field in ("name", "id", "origin", "owner", "version", "allow_private", "from_url")),
}
# Fields that have another name than their key, or hold a part of what is written there.
RENAMED = {
    "inbound.modes": "inbound.mode",
    "inbound.jwt[].roles_claim": "inbound.jwt[].roles.claim",
    "inbound.jwt[].roles_admin": "inbound.jwt[].roles.admin",
    "inbound.trusted_header.sources": "inbound.trusted_header.from",
}
# Keys that are no field of their section: they are turned into something else while they are read.
MORE_KEYS = {
    "upstream_timeout",
    "store.url",
    "store.keys",
    "store.import",
    "store.import_passphrase",
    "servers.*.oauth.signing_alg",
}


def setting_keys() -> set[str]:
    fields = {prefix + field.name for prefix, section in SECTIONS.items() for field in dataclasses.fields(section)}
    return {RENAMED.get(field, field) for field in fields - NOT_KEYS} | MORE_KEYS


def documented_keys() -> set[str]:
    return set(re.findall(r"^\| `([a-z_.*\[\]]+)` \|", REFERENCE.read_text(), re.MULTILINE))


def example_keys(text: str) -> set[str]:
    keys: set[str] = set()
    parents: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = re.match(r"( *(?:- )?)([a-z_]+):(?: |$)", line)
        if found is None:
            continue
        depth = len(found[1])
        parents = [parent for parent in parents if parent[0] < depth]
        if found[1].endswith("- "):
            parents[-1] = (parents[-1][0], f"{parents[-1][1]}[]")
        name = "*" if [key for _, key in parents] in (["servers"], ["servers", "*", "accounts"]) else found[2]
        parents.append((depth, name))
        keys.add(".".join(key for _, key in parents))
    return keys


def whole_example() -> str:
    """The example with its commented servers and ways to identify callers switched on."""
    text = EXAMPLE.read_text()
    return re.sub(r"^  # (  [ #-].*|  [a-z_]+:.*|[a-z_]+:)$", r"  \1", text, flags=re.MULTILINE)


def test_the_reference_has_every_key_and_no_other() -> None:
    assert documented_keys() == setting_keys()


def test_the_example_has_every_key() -> None:
    assert setting_keys() - example_keys(whole_example()) == set()


def test_the_example_loads_and_holds_the_defaults(tmp_path: Path) -> None:
    example, minimal = tmp_path / "example.yaml", tmp_path / "minimal.yaml"
    example.write_text(EXAMPLE.read_text())
    minimal.write_text("servers: {linear: {url: 'https://mcp.linear.app/mcp'}}\n")
    shown = dataclasses.replace(load(example, environ={}), source=None, public_url=None)
    assert shown == dataclasses.replace(load(minimal, environ={}), source=None)


def test_the_commented_servers_of_the_example_load(tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(whole_example())
    secrets = dict.fromkeys(re.findall(r"env:([A-Z_]+)\n", EXAMPLE.read_text()), "s")
    found = load(path, environ={**secrets, "REPORTS_KEY": a_key()})
    assert set(found.servers) == {"linear", "warehouse", "notes", "reports", "batch", "payroll", "travel"}
    assert found.servers["warehouse"].oauth.metadata


def a_key() -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def test_every_documented_key_is_known_to_the_loader(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    known = documented_keys()
    leaves = {key for key in known if not any(other.startswith((f"{key}.", f"{key}[].")) for other in known)}
    tree: dict[str, object] = {}
    for key in leaves:
        node: dict[str, object] = tree
        *parents, last = key.replace("*", "a").split(".")
        for parent in parents:
            inner = node.setdefault(parent.removesuffix("[]"), [{}] if parent.endswith("[]") else {})
            inner = inner[0] if isinstance(inner, list) else inner
            assert isinstance(inner, dict)
            node = inner
        node[last] = ["wrong"]
    path.write_text(str(tree))
    with pytest.raises(ConfigurationError) as caught:
        load(path, environ={})
    assert not [error for error in caught.value.errors if "unknown key" in error.problem]
