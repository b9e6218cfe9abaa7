"""The configuration of one server as ``doctor`` proposes it: the present one, and what is missing in it."""

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
from mcp_auth_proxy.config.settings import ServerSettings, Settings
from mcp_auth_proxy.errors import ConfigHint, ConfigurationError, without_query_values
from mcp_auth_proxy.models import ClientAuth, GrantType

PLACEHOLDER = "YOUR_CLIENT_ID"

_WHY = {
    "oauth.client_id": "register a client with the authorization server by hand, and put its id here",
    "oauth.client_auth": "one that the server lists; left out, the proxy chooses among them",
    "oauth.allow_missing_pkce": "only if the authorization server is known to support PKCE (S256) without saying so",
    "oauth.dpop": "the server takes only tokens that are bound to a key",
    "oauth.issuer": "only if this move to another authorization server is genuine",
    "oauth.metadata": "this provider has no metadata that could be discovered",
    "authorization.allow_private": "only if this host is meant to be reached: it is in a private network",
}
# What would have the proxy trust another party is named, but never put in place: the server may be hostile.
_TO_BE_DECIDED = frozenset({"oauth.issuer", "authorization.allow_private"})

_BY_SECRET = frozenset({ClientAuth.BASIC.value, ClientAuth.POST.value})
_SECRETS = frozenset({"client_secret", "private_key", "assertion", "id_token", "refresh_token"})
_TOP_LEVEL = ("public_url", "upstream_timeout", "authorization", "outbound")
_PLAIN = frozenset({"true", "false"})
_URL = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?(/[A-Za-z0-9._~/%=&?-]*)?")
"""Needs no quotes, though YAML's own writer gives it some."""

Tree = dict[str, object]


class Proposal:
    """Grows by ``apply_hint`` and ``apply_provider``. Values are text, lists and mappings, as the file has them."""

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
        """Whether nothing is left to fill in."""
        return self._shown_url() == self._server["url"] and all(change.value != PLACEHOLDER for change in self.changes)

    def apply_hint(self, remedy: ConfigHint, provider: Provider | None) -> bool:
        """Take up what an error says would help; False where that can't be put in place here."""
        value: object = remedy.value
        if remedy.key == "oauth.client_id":
            value = PLACEHOLDER
        elif remedy.key == "oauth.metadata":
            value = provider.metadata if provider is not None else None
        elif remedy.key == "authorization.allow_private":
            value = [remedy.value]
        if value is None or any(change.key == self._path(remedy.key) for change in self.changes):
            return False
        if value == PLACEHOLDER:
            self._put_off_client_auth()
        return self._change(remedy.key, value, _WHY[remedy.key], applied=remedy.key not in _TO_BE_DECIDED)

    def apply_provider(self, provider: Provider, *, scopes_known: bool) -> None:
        """Take up what a provider is known to need for the grant in use, where nothing is configured for it."""
        elsewhere = "token_params" if self._grant is GrantType.AUTHORIZATION_CODE else "authorization_params"
        moot = {elsewhere, "scopes"} if scopes_known else {elsewhere}
        for key, value in provider.oauth.items():
            if key not in moot:
                self._change(f"oauth.{key}", value, f"{provider.name} needs it", applied=True)
        for key, value in provider.asks.items():
            if key not in moot:
                self._change(f"oauth.{key}", value, f"{provider.name} may need it, with your value", applied=False)

    def settings(self) -> ServerSettings:
        """Return the server as the proposal configures it. Raises ConfigurationError where that is not valid."""
        context = Context(os.environ, self._folder)
        servers = read_servers(Section({self._name: _as_written(self._server)}, "servers", context), self._timeout)
        if context.faults:
            raise ConfigurationError(context.faults)
        return servers[self._name]

    def as_yaml(self, redirect_uri: str) -> str:
        """Return the configuration as a file, with a reason beside every change. Secrets stay where they are."""
        why = {change.key: change.why for change in self.changes if change.applied}
        if self._shown_url() != self._server["url"]:
            why[f"servers.{self._name}.url"] = "the values of its query are not repeated here: put them in"
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
            present = oauth.get(name)
            if isinstance(value, Mapping) and (present is None or isinstance(present, Mapping)):
                # What the operator has set stays.
                merged = {**value, **(present or {})}
                if merged == present:
                    return False
                value = merged
            elif name in oauth and key not in _WHY:
                return False
            oauth[name] = value
        elif self._is_set(key):
            return False
        self.changes.append(Change(key=self._path(key), value=value, why=why, applied=applied))
        return applied

    def _put_off_client_auth(self) -> None:
        """Beside a client without a secret, a method that needs one would make the file invalid."""
        oauth = self._server.get("oauth")
        if isinstance(oauth, dict) and oauth.get("client_auth") in _BY_SECRET and "client_secret" not in oauth:
            why, method = "only with the secret of that client", oauth.pop("client_auth")
            self.changes.append(Change(key=self._path("oauth.client_auth"), value=method, why=why, applied=False))

    def _is_set(self, key: str) -> bool:
        """Whether the operator has decided already on a key that is only proposed by a provider."""
        oauth = self._server.get("oauth")
        name = key.removeprefix("oauth.")
        return key not in _TO_BE_DECIDED and isinstance(oauth, Mapping) and name in oauth

    def _path(self, key: str) -> str:
        return f"servers.{self._name}.{key}" if key.startswith("oauth.") else key


def _as_written(value: object) -> object:
    """As the reader of the file takes it: every scalar is text."""
    if isinstance(value, Mapping):
        return {str(key): _as_written(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_written(item) for item in value]
    return value


def _without_secrets(value: object, name: str) -> object:
    """A secret that stands in the file itself is not repeated on a terminal."""
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
    """Text as YAML that means the same again, in block and in flow."""
    if text in _PLAIN or _URL.fullmatch(text):
        return text
    # In flow style the text is quoted where a comma or bracket would end it.
    dumped: str = yaml.safe_dump([text], default_flow_style=True, width=100_000, allow_unicode=True)
    return dumped.strip()[1:-1]
