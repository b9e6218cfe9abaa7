"""Turn file, environment and flags into Settings. All errors are reported at once."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from mcp_auth_proxy.config import listeners, loops, values
from mcp_auth_proxy.config.document import parse
from mcp_auth_proxy.config.imports import read_imports
from mcp_auth_proxy.config.inbound import read_admin, read_inbound
from mcp_auth_proxy.config.location import data_folder
from mcp_auth_proxy.config.reader import Context, Section
from mcp_auth_proxy.config.servers import read_servers, read_single, token_exchange_errors
from mcp_auth_proxy.config.settings import (
    AuthorizationSettings,
    EventSettings,
    KeySource,
    LimitSettings,
    OutboundSettings,
    PostgresqlUrl,
    Secret,
    ServerSettings,
    Settings,
    StoreSettings,
    WebhookSettings,
)
from mcp_auth_proxy.config.store_url import local_path, read_store_url
from mcp_auth_proxy.errors import ConfigError, ConfigurationError

_UPSTREAM_TIMEOUT = ServerSettings(name="", url="").upstream_timeout
SHORT_PING = 1.0
"""Seconds. Fewer make a server and its clients busy with comments."""

_STORE = "sqlite:///mcp-auth-proxy.db"
_NO_KEYS = (
    "must be given with PostgreSQL, since no key file can be made beside such a store: for example [env:STORE_KEY], "
    "with a key that all processes on the store have; make one with: openssl rand -base64 32"
)
_BROWSER: Mapping[str, Literal["auto", "always", "never"]] = {"auto": "auto", "always": "always", "never": "never"}


def load(
    path: Path,
    *,
    environ: Mapping[str, str] = os.environ,
    listen: str | None = None,
    allow_anonymous: bool | None = None,
    secrets_of: Collection[str] | None = None,
    secret_files: set[Path] | None = None,
    programs: bool = True,
) -> Settings:
    """Return the settings of a file. Raises ConfigurationError with all errors.

    ``listen`` is the flag, which overrides the file. ``allow_anonymous``: the flag if the settings are to be served
    with; None if nothing will listen. ``secrets_of``: the servers whose secrets are needed, None for
    all. The secrets of other servers may be missing and are None in the settings; do not authorize those servers.
    ``secret_files`` collects the files that contain secrets, even if the configuration has errors. ``programs``: False
    for a file that was only found (``location.Place.is_chosen``), in which nothing may run a program.
    """
    path = path.absolute()
    try:
        document = parse(path.read_bytes())
    except OSError as error:
        raise ConfigurationError([ConfigError("", f"{path} can't be read ({error.strerror})")]) from None
    except ConfigurationError as error:
        raise ConfigurationError(error.errors, str(path)) from None
    if document.content is None:
        raise ConfigurationError([ConfigError("", "the file is empty: it needs at least a servers section")], str(path))
    if not isinstance(document.content, Mapping):
        raise ConfigurationError([ConfigError("", "the file must be a mapping (key: value lines)")], str(path))
    named = set() if secret_files is None else secret_files
    context = Context(environ, path.parent, secret_files=named, programs=programs)
    settings = _read(Section(document.content, "", context), listen, path, secrets_of)
    if allow_anonymous is not None:
        context.errors.extend(listeners.exposure_errors(settings, allow_anonymous))
    if errors := [*document.errors, *context.errors]:
        raise ConfigurationError(document.located(errors), str(path))
    return settings


def single(
    url: str, *, environ: Mapping[str, str] = os.environ, listen: str | None = None, allow_anonymous: bool = False
) -> Settings:
    """Return the settings of ``serve URL``: one server named after its host, a store in the platform's data folder."""
    context = Context(environ, data_folder())
    servers = read_single(url, context)
    section = Section({}, "", context)
    settings = Settings(
        listen=listeners.read_listen(section, listen),
        public_url=None,
        store=_read_store(section.section("store")),
        servers=servers,
    )
    context.errors.extend(listeners.exposure_errors(settings, allow_anonymous))
    context.errors.extend(loops.errors(settings, settings.listen, settings.public_url))
    if context.errors:
        raise ConfigurationError(context.errors)
    return settings


def single_store(*, environ: Mapping[str, str] = os.environ) -> StoreSettings:
    """Return the store of ``serve URL``, which exists once that was run."""
    context = Context(environ, data_folder())
    return _read_store(Section({}, "", context))


def _read(section: Section, listen: str | None, source: Path, secrets_of: Collection[str] | None) -> Settings:
    upstream_timeout = section.parsed("upstream_timeout", values.positive_duration, _UPSTREAM_TIMEOUT)
    listening = listeners.read_listen(section, listen)
    health_listen = listeners.read_health_listen(section, listening)
    settings = Settings(
        listen=listening,
        health_listen=health_listen,
        health_quit=listeners.read_health_quit(section, health_listen),
        public_url=section.parsed("public_url", values.public_url, None),
        store=_read_store(section.section("store"), secrets=secrets_of is None),
        authorization=_read_authorization(section.section("authorization")),
        limits=_read_limits(section.section("limits")),
        inbound=read_inbound(section.section("inbound"), secrets=secrets_of is None),
        admin=read_admin(section.section("admin")),
        events=_read_events(section.section("events"), secrets=secrets_of is None),
        outbound=_read_outbound(section.section("outbound")),
        servers=_read_servers(section, upstream_timeout, secrets_of),
        source=source,
    )
    section.context.errors.extend(loops.errors(settings, settings.listen, settings.public_url))
    section.context.errors.extend(token_exchange_errors(settings.servers, settings.inbound.modes))
    section.close()
    return settings


def _read_servers(
    section: Section, upstream_timeout: float, secrets_of: Collection[str] | None
) -> dict[str, ServerSettings]:
    inner = section.section("servers")
    servers = read_servers(inner, upstream_timeout, secrets_of=secrets_of)
    if inner.usable and not any(True for _ in inner.entries()):
        section.error("servers", "at least one server must be configured")
    return servers


def _read_store(section: Section, *, secrets: bool = True) -> StoreSettings:
    context = section.context
    found = section.parsed("url", lambda text: read_store_url(text, context), read_store_url(_STORE, context))
    postgresql = found if isinstance(found, PostgresqlUrl) else None
    path = local_path(found, context.environ) if isinstance(found, PostgresqlUrl) else found
    default = _default_key(path)
    if postgresql is not None and not section.has("keys"):
        section.error("keys", _NO_KEYS)
    keys = section.each("keys", lambda text: _key_source(text, context, default), min_items=1)
    imports = read_imports(section, secrets=secrets)
    section.close()
    default_key = postgresql is None and (not keys or keys == (default,))
    return StoreSettings(
        path=path,
        postgresql=postgresql,
        keys=keys or (default,),
        default_key=default_key,
        keys_named=bool(keys),
        imports=imports,
    )


def _default_key(path: Path) -> KeySource:
    key = path.with_suffix(".key")
    return KeySource(kind="file", name=str(key if key != path else path.with_name(path.name + ".key")))


def _key_source(text: str, context: Context, default: KeySource) -> KeySource:
    kind, _, name = text.partition(":")
    if kind == "env":
        context.variable(name)
        return KeySource(kind="env", name=name, written=text)
    if kind == "exec":
        context.require_programs("runs a program")
        return KeySource(kind="exec", name=values.command(name), written=text)
    if kind == "keyring":
        return KeySource(kind="keyring", name=values.keyring_name(name), written=text)
    if kind != "file":
        raise ValueError(
            "must be env:NAME, file:PATH, exec:COMMAND or keyring:SERVICE/NAME: a key does not belong in the "
            "configuration"
        )
    source = KeySource(kind="file", name=str(context.path(name)), written=text)
    if source != default or Path(source.name).exists():
        context.secret_files.add(context.path(name))
        context.file_text(name)
    return source


def _read_authorization(section: Section) -> AuthorizationSettings:
    default = AuthorizationSettings()
    settings = AuthorizationSettings(
        wait=section.parsed("wait", values.duration, default.wait),
        open_browser=section.choice("open_browser", _BROWSER, default.open_browser),
        cold_start=section.boolean("cold_start", default=default.cold_start),
        allow_private=section.each("allow_private", values.private_target) or (),
        keep_alive=section.parsed("keep_alive", values.duration, default.keep_alive),
    )
    section.close()
    return settings


def _webhook_secret(section: Section, text: str) -> Secret:
    secret = section.context.secret(text)
    values.webhook_secret(secret.value)
    return secret


def _read_events(section: Section, *, secrets: bool) -> EventSettings:
    """Return the section ``events``. ``secrets``: whether they are needed."""
    inner = section.section("webhook") if secrets else section.section("webhook").without_secrets()
    webhook = None
    if section.has("webhook"):
        url = inner.parsed("url", values.webhook_url, None)
        secret = inner.parsed("secret", lambda text: _webhook_secret(inner, text), None)
        for key, needed in (("url", "events are posted there"), ("secret", "events are signed with it")):
            if not inner.has(key):
                inner.error(key, f"is needed: {needed}")
        webhook = None if url is None else WebhookSettings(url=url, secret=secret)
    inner.close()
    section.close()
    return EventSettings(webhook=webhook)


def _read_limits(section: Section) -> LimitSettings:
    default = LimitSettings()
    settings = LimitSettings(
        body=section.parsed("body", values.size, default.body),
        memory=section.parsed("memory", values.size, default.memory),
        held=section.parsed("held", values.count, default.held),
        upstream_connections=section.parsed("upstream_connections", values.count, default.upstream_connections),
        connections=section.parsed("connections", values.count, None),
        connections_per_address=section.parsed("connections_per_address", values.count, None),
        sse_ping=section.parsed("sse_ping", values.duration, default.sse_ping),
        refresh_rate=section.parsed("refresh_rate", values.rate, default.refresh_rate),
    )
    section.close()
    return settings


def limit_warnings(limits: LimitSettings) -> list[str]:
    """Return what is hardly meant in the section ``limits``."""
    if 0 < limits.sse_ping < SHORT_PING:
        return [f"limits.sse_ping: {limits.sse_ping:g} s: every silent stream is sent a comment that often"]
    return []


def _read_outbound(section: Section) -> OutboundSettings:
    def bundle(text: str) -> Path:
        path = section.context.path(text)
        try:
            path.open("rb").close()
        except OSError as error:
            raise ValueError(f"the file {path} can't be read ({error.strerror})") from None
        return path

    settings = OutboundSettings(
        ca_bundle=section.parsed("ca_bundle", bundle, None),
        trust_proxy=section.boolean("trust_proxy", default=OutboundSettings().trust_proxy),
    )
    section.close()
    return settings
