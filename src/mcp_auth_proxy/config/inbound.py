"""Read the sections ``inbound`` and ``admin``: who may call, how callers are identified, and what the API allows."""

import re
from collections.abc import Mapping
from typing import Literal

from mcp_auth_proxy.config import values
from mcp_auth_proxy.config.reader import Section
from mcp_auth_proxy.config.settings import (
    AdminSettings,
    InboundMode,
    InboundSettings,
    JwtSettings,
    SignInSettings,
    TrustedHeaderSettings,
)

_MODES: Mapping[str, InboundMode] = {"api_key": "api_key", "jwt": "jwt", "trusted_header": "trusted_header"}
_NONE = "none"
_PROVISION: Mapping[str, Literal["auto", "listed"]] = {"auto": "auto", "listed": "listed"}
_ADHOC: Mapping[str, Literal["off", "admin", "member"]] = {"off": "off", "admin": "admin", "member": "member"}

_FIELD_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,7}")
_OTHER_USES = frozenset(
    {"accept", "authorization", "connection", "content-length", "content-type", "cookie", "host", "origin"}
    | {"te", "transfer-encoding", "upgrade", "x-api-key", "last-event-id"}
)
_CLAIM = re.compile(r"[!-~]{1,255}")
_MAX_TEXT = 255


def read_inbound(section: Section, *, secrets: bool = True) -> InboundSettings:
    """Return the section ``inbound``. ``secrets``: whether they are needed."""
    default = InboundSettings()
    # The section is read again without its secrets, so that they may be missing.
    if not secrets:
        section = section.without_secrets()
    modes = _read_modes(section)
    settings = InboundSettings(
        modes=modes,
        provision=section.choice("provision", _PROVISION, default.provision),
        jwt=_read_issuers(section),
        trusted_header=_read_trusted_header(section),
        sign_in=_read_sign_in(section),
        allowed_hosts=section.each("allowed_hosts", values.allowed_host) or (),
        allowed_origins=section.each("allowed_origins", values.allowed_origin) or (),
        trusted_proxies=section.each("trusted_proxies", values.network) or (),
        allow_anonymous=section.boolean("allow_anonymous", default=default.allow_anonymous),
    )
    for key in ("jwt", "trusted_header"):
        if key in modes and not section.has(key):
            section.error(key, f"is needed, because {section.inner('mode')} is or has {key}")
    section.close()
    return settings


def read_admin(section: Section) -> AdminSettings:
    """Return the section ``admin``."""
    default = AdminSettings()
    settings = AdminSettings(
        enabled=section.boolean("enabled", default=default.enabled),
        adhoc=section.choice("adhoc", _ADHOC, default.adhoc),
        popup_origins=section.each("popup_origins", values.allowed_origin) or (),
        allow_private=section.each("allow_private", values.private_target) or (),
        customer_id=section.parsed("customer_id", _short_text, default.customer_id),
        token_file=section.parsed("token_file", section.context.path, None),
    )
    section.close()
    return settings


def warnings(inbound: InboundSettings) -> list[str]:
    """Return what the section says without effect."""
    configured = {"jwt": bool(inbound.jwt), "trusted_header": inbound.trusted_header is not None}
    found = [key for key, is_there in configured.items() if is_there and key not in inbound.modes]
    if inbound.sign_in is not None and not inbound.modes:
        found.append("sign_in")
    mode = f"does not have {' and '.join(found)}" if inbound.modes else "is none"
    return [f"{', '.join(f'inbound.{key}' for key in found)}: without effect, because inbound.mode {mode}"] * bool(
        found
    )


def _read_modes(section: Section) -> tuple[InboundMode, ...]:
    found = section.one_or_more("mode", _mode) or ()
    if _NONE in found and len(found) > 1:
        section.error("mode", "none can't be combined with others: with it callers are not identified")
    return tuple(dict.fromkeys(_MODES[mode] for mode in found if mode != _NONE))


def _mode(text: str) -> str:
    if text != _NONE and text not in _MODES:
        raise ValueError(f"must be one of none, {', '.join(_MODES)}, or a list of the last three, not {text[:40]!r}")
    return text


def _read_issuers(section: Section) -> tuple[JwtSettings, ...]:
    found: list[JwtSettings] = []
    inners = section.sections("jwt")
    if section.has("jwt") and not inners:
        section.error("jwt", "must have at least 1 item")
    for inner in inners:
        settings = _read_issuer(inner)
        if settings is not None:
            found.append(settings)
            if any(_same_issuer(settings, other) for other in found[:-1]):
                inner.error("kubernetes" if settings.kubernetes else "issuer", "is configured twice")
    return tuple(found)


def _same_issuer(one: JwtSettings, other: JwtSettings) -> bool:
    return one.issuer == other.issuer and one.kubernetes == other.kubernetes


def _read_issuer(section: Section) -> JwtSettings | None:
    kubernetes = section.boolean("kubernetes", default=False)
    issuer = section.parsed("issuer", values.issuer, None)
    jwks = section.parsed("jwks", _key_set, "auto")
    if kubernetes:
        for key in ("issuer", "jwks"):
            if section.has(key):
                section.error(key, "can't be set together with kubernetes: the pod's service account says it")
        if section.has("scopes"):
            section.error("scopes", "can't be set together with kubernetes: nobody logs in there")
    audience = section.parsed("audience", _short_text, None)
    _require(section, "audience", "the aud that tokens must have, for example the URL of this proxy")
    if not kubernetes:
        _require(section, "issuer", "the iss that tokens must have, character by character")
    principal = section.parsed("principal", _claim, "sub")
    scopes = section.each("scopes", values.scope) or ()
    roles = section.section("roles")
    claim = roles.parsed("claim", _claim, None)
    admin = roles.each("admin", _short_text) or ()
    if section.has("roles"):
        _require(roles, "claim", "the claim that says who is an admin")
        _require(roles, "admin", "the values of that claim that make an admin")
    roles.close()
    section.close()
    if audience is None or (issuer is None and not kubernetes):
        return None
    return JwtSettings(
        issuer="" if kubernetes else issuer or "",
        audience=audience,
        jwks=jwks,
        principal=principal,
        roles_claim=claim,
        roles_admin=admin,
        scopes=tuple(dict.fromkeys(scopes)),
        kubernetes=kubernetes,
    )


def _read_trusted_header(section: Section) -> TrustedHeaderSettings | None:
    inner = section.section("trusted_header")
    if not section.has("trusted_header"):
        return None
    name = inner.parsed("name", _field_name, None)
    sources = inner.each("from", values.network, min_items=1)
    secret = inner.parsed("secret", inner.context.secret, None)
    secret_header = inner.parsed("secret_header", _field_name, None)
    _require(inner, "name", "the field that names the caller, for example X-Forwarded-User")
    _require(inner, "from", "the addresses of the web servers that may send it, for example [10.0.0.0/8]")
    if inner.has("secret_header") and not inner.has("secret"):
        inner.error("secret", "is needed with secret_header")
    if inner.has("secret") and not inner.has("secret_header"):
        inner.error("secret_header", "is needed with secret: the field that it is sent in")
    if name is not None and name == secret_header:
        inner.error("secret_header", "must be another field than name")
    inner.close()
    if name is None or sources is None:
        return None
    return TrustedHeaderSettings(name=name, sources=sources, secret=secret, secret_header=secret_header)


def _read_sign_in(section: Section) -> SignInSettings | None:
    inner = section.section("sign_in")
    if not section.has("sign_in"):
        return None
    issuer = inner.parsed("issuer", values.issuer, None)
    client_id = inner.parsed("client_id", _short_text, None)
    secret = inner.parsed("client_secret", inner.context.secret, None)
    _require(inner, "issuer", "the identity provider")
    _require(inner, "client_id", "the id of this proxy at the identity provider")
    inner.close()
    if issuer is None or client_id is None:
        return None
    return SignInSettings(issuer=issuer, client_id=client_id, client_secret=secret)


def _require(section: Section, key: str, what: str) -> None:
    if not section.has(key):
        section.error(key, f"is needed: {what}")


def _field_name(text: str) -> str:
    name = text.lower()
    if _FIELD_NAME.fullmatch(name) is None:
        raise ValueError("must be the name of a field, such as X-Forwarded-User: letters and digits, up to 7 hyphens")
    if name in _OTHER_USES or name.startswith(("mcp-", "sec-")):
        raise ValueError(f"can't be {text}: that field has another use")
    return name


def _key_set(text: str) -> str:
    return text if text == "auto" else values.endpoint(text)


def _claim(text: str) -> str:
    if _CLAIM.fullmatch(text) is None:
        raise ValueError("must be the name of a claim, such as sub")
    return text


def _short_text(text: str) -> str:
    if len(text) > _MAX_TEXT or not text.isprintable():
        raise ValueError(f"must be at most {_MAX_TEXT} printable characters")
    return text
