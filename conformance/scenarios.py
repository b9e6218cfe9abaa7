"""A scenario as the suite describes it, and the proxy's configuration for it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import yaml

SERVER = "conformance"
"""The name of the scenario's server in the proxy's configuration."""

OLDER = "2025-11-25"
"""The protocol revision if none is requested."""

CLIENT_METADATA_URL = "https://conformance-test.local/client-metadata.json"
"""The one Client ID Metadata Document that the suite accepts; nobody fetches it."""


_PINNED = frozenset({"jwt_bearer", "id_jag"})
"""The grants for which the configuration must name the issuer."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run of the suite, as its environment variables describe it."""

    name: str
    url: str
    version: str = OLDER
    context: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def current(cls, url: str) -> "Scenario":
        """Return the scenario in which the suite has started this process."""
        return cls(
            name=os.environ["MCP_CONFORMANCE_SCENARIO"],
            url=url,
            version=os.environ.get("MCP_CONFORMANCE_PROTOCOL_VERSION", OLDER),
            context=json.loads(os.environ.get("MCP_CONFORMANCE_CONTEXT", "{}")),
        )

    @property
    def mode(self) -> str:
        """The client's mode of negotiation, as clients of the revision use it."""
        return "auto" if self.version >= "2026-07-28" else "legacy"


# The configuration


def write_configuration(scenario: Scenario, folder: Path, wait: str) -> Path:
    """Write the proxy's configuration and the files that it names; return its path."""
    oauth, files = _oauth(scenario.name, scenario.context)
    if oauth.get("grant") in _PINNED:
        oauth.setdefault("issuer", named_issuer(scenario.url))
    server: dict[str, Any] = {"url": scenario.url}
    if oauth:
        server["oauth"] = oauth
    document = {
        "listen": "127.0.0.1:0",
        "store": {"url": "sqlite:///proxy.db"},
        # With cold start, a slow machine would be told from a fast one: what is tested here is OAuth.
        "authorization": {"wait": wait, "open_browser": "never", "cold_start": False},
        "servers": {SERVER: server},
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    path = folder / "mcp-auth-proxy.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def named_issuer(url: str) -> str:
    """Return the issuer that the server's resource metadata names (RFC 9728 §3.1), as ``doctor`` shows it to a user."""
    parts = urlsplit(url)
    for path in dict.fromkeys((parts.path.rstrip("/"), "")):
        try:
            with urlopen(
                f"{parts.scheme}://{parts.netloc}/.well-known/oauth-protected-resource{path}", timeout=5
            ) as found:
                return str(json.load(found)["authorization_servers"][0])
        except HTTPError:
            continue
    raise RuntimeError(f"{url} has no resource metadata that names an issuer")


def _oauth(name: str, context: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the ``oauth`` section that a user would write who knows the context, and files by name."""
    files: dict[str, str] = {}
    oauth: dict[str, Any] = {key: context[key] for key in ("client_id", "client_secret", "issuer") if key in context}
    match name:
        case "auth/basic-cimd":
            oauth["client_metadata_url"] = CLIENT_METADATA_URL
        case "auth/client-credentials-basic":
            oauth |= {"grant": "client_credentials", "client_auth": "client_secret_basic"}
        case "auth/client-credentials-jwt":
            files["client.pem"] = context["private_key_pem"]
            oauth |= {
                "grant": "client_credentials",
                "client_auth": "private_key_jwt",
                "private_key": "file:client.pem",
                "signing_alg": context["signing_algorithm"],
            }
        case "auth/enterprise-managed-authorization" | "auth/cross-app-access-complete-flow":
            files["id-token.jwt"] = context["idp_id_token"]
            oauth |= {
                "grant": "id_jag",
                "idp": {
                    "issuer": context["idp_issuer"],
                    "token_endpoint": context["idp_token_endpoint"],
                    "client_id": context["idp_client_id"],
                    "id_token": "file:id-token.jwt",
                },
            }
        case "auth/wif-jwt-bearer":
            files["assertion.jwt"] = context["valid_jwt"]
            oauth |= {"grant": "jwt_bearer", "assertion": "file:assertion.jwt"}
        case "auth/dpop" | "auth/dpop-nonce":
            oauth["dpop"] = "required"
        case _:
            pass
    return oauth, files
