"""The configuration of one server that ``doctor`` proposes: the current one plus what is missing."""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import yaml

from mcp_auth_proxy.cli.doctor.providers import Provider
from mcp_auth_proxy.cli.doctor.report import Change
from mcp_auth_proxy.config import document
from mcp_auth_proxy.config.reader import Context, Section
from mcp_auth_proxy.config.servers import read_servers
from mcp_auth_proxy.config.settings import ServerSettings, Settings, server_key
from mcp_auth_proxy.errors import ConfigHint, ConfigurationError, without_query_values
from mcp_auth_proxy.models import ClientAuth, GrantType

PLACEHOLDER = "YOUR_CLIENT_ID"

_WHY = {
    "oauth.client_id": "register a client with the authorization server by hand, and set its id here",
    "oauth.client_auth": "a method that the server lists; without this key the proxy chooses one",
    "oauth.allow_missing_pkce": "only if you know that the authorization server supports PKCE (S256)",
    "oauth.dpop": "the server accepts only tokens that are bound to a key",
    "oauth.issuer": "only if you know that this is the right authorization server for this MCP server",
    "oauth.metadata": "this provider publishes no metadata",
    "authorization.allow_private": "only if the proxy should reach this host: it is in a private network",
}
# Keys that make the proxy trust another party are named, but never set: the server may be hostile.
_OPERATOR_DECIDES = frozenset({"oauth.issuer", "authorization.allow_private"})

_BY_SECRET = frozenset({ClientAuth.BASIC.value, ClientAuth.POST.value})
_SECRETS = frozenset({"client_secret", "private_key", "assertion", "id_token", "refresh_token"})
_TOP_LEVEL = ("public_url", "upstream_timeout", "authorization", "outbound")
_PLAIN = frozenset({"true", "false"})
_URL = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?(/[A-Za-z0-9._~/%=&?-]*)?")
"""Needs no quotes, although PyYAML would add some."""

Tree = dict[str, object]


class Proposal:
    """Built with ``apply_hint`` and ``apply_provider``. Values are strings, lists and mappings, as in the file."""

    def __init__(self, settings: Settings, server: ServerSettings) -> None:
        self._name = server.name
        self._timeout = server.upstream_timeout
        self._grant = server.oauth.grant
        self._folder = settings.source.parent if settings.source else Path.cwd()
        self._top: Tree = {}
        self._server: Tree = {"url": server.url}
        if settings.source is not None:
            content = cast(Mapping[str, object], document.parse(settings.source.read_bytes()).content)
            self._top = {key: content[key] for key in _TOP_LEVEL if content.get(key) is not None}
            self._server = copy.deepcopy(cast(dict[str, dict[str, Tree]], content)["servers"][server.name])
        self.changes: list[Change] = []

    @property
    def complete(self) -> bool:
        """Whether the operator has nothing left to fill in."""
        return self._shown_url() == self._server["url"] and all(change.value != PLACEHOLDER for change in self.changes)

    def apply_hint(self, hint: ConfigHint, provider: Provider | None) -> bool:
        """Apply the hint of an error. Return False if it can't be set here."""
        value: object = hint.value
        if hint.key == "oauth.client_id":
            value = PLACEHOLDER
        elif hint.key == "oauth.metadata":
            value = provider.metadata if provider is not None else None
        elif hint.key == "authorization.allow_private":
            value = [hint.value]
        if value is None or any(change.key == self._path(hint.key) for change in self.changes):
            return False
        if value == PLACEHOLDER:
            self._defer_client_auth()
        return self._change(hint.key, value, _WHY[hint.key], applied=hint.key not in _OPERATOR_DECIDES)

    def apply_provider(self, provider: Provider, *, scopes_known: bool) -> None:
        """Apply what a provider is known to need for the grant in use. Configured keys are kept."""
        unused = "token_params" if self._grant is GrantType.AUTHORIZATION_CODE else "authorization_params"
        skipped = {unused, "scopes"} if scopes_known else {unused}
        for key, value in provider.oauth.items():
            if key not in skipped:
                self._change(f"oauth.{key}", value, f"{provider.name} needs it", applied=True)
        for key, value in provider.suggests.items():
            if key not in skipped:
                self._change(f"oauth.{key}", value, f"{provider.name} may need it, with your value", applied=False)

    def suggest_issuer(self, issuer: str) -> None:
        """Name the issuer to write for a client whose credentials go to whatever authorization server is found."""
        why = "only if this is the authorization server that the client's credentials are for"
        self._change("oauth.issuer", issuer, why, applied=False)

    def settings(self) -> ServerSettings:
        """Return the proposed settings of the server. Raises ConfigurationError if they are not valid."""
        context = Context(os.environ, self._folder)
        servers = read_servers(Section({self._name: _as_written(self._server)}, "servers", context), self._timeout)
        if context.errors:
            raise ConfigurationError(context.errors)
        return servers[self._name]

    def as_yaml(self, redirect_uri: str) -> str:
        """Return the proposal as a YAML file, with a reason for each change. Secrets are not shown."""
        why = {change.key: change.why for change in self.changes if change.applied}
        if self._shown_url() != self._server["url"]:
            why[server_key(self._name, "url")] = "the values of its query are not shown here: fill them in"
        shown = _without_secrets({**self._server, "url": self._shown_url()}, self._name)
        tree = {**self._top, "servers": {self._name: shown}}
        lines = list(_lines(tree, "", "", why))
        if self._path("oauth.client_id") in why and redirect_uri:
            lines.append(f"# The redirect URI to register for the client: {redirect_uri}")
        if any(change.value == PLACEHOLDER for change in self.changes):
            secret = f"env:{_variable(self._name, 'client_secret')}"
            lines.append(f"# If the client has a secret: {self._path('oauth.client_secret')}: {secret}")
        for change in self.changes:
            if not change.applied:
                lines.append(f"# Not set here, {change.why}: {change.key}: {_flow(change.value)}")
        return "\n".join(lines) + "\n"

    def _shown_url(self) -> str:
        return without_query_values(str(self._server["url"]))

    def _change(self, key: str, value: object, why: str, *, applied: bool) -> bool:
        if applied:
            oauth = cast(Tree, self._server.setdefault("oauth", {}))
            name = key.removeprefix("oauth.")
            current = oauth.get(name)
            if isinstance(value, Mapping) and (current is None or isinstance(current, Mapping)):
                # The operator's own values are kept.
                merged = {**value, **(current or {})}
                if merged == current:
                    return False
                value = merged
            elif name in oauth and key not in _WHY:
                return False
            oauth[name] = value
        elif self._is_set(key):
            return False
        self.changes.append(Change(key=self._path(key), value=value, why=why, applied=applied))
        return applied

    def _defer_client_auth(self) -> None:
        """Remove a method that needs a secret: the file would be invalid with a client that has none."""
        oauth = self._server.get("oauth")
        if isinstance(oauth, dict) and oauth.get("client_auth") in _BY_SECRET and "client_secret" not in oauth:
            why, method = "only with the secret of that client", oauth.pop("client_auth")
            self.changes.append(Change(key=self._path("oauth.client_auth"), value=method, why=why, applied=False))

    def _is_set(self, key: str) -> bool:
        """Return whether the operator has already set a key that is only suggested for a provider."""
        oauth = self._server.get("oauth")
        name = key.removeprefix("oauth.")
        return key not in _OPERATOR_DECIDES and isinstance(oauth, Mapping) and name in oauth

    def _path(self, key: str) -> str:
        return server_key(self._name, key) if key.startswith("oauth.") else key


def _as_written(value: object) -> object:
    """Return a value as the configuration reader expects it: all scalars are strings."""
    if isinstance(value, Mapping):
        return {str(key): _as_written(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_written(item) for item in value]
    return value


def _without_secrets(value: object, name: str) -> object:
    """Replace secrets that are in the file itself by ``env:NAME``: they must not appear on a terminal."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: f"env:{_variable(name, key)}" if _is_secret(key, item) else _without_secrets(item, name)
        for key, item in value.items()
    }


def _is_secret(key: str, value: object) -> bool:
    return key in _SECRETS and isinstance(value, str) and not value.startswith(("env:", "file:"))


def _variable(server: str, key: str) -> str:
    return f"{server}_{key}".upper().replace("-", "_")


def _lines(tree: Mapping[str, object], path: str, indent: str, why: Mapping[str, str]) -> Iterator[str]:
    for key, value in tree.items():
        inner = f"{path}.{key}" if path else key
        if inner in why:
            yield f"{indent}# {why[inner]}"
        if isinstance(value, Mapping) and value:
            yield f"{indent}{_scalar(key)}:"
            yield from _lines(value, inner, f"{indent}  ", why)
        else:
            yield f"{indent}{_scalar(key)}: {_flow(value)}"


def _flow(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return "" if value is None else _scalar(str(value))


def _scalar(text: str) -> str:
    """Return text as a YAML scalar that reads back unchanged, in block and flow style."""
    if text in _PLAIN or _URL.fullmatch(text):
        return text
    # In flow style, PyYAML quotes text with commas or brackets.
    dumped: str = yaml.safe_dump([text], default_flow_style=True, width=100_000, allow_unicode=True)
    return dumped.strip()[1:-1]
