"""Discovery: the URLs of metadata, and the rules for the documents."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.client.auth.utils import (
    build_oauth_authorization_server_metadata_discovery_urls,
    build_protected_resource_metadata_discovery_urls,
)
from mcp.shared.auth import OAuthMetadata, ProtectedResourceMetadata
from mcp.shared.auth_utils import check_resource_allowed
from pydantic import ValidationError

from mcp_auth_proxy.errors import AuthorizationError, DocumentRefused
from mcp_auth_proxy.oauth import discovery
from mcp_auth_proxy.oauth.discovery import ResourceMetadata, ServerMetadata

SERVER = "https://mcp.example.com/team/mcp"
ISSUER = "https://as.example.com"


def resource(server_url: str = SERVER, **members: Any) -> ResourceMetadata:
    document = {"resource": server_url, "authorization_servers": [ISSUER], **members}
    return discovery.read_resource_metadata(json.dumps(document).encode(), url="https://x/prm", server_url=server_url)


def metadata(issuer: str = ISSUER, *, loopback: bool = False, legacy: bool = False, **members: Any) -> ServerMetadata:
    document = {
        "issuer": issuer,
        "authorization_endpoint": f"{ISSUER}/authorize",
        "token_endpoint": f"{ISSUER}/token",
        "code_challenge_methods_supported": ["S256"],
        **members,
    }
    return discovery.read_server_metadata(
        json.dumps(document).encode(), url="https://x/asm", issuer=issuer, policy_http_loopback=loopback, legacy=legacy
    )


# Where to ask


def test_resource_metadata_is_asked_for_at_header_then_path_then_root() -> None:
    base = "https://mcp.example.com/.well-known/oauth-protected-resource"

    assert discovery.resource_metadata_urls(SERVER, "https://h/m") == ["https://h/m", f"{base}/team/mcp", base]
    assert discovery.resource_metadata_urls("https://mcp.example.com/", None) == [base]
    assert discovery.resource_metadata_urls(f"{SERVER}?t=1", base) == [base, f"{base}/team/mcp?t=1", f"{base}/team/mcp"]


@pytest.mark.parametrize("server_url", [SERVER, "https://h", "https://h/", "http://127.0.0.1:3000/mcp", "https://h/a/"])
@pytest.mark.parametrize("header", [None, "https://h/prm"])
def test_resource_metadata_urls_are_those_of_the_sdk(server_url: str, header: str | None) -> None:
    assert discovery.resource_metadata_urls(server_url, header) == build_protected_resource_metadata_discovery_urls(
        header, server_url
    )


def test_server_metadata_is_asked_for_in_the_order_of_the_spec() -> None:
    assert discovery.authorization_server_metadata_urls("https://as.example.com/realms/a") == [
        "https://as.example.com/.well-known/oauth-authorization-server/realms/a",
        "https://as.example.com/.well-known/openid-configuration/realms/a",
        "https://as.example.com/realms/a/.well-known/openid-configuration",
    ]


@pytest.mark.parametrize("issuer", [ISSUER, f"{ISSUER}/", f"{ISSUER}/a", f"{ISSUER}/a/b/", "http://localhost:9000/x"])
def test_server_metadata_urls_are_those_of_the_sdk(issuer: str) -> None:
    assert discovery.authorization_server_metadata_urls(
        issuer
    ) == build_oauth_authorization_server_metadata_discovery_urls(issuer, SERVER)


@pytest.mark.parametrize(
    ("server_url", "expected"),
    [
        ("HTTPS://MCP.Example.com:8443/Team/MCP?x=Y#f", "https://mcp.example.com:8443/Team/MCP?x=Y"),
        ("https://h/", "https://h"),
        ("https://h/mcp/", "https://h/mcp/"),
    ],
)
def test_the_canonical_resource_keeps_path_and_query(server_url: str, expected: str) -> None:
    assert discovery.canonical_resource(server_url) == expected


# Resource metadata


def test_resource_metadata_is_read_as_it_is_spelled() -> None:
    found = resource(resource="https://MCP.example.com:443/team", scopes_supported=["a", "b"])

    assert found == ResourceMetadata(
        resource="https://MCP.example.com:443/team", authorization_servers=(ISSUER,), scopes_supported=("a", "b")
    )


RESOURCES = [
    SERVER,
    f"{SERVER}/",
    "https://mcp.example.com/team",
    "https://mcp.example.com/team/",
    "https://mcp.example.com/",
    "https://mcp.example.com",
    "https://mcp.example.com/tea",
    "https://mcp.example.com/team/mcp/more",
    "https://mcp.example.com/other",
    "https://evil.example.com/team/mcp",
    "https://mcp.example.com.evil/team/mcp",
    "https://mcp.example.com:8443/team/mcp",
    "http://mcp.example.com/team/mcp",
]


@pytest.mark.parametrize("spelled", RESOURCES)
def test_a_resource_is_accepted_if_the_sdk_accepts_it(spelled: str) -> None:  # T7
    if check_resource_allowed(SERVER, spelled):
        assert resource(resource=spelled).resource == spelled
    else:
        with pytest.raises(DocumentRefused, match=r"RFC 9728 §3\.3"):
            resource(resource=spelled)


@pytest.mark.parametrize(
    "spelled",
    [f"{SERVER}?x", f"{SERVER}#f", "https://u@mcp.example.com/team", "urn:x", "https://mcp.example.com\\@evil/"],
)
def test_a_resource_with_query_fragment_or_userinfo_is_refused(spelled: str) -> None:  # T7
    with pytest.raises(DocumentRefused, match=r"RFC 9728 §3\.3"):
        resource(resource=spelled)


@pytest.mark.parametrize(
    "members",
    [
        {"authorization_servers": []},
        {"authorization_servers": None},
        {"authorization_servers": ISSUER},
        {"authorization_servers": [1]},
        {"authorization_servers": ["http://as.example.com"]},
        {"authorization_servers": ["http://127.0.0.1:9000"]},
        {"authorization_servers": ["javascript:alert(1)"]},
        {"authorization_servers": ["https://u:p@as.example.com"]},
        {"authorization_servers": ["https://as.example.com?x=y"]},
        {"authorization_servers": ["https://as.example.com#f"]},
        {"scopes_supported": "a b"},
        {"resource": None},
        {"resource": 1},
    ],
)
def test_resource_metadata_that_breaks_a_rule_is_refused(members: dict[str, Any]) -> None:
    with pytest.raises(DocumentRefused) as refused:
        resource(**members)

    assert "protected resource metadata" in str(refused.value) and "https://x/prm" in str(refused.value)
    assert refused.value.clause.startswith("RFC ")


def test_issuers_that_can_be_used_remain() -> None:
    assert resource(authorization_servers=["http://as", ISSUER, f"{ISSUER}/a"]).authorization_servers == (
        ISSUER,
        f"{ISSUER}/a",
    )


def test_an_http_issuer_on_loopback_is_accepted_for_a_server_on_loopback() -> None:
    issuer = "http://127.0.0.1:9000"

    assert resource("http://localhost:3000/mcp", authorization_servers=[issuer]).authorization_servers == (issuer,)


# Server metadata


def test_server_metadata_is_read() -> None:
    found = metadata(
        registration_endpoint=f"{ISSUER}/register",
        revocation_endpoint=None,
        scopes_supported=["a"],
        token_endpoint_auth_methods_supported=["none"],
        client_id_metadata_document_supported=True,
        authorization_response_iss_parameter_supported=True,
        jwks_uri="javascript:not-read",
    )

    assert found == ServerMetadata(
        issuer=ISSUER,
        authorization_endpoint=f"{ISSUER}/authorize",
        token_endpoint=f"{ISSUER}/token",
        registration_endpoint=f"{ISSUER}/register",
        scopes_supported=("a",),
        code_challenge_methods_supported=("S256",),
        token_endpoint_auth_methods_supported=("none",),
        client_id_metadata_document_supported=True,
        iss_parameter_supported=True,
    )


@pytest.mark.parametrize(
    "stated", [f"{ISSUER}/", "https://AS.example.com", f"{ISSUER}:443", f"{ISSUER}/a", "HTTPS://as.example.com", ""]
)
def test_an_issuer_that_is_another_string_is_refused(stated: str) -> None:  # T8
    body = json.dumps({"issuer": stated, "token_endpoint": f"{ISSUER}/token"}).encode()

    with pytest.raises(DocumentRefused) as refused:
        discovery.read_server_metadata(body, url="https://x/asm", issuer=ISSUER, policy_http_loopback=False)
    assert refused.value.clause in ("RFC 8414 §3.3", "RFC 8414 §2")


@pytest.mark.parametrize(
    ("stated", "accepted"),
    [
        (ISSUER, True),
        (f"{ISSUER}/", True),
        (f"{ISSUER}/a", True),
        (f"{ISSUER}/a?b", False),
        (f"{ISSUER}/#a", False),
        (f"{ISSUER}.evil.example/a", False),
        (f"{ISSUER}@evil.example/a", False),
        ("https://other.example", False),
        (f"{ISSUER}:443", False),
        (f"{ISSUER}:443/a", False),
        (f"{ISSUER.upper()}/a", False),
    ],
)
def test_without_resource_metadata_an_issuer_may_be_a_path_of_the_origin(stated: str, accepted: bool) -> None:  # T8
    body = json.dumps({"issuer": stated, "token_endpoint": f"{ISSUER}/token"}).encode()

    def read() -> ServerMetadata:
        return discovery.read_server_metadata(
            body, url="https://x/asm", issuer=ISSUER, policy_http_loopback=False, legacy=True
        )

    if accepted:
        assert read().issuer == stated
    else:
        with pytest.raises(DocumentRefused, match=r"oauth\.issuer \(RFC 8414 §3\.3\)"):
            read()


ENDPOINTS = ["authorization_endpoint", "token_endpoint", "registration_endpoint", "revocation_endpoint"]


@pytest.mark.parametrize("member", ENDPOINTS)
@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "file:///etc/passwd",
        "data:text/html,x",
        "http://as.example.com/x",
        "http://127.0.0.1/x",
        "https://user:pw@as.example.com/x",
        "https://as.example.com/x#f",
        "https://as.example.com/x\ny",
        "https://as.example.com/a b",
        "https://as.example.com/\u202e",
        "//as.example.com/x",
        "/x",
        ["https://as.example.com/x"],
    ],
)
def test_an_endpoint_that_can_not_be_used_refuses_the_document(member: str, url: object) -> None:  # T5
    with pytest.raises(DocumentRefused, match=member):
        metadata(**dict[str, Any]({member: url}))


def test_a_shell_in_an_endpoint_is_refused_or_inert() -> None:  # T6
    assert metadata(authorization_endpoint="https://as/$(calc.exe)").authorization_endpoint == "https://as/$(calc.exe)"
    with pytest.raises(DocumentRefused):
        metadata(authorization_endpoint="https://as/`calc`|x")


def test_http_endpoints_on_loopback_are_accepted_if_loopback_is_allowed() -> None:
    assert metadata("http://localhost:1", loopback=True, token_endpoint="http://localhost:1/token").token_endpoint


@pytest.mark.parametrize(
    "members",
    [
        {"token_endpoint": None},
        {"code_challenge_methods_supported": "S256"},
        {"scopes_supported": [None]},
        {"client_id_metadata_document_supported": "true"},
        {"authorization_response_iss_parameter_supported": 1},
    ],
)
def test_server_metadata_of_wrong_types_is_refused(members: dict[str, Any]) -> None:
    with pytest.raises(DocumentRefused, match="authorization server metadata at https://x/asm"):
        metadata(**members)


def test_the_sdk_reads_the_same_documents_the_same_way() -> None:
    corpus: list[dict[str, Any]] = [
        {},
        {"registration_endpoint": f"{ISSUER}/register", "scopes_supported": ["a", "b"]},
        {"grant_types_supported": ["authorization_code"], "revocation_endpoint": f"{ISSUER}/revoke?x=y"},
        {"token_endpoint_auth_methods_supported": ["none", "client_secret_post"], "unknown": {"a": [1]}},
        {"client_id_metadata_document_supported": True, "authorization_response_iss_parameter_supported": False},
    ]
    for members in corpus:
        ours = metadata(**members)
        theirs = OAuthMetadata.model_validate(
            {"issuer": ISSUER, "authorization_endpoint": f"{ISSUER}/authorize", "token_endpoint": f"{ISSUER}/token"}
            | {"code_challenge_methods_supported": ["S256"]}
            | members
        )
        for name in (*ENDPOINTS, "issuer"):
            assert getattr(ours, name) == (getattr(theirs, name) and str(getattr(theirs, name)))
        for name in ("scopes_supported", "grant_types_supported", "token_endpoint_auth_methods_supported"):
            assert list(getattr(ours, name) or ()) == (getattr(theirs, name) or [])
        assert ours.client_id_metadata_document_supported == bool(theirs.client_id_metadata_document_supported)


def test_documents_that_the_sdk_refuses_are_refused() -> None:
    corpus: list[dict[str, Any]] = [
        {"resource": "not a url"},
        {"authorization_servers": []},
        {"authorization_servers": [1]},
        {"scopes_supported": {"a": 1}},
    ]
    for members in corpus:
        with pytest.raises(ValidationError):
            ProtectedResourceMetadata.model_validate({"resource": SERVER, "authorization_servers": [ISSUER], **members})
        with pytest.raises(DocumentRefused):
            resource(**members)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([SERVER, ISSUER]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MEMBERS = st.sampled_from(["resource", "authorization_servers", "scopes_supported", "issuer", *ENDPOINTS])


@given(st.dictionaries(MEMBERS, JSON))
def test_arbitrary_members_raise_nothing_but_document_refused(members: dict[str, Any]) -> None:
    for read in (resource, metadata):
        with contextlib.suppress(DocumentRefused):
            read(**{name: value for name, value in members.items() if name != "issuer"})


# Without discovery


def test_configured_metadata_replaces_discovery() -> None:
    endpoints = {"authorization_endpoint": "https://h/a", "token_endpoint": "https://h:8443/t"}

    assert discovery.configured_server_metadata(endpoints, issuer=None).issuer == "https://h:8443"
    assert discovery.configured_server_metadata(endpoints, issuer="https://i").issuer == "https://i"
    assert discovery.configured_server_metadata({**endpoints, "issuer": "https://j"}, issuer=None).issuer == "https://j"
    with pytest.raises(DocumentRefused):
        discovery.configured_server_metadata({**endpoints, "issuer": "https://j"}, issuer="https://i")
    with pytest.raises(DocumentRefused, match="token_endpoint"):
        discovery.configured_server_metadata({}, issuer=None)


def test_default_endpoints_are_at_the_servers_origin() -> None:
    found = discovery.legacy_server_metadata("https://mcp.example.com:8443/team/mcp")

    assert found == ServerMetadata(
        issuer="https://mcp.example.com:8443",
        authorization_endpoint="https://mcp.example.com:8443/authorize",
        token_endpoint="https://mcp.example.com:8443/token",
        registration_endpoint="https://mcp.example.com:8443/register",
        is_fallback=True,
    )
    assert discovery.legacy_server_metadata("http://127.0.0.1:1/mcp").token_endpoint == "http://127.0.0.1:1/token"
    with pytest.raises(DocumentRefused, match="http"):
        discovery.legacy_server_metadata("http://mcp.ns.svc/mcp")


@pytest.mark.parametrize("methods", [None, [], ["plain"]])
def test_a_server_without_s256_is_refused_and_the_key_is_named(methods: list[str] | None) -> None:  # T10
    found = metadata(code_challenge_methods_supported=methods)

    with pytest.raises(AuthorizationError, match=r"servers\.linear\.oauth\.allow_missing_pkce"):
        discovery.require_pkce(found, allow_missing=False, server="linear")
    discovery.require_pkce(found, allow_missing=True, server="linear")
    discovery.require_pkce(metadata(), allow_missing=False, server="linear")
    discovery.require_pkce(discovery.legacy_server_metadata(SERVER), allow_missing=False, server="linear")
