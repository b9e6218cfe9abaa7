"""Finding and reading the configuration, from real files."""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import platformdirs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.config.load import limit_warnings, load, single
from mcp_auth_proxy.config.location import find
from mcp_auth_proxy.config.servers import RESERVED
from mcp_auth_proxy.config.settings import Address, KeySource, LimitSettings, Settings
from mcp_auth_proxy.errors import ConfigurationError
from mcp_auth_proxy.models import ClientAuth, GrantType

MINIMAL = "servers: {a: {url: 'https://a.example/mcp'}}\n"


def settings(folder: Path, text: str, environ: dict[str, str] | None = None, listen: str | None = None) -> Settings:
    path = folder / "config.yaml"
    path.write_text(text)
    return load(path, environ=environ or {}, listen=listen)


def errors_of(folder: Path, text: str, environ: dict[str, str] | None = None, listen: str | None = None) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        settings(folder, text, environ, listen)
    assert caught.value.source == str(folder / "config.yaml")
    return [str(error) for error in caught.value.errors]


def oauth(text: str) -> str:
    return f"servers: {{a: {{url: 'https://a.example/mcp', oauth: {{{text}}}}}}}\n"


def test_a_minimal_file_has_all_defaults(tmp_path: Path) -> None:
    found = settings(tmp_path, MINIMAL)
    assert found.listen == Address("127.0.0.1", 8787)
    assert found.public_url is None
    assert found.store.path == tmp_path / "mcp-auth-proxy.db"
    assert found.store.keys == (KeySource(kind="file", name=str(tmp_path / "mcp-auth-proxy.key")),)
    assert found.store.default_key
    assert (found.authorization.wait, found.limits.body) == (45.0, 16 * 2**20)
    assert found.servers["a"].upstream_timeout == 300.0
    assert found.servers["a"].oauth.grant is GrantType.AUTHORIZATION_CODE
    assert found.source == tmp_path / "config.yaml"


def test_every_key_is_read(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("x")
    (tmp_path / "secret").write_text("from-file\n")
    found = settings(
        tmp_path,
        """
        listen: "[::1]:9000"
        public_url: https://proxy.example.com/
        upstream_timeout: 1m
        store: {url: "sqlite:////var/lib/x/s.db", keys: [env:NEW, env:OLD]}
        authorization: {wait: 0, open_browser: never, cold_start: off, allow_private: [10.0.0.0/8, AS.internal]}
        limits:
          {body: 1MB, memory: 64MiB, held: 9, upstream_connections: 7, connections: 50, connections_per_address: 5,
           sse_ping: 1m, refresh_rate: 25}
        inbound: {allowed_hosts: ["proxy.internal:8787"], allowed_origins: ["HTTP://Localhost:80"],
          trusted_proxies: [10.0.0.1, "::ffff:10.1.0.0/112"]}
        outbound: {ca_bundle: ca.pem, trust_proxy: true}
        servers:
          a:
            url: http://mcp.internal/mcp?tenant=1
            allow_http: yes
            upstream_timeout: 5s
            oauth:
              grant: client_credentials
              client_id: 0123
              client_secret: file:secret
              client_auth: client_secret_post
              scopes: [read, write, read]
              issuer: https://AS.example.com/
              resource: urn:example:a
              authorization_params: {access_type: offline, n: 1}
              metadata:
                token_endpoint: https://as.example.com/token
                code_challenge_methods_supported: [S256]
                client_id_metadata_document_supported: true
              client_metadata_url: https://agents.example.com/c.json
              dpop: off
              allow_missing_pkce: true
          b: {url: "https://b.example"}
        """,
        {"NEW": "k1", "OLD": "k2"},
    )
    a = found.servers["a"]
    assert (found.listen, found.public_url) == (Address("::1", 9000), "https://proxy.example.com")
    assert (found.store.path, found.store.default_key) == (Path("/var/lib/x/s.db"), False)
    assert [str(key) for key in found.store.keys] == ["env:NEW", "env:OLD"]
    assert found.authorization.allow_private == ("10.0.0.0/8", "as.internal")
    assert (found.authorization.wait, found.authorization.open_browser) == (0.0, "never")
    assert found.authorization.cold_start is False
    assert found.limits == LimitSettings(
        body=10**6,
        memory=64 * 2**20,
        held=9,
        upstream_connections=7,
        connections=50,
        connections_per_address=5,
        sse_ping=60.0,
        refresh_rate=25.0,
    )
    assert [str(network) for network in found.inbound.trusted_proxies] == ["10.0.0.1/32", "10.1.0.0/16"]
    assert found.inbound.allowed_hosts == ("proxy.internal:8787",)
    assert found.inbound.allowed_origins == ("http://localhost",)
    assert found.outbound.ca_bundle == tmp_path / "ca.pem"
    assert found.outbound.trust_proxy
    assert (a.url, a.upstream_timeout, found.servers["b"].upstream_timeout) == (
        "http://mcp.internal/mcp?tenant=1",
        5,
        60,
    )
    assert (a.oauth.grant, a.oauth.client_id) == (GrantType.CLIENT_CREDENTIALS, "0123")
    assert a.oauth.client_secret is not None
    assert a.oauth.client_secret.value == "from-file"
    assert (a.oauth.client_auth, a.oauth.scopes) == (ClientAuth.POST, ("read", "write"))
    assert (a.oauth.issuer, a.oauth.resource) == ("https://AS.example.com/", "urn:example:a")
    assert a.oauth.authorization_params == {"access_type": "offline", "n": "1"}
    assert a.oauth.metadata == {
        "token_endpoint": "https://as.example.com/token",
        "code_challenge_methods_supported": ["S256"],
        "client_id_metadata_document_supported": True,
    }
    assert a.oauth.allow_missing_pkce


def test_an_error_has_the_line_of_its_key_or_of_the_section_that_lacks_it(tmp_path: Path) -> None:
    text = "nonsense: 1\nservers:\n  a:\n    url: ftp://a.example\n  b:\n    oauth: {}\nlisten: a:1\nlisten: b:1\n"
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigurationError) as caught:
        settings(tmp_path, text)
    assert [line.rpartition(": ")[0] for line in caught.value.lines()] == [
        f"{path}:1: nonsense",
        f"{path}:4: servers.a.url",
        f"{path}:5: servers.b.url: is needed",
        f"{path}:8: listen",
    ]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("servers: [a]", "servers"),
        ("servers: {a: https://a.example/mcp}", "servers.a"),
        ("servers: {a: {url: [https://a.example/mcp]}}", "servers.a.url"),
        ("servers: {a: {url: ''}}", "servers.a.url"),
        ("servers: {a: {url: http://a.example/mcp, allow_http: maybe}}", "servers.a.allow_http"),
        (oauth("grant: jwt_bearr, assertion: 'file:a', issuer: 'https://i.example'"), "servers.a.oauth.grant"),
        (oauth("grant: client_credentials, client_secret: s"), "servers.a.oauth.client_id"),
        (oauth("grant: client_credentials, client_id: c, client_auth: nothing"), "servers.a.oauth.client_auth"),
        (
            oauth("grant: client_credentials, client_auth: private_key_jwt, signing_alg: ES256, client_id: c"),
            "servers.a.oauth.private_key",
        ),
        (oauth("grant: id_jag, client_id: c, issuer: 'https://i.example', idp: [x]"), "servers.a.oauth.idp"),
        (oauth("metadata: [x]"), "servers.a.oauth.metadata"),
        (oauth("client_id: c, client_auth: private_key_jwt, signing_alg: ES256"), "servers.a.oauth.private_key"),
        (MINIMAL + "limits: [1]", "limits"),
    ],
)
def test_one_mistake_is_one_error(tmp_path: Path, text: str, path: str) -> None:
    found = errors_of(tmp_path, text)
    assert [error.partition(": ")[0] for error in found] == [path]


def test_all_errors_come_at_once_in_file_order(tmp_path: Path) -> None:
    found = errors_of(
        tmp_path,
        """
listen: 8787
lissten: x
store: {url: "postgresql://db/x"}
servers:
  beta: {url: "ftp://b.example", typo: 1}
  mcp: {url: "https://m.example"}
  Bad_Name: {}
authorization: {wait: soon, cold_start: maybe, open_browser: sometimes, allow_private: 10.0.0.1}
listen: nowhere
limits: [1]
""",
    )
    assert [error.partition(": ")[0] for error in found] == [
        "listen", "lissten", "store.keys",
        "servers.beta.url", "servers.beta.typo", "servers.mcp", "servers.Bad_Name", "servers.Bad_Name.url",
        "authorization.wait", "authorization.open_browser", "authorization.cold_start", "authorization.allow_private",
        "listen",
        "limits",
    ]  # fmt: skip
    assert "did you mean listen?" in found[1]
    assert "must be given with PostgreSQL" in found[2]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://a.example/mcp", "allow_http: true"),
        ("http://10.0.0.1/mcp", "allow_http: true"),
        ("http://localhost.evil.example/mcp", "allow_http: true"),
        ("ws://a.example", "http:// or https://"),
        ("https://user:hunter2@a.example", "user name or password"),
        ("https://a.example/#x", "fragment"),
        ("a.example", "http:// or https://"),
        ("", "must not be empty"),
    ],
)
def test_a_server_url_is_refused_with_the_reason(tmp_path: Path, url: str, problem: str) -> None:
    (found,) = errors_of(tmp_path, f"servers: {{a: {{url: '{url}'}}}}")
    assert found.startswith("servers.a.url: ")
    assert problem in found
    assert "hunter2" not in found


@pytest.mark.parametrize("url", ["http://localhost:1/mcp", "http://127.0.0.1:1/mcp?x=y", "http://[::1]:1/"])
def test_http_to_loopback_needs_no_permission(tmp_path: Path, url: str) -> None:
    assert settings(tmp_path, f"servers: {{a: {{url: '{url}'}}}}").servers["a"].url == url


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "[a]", "just text", "servers:", "servers: {}", "listen: 127.0.0.1:1"]
)
def test_a_file_without_servers_is_refused(tmp_path: Path, text: str) -> None:
    assert errors_of(tmp_path, text)


def test_a_syntax_error_is_reported_with_line_and_column(tmp_path: Path) -> None:
    (found,) = errors_of(tmp_path, "servers:\n  a: {url: x\n  b: y\n")
    assert "line 3" in found
    assert "column" in found


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_server_names_are_refused(tmp_path: Path, name: str) -> None:
    (found,) = errors_of(tmp_path, f"servers: {{{name}: {{url: 'https://a.example'}}}}")
    assert found.startswith(f"servers.{name}: ")


@given(st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True).filter(lambda name: name not in RESERVED))
def test_every_valid_server_name_is_accepted(name: str) -> None:
    with TemporaryDirectory() as folder:
        found = settings(Path(folder), f"servers: {{'{name}': {{url: 'https://a.example'}}}}")
    assert set(found.servers) == {name}


@pytest.mark.parametrize("name", ["-a", "A", "a_b", "a.b", "é", "a" * 64, "a b"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    assert errors_of(tmp_path, f"servers: {{'{name}': {{url: 'https://a.example'}}}}")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("grant: client_credentials", "client_id"),
        ("grant: client_credentials, client_id: a", "client_secret"),
        ("client_secret: a", "client_secret"),
        ("client_id: a, client_auth: client_secret_basic", "client_auth"),
        ("client_auth: secret", "client_auth"),
        ("grant: password", "grant"),
        ("issuer: 'https://as.example?x'", "issuer"),
        ("resource: 'https://a.example/#x'", "resource"),
        ("resource: relative", "resource"),
        ("scopes: read", "scopes"),
        ("scopes: ['read write']", "scopes[0]"),
        ("scopes: [[a]]", "scopes[0]"),
        ("client_metadata_url: 'http://a.example/c'", "client_metadata_url"),
        ("client_metadata_url: 'https://a.example/'", "client_metadata_url"),
        ("metadata: text", "metadata"),
        ("metadata: {}", "metadata.token_endpoint"),
        ("metadata: {authorization_endpoint: 'https://a.example', token_endpoint: [x]}", "metadata.token_endpoint"),
        ("metadata: {token_endpoint: 'https://a.example'}", "metadata.authorization_endpoint"),
        ("authorization_params: {state: x}", "authorization_params.state"),
        ("authorization_params: {code_challenge_method: plain}", "authorization_params.code_challenge_method"),
        ("authorization_params: {request_uri: x}", "authorization_params.request_uri"),
        ("authorization_params: {scope: x}", "authorization_params.scope"),
        ("authorization_params: {a: [x]}", "authorization_params.a"),
        ("allow_missing_pkce: perhaps", "allow_missing_pkce"),
        ("client_id: [a]", "client_id"),
        ("client_id: ''", "client_id"),
    ],
)
def test_an_oauth_error_names_its_key(tmp_path: Path, text: str, path: str) -> None:
    assert any(error.startswith(f"servers.a.oauth.{path}: ") for error in errors_of(tmp_path, oauth(text)))


def test_client_credentials_without_a_secret_need_client_auth_none(tmp_path: Path) -> None:
    found = settings(tmp_path, oauth("grant: client_credentials, client_id: a, client_auth: none"))
    assert found.servers["a"].oauth.client_auth is ClientAuth.NONE


@pytest.mark.parametrize(
    "secret", ["env:UNSET", "env:EMPTY", "file:missing", "file:empty", "file:.", "file:~nobody-x/y"]
)
def test_a_secret_that_cannot_be_read_is_an_error(tmp_path: Path, secret: str) -> None:
    (tmp_path / "empty").write_text("\n")
    (found,) = errors_of(tmp_path, oauth(f"client_id: a, client_secret: '{secret}'"), {"EMPTY": ""})
    assert found.startswith("servers.a.oauth.client_secret: ")


def test_secrets_are_shown_in_no_repr(tmp_path: Path) -> None:  # T45
    found = settings(tmp_path, oauth("client_id: a, client_secret: 'env:S'"), {"S": "canary-4711"})
    assert "canary-4711" not in repr(found)
    assert "canary-4711" not in str(found.servers["a"].oauth.client_secret)


@pytest.mark.parametrize(
    "url", ["mysql://x", "sqlite://x.db", "sqlite:///", "sqlite:///:memory:", "sqlite:////", "x.db", "sqlite:///a?b"]
)
def test_other_stores_are_refused(tmp_path: Path, url: str) -> None:
    (found,) = errors_of(tmp_path, MINIMAL + f"store: {{url: '{url}'}}")
    assert found.startswith("store.url: ")


TWO = """
servers:
  notes: {url: 'https://n.example/mcp', oauth: {client_id: n, client_secret: 'env:NOTES'}}
  other:
    url: https://o.example/mcp
    oauth:
      grant: id_jag
      issuer: https://as.example
      client_id: o
      private_key: file:missing.pem
      idp: {issuer: 'https://idp.example', client_id: o, client_secret: 'env:UNSET', id_token: 'env:UNSET'}
"""


def test_only_the_secrets_that_are_asked_for_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(TWO)
    environ = {"NOTES": "canary-4711"}
    found = load(path, environ=environ, secrets_of=("notes",)).servers
    assert found["notes"].oauth.client_secret is not None
    assert found["notes"].oauth.client_secret.value == "canary-4711"
    assert (found["other"].oauth.client_secret, found["other"].oauth.private_key) == (None, None)
    assert load(path, environ={}, secrets_of=()).servers["notes"].oauth.client_secret is None
    with pytest.raises(ConfigurationError) as caught:
        load(path, environ={}, secrets_of=("notes",))
    assert [error.path for error in caught.value.errors] == ["servers.notes.oauth.client_secret"]
    with pytest.raises(ConfigurationError) as caught:
        load(path, environ=environ)
    assert [error.path.rpartition(".")[2] for error in caught.value.errors] == [
        "private_key",
        "client_secret",
        "id_token",
    ]


def test_other_errors_are_reported_if_no_secret_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(oauth("client_secret: 'env:UNSET', nonsense: 1"))
    with pytest.raises(ConfigurationError) as caught:
        load(path, environ={}, secrets_of=())
    assert [error.path.rpartition(".")[2] for error in caught.value.errors] == ["client_secret", "nonsense"]


@pytest.mark.parametrize("key", ["env:UNSET", "file:other.key", "c2VjcmV0", "env:"])
def test_a_missing_store_key_is_an_error(tmp_path: Path, key: str) -> None:
    (found,) = errors_of(tmp_path, MINIMAL + f"store: {{keys: ['{key}']}}")
    assert found.startswith("store.keys[0]: ")


def test_no_store_key_at_all_is_an_error(tmp_path: Path) -> None:
    (found,) = errors_of(tmp_path, MINIMAL + "store: {keys: []}")
    assert found.startswith("store.keys: ")


def test_the_default_key_may_be_written_out(tmp_path: Path) -> None:
    found = settings(tmp_path, MINIMAL + "store: {url: 'sqlite:///x/my.db', keys: ['file:x/my.key']}")
    assert found.store.default_key


def test_the_listen_flag_wins_and_its_errors_are_reported(tmp_path: Path) -> None:
    assert settings(tmp_path, MINIMAL + "listen: 127.0.0.1:1", listen="0.0.0.0:2").listen == Address("0.0.0.0", 2)
    assert errors_of(tmp_path, MINIMAL, listen="nonsense")[0].startswith("--listen: ")


def test_a_missing_ca_bundle_is_an_error(tmp_path: Path) -> None:
    (found,) = errors_of(tmp_path, MINIMAL + "outbound: {ca_bundle: nowhere.pem}")
    assert str(tmp_path / "nowhere.pem") in found


def test_a_missing_file_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone\.yaml"):
        load(tmp_path / "gone.yaml", environ={})


def test_ten_thousand_servers_load_in_seconds(tmp_path: Path) -> None:
    entry = "  s{0}: {{url: 'https://s{0}.example/mcp', oauth: {{client_id: c{0}, scopes: [a]}}}}\n"
    text = "servers:\n" + "".join(entry.format(number) for number in range(10_000))
    before = time.process_time()
    assert len(settings(tmp_path, text).servers) == 10_000
    assert time.process_time() - before < 20


def test_find_looks_in_the_documented_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = tmp_path / "user"
    monkeypatch.setattr(platformdirs, "user_config_path", lambda *_, **__: user)
    monkeypatch.chdir(tmp_path)
    assert find(None, {}) is None
    user.mkdir()
    (user / "mcp-auth-proxy.yaml").touch()
    assert find(None, {}) == user / "mcp-auth-proxy.yaml"
    (tmp_path / "mcp-auth-proxy.yaml").touch()
    assert find(None, {}) == tmp_path / "mcp-auth-proxy.yaml"
    (tmp_path / "env.yaml").touch()
    assert find(None, {"MCP_AUTH_PROXY_CONFIG": "env.yaml"}) == tmp_path / "env.yaml"
    (tmp_path / "flag.yaml").touch()
    assert find("flag.yaml", {"MCP_AUTH_PROXY_CONFIG": "env.yaml"}) == tmp_path / "flag.yaml"


def test_find_refuses_a_file_that_was_asked_for_and_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml.*--config"):
        find(str(tmp_path / "nowhere.yaml"), {})
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml.*MCP_AUTH_PROXY_CONFIG"):
        find(None, {"MCP_AUTH_PROXY_CONFIG": str(tmp_path / "nowhere.yaml")})


def test_a_single_server_needs_no_file() -> None:
    found = single("https://mcp.linear.app/mcp", environ={}, listen="127.0.0.1:0")
    assert list(found.servers) == ["linear"]
    assert found.listen.port == 0
    assert found.store.path == platformdirs.user_data_path("mcp-auth-proxy", appauthor=False) / "mcp-auth-proxy.db"
    assert found.store.default_key


@pytest.mark.parametrize("url", ["http://a.example/mcp", "linear", "", "https://u:p@a.example"])
def test_a_single_url_is_held_to_the_same_rules(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        single(url, environ={})
    assert [error.path for error in caught.value.errors] == ["URL"]


@pytest.mark.parametrize(("ping", "warned"), [("50ms", True), ("1s", False), ("0", False)])
def test_a_very_short_ping_is_a_warning(tmp_path: Path, ping: str, warned: bool) -> None:
    path = tmp_path / "mcp-auth-proxy.yaml"
    path.write_text(f"limits: {{sse_ping: {ping}}}\nservers: {{a: {{url: https://x.example/mcp}}}}")
    found = limit_warnings(load(path, environ={}).limits)
    assert [line.startswith("limits.sse_ping: 0.05 s") for line in found] == [True] * warned


@pytest.mark.parametrize(
    ("rate", "found"), [("1", 1.0), ("1000", 1000.0), ("0.5", 0.5), ("0.01", 0.01), ("1.0", 1.0), ("2", 2.0)]
)
def test_a_rate_of_refreshes_is_a_whole_number_or_a_fraction_of_one(tmp_path: Path, rate: str, found: float) -> None:
    text = f"limits: {{refresh_rate: {rate}}}\nservers: {{a: {{url: https://x.example/mcp}}}}"
    assert settings(tmp_path, text).limits.refresh_rate == found


@pytest.mark.parametrize("rate", ["0", "-1", "0.001", "1001", "2.5", "10/s", "many", "nan", "1e2", "true"])
def test_another_rate_of_refreshes_is_refused(tmp_path: Path, rate: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"limits: {{refresh_rate: {rate}}}\nservers: {{a: {{url: https://x.example/mcp}}}}")
    with pytest.raises(ConfigurationError, match=r"limits\.refresh_rate"):
        load(path)


def test_a_store_key_may_come_from_a_command_or_a_keyring(tmp_path: Path) -> None:
    written = "['exec:vault read -field=key \"my key\"', 'keyring:org/proxy/key', 'env:OLD']"
    keys = settings(tmp_path, MINIMAL + f"store: {{keys: {written}}}", environ={"OLD": "x"}).store.keys
    assert [(key.kind, key.name) for key in keys] == [
        ("exec", 'vault read -field=key "my key"'),
        ("keyring", "org/proxy/key"),
        ("env", "OLD"),
    ]
    assert [key.written for key in keys] == ['exec:vault read -field=key "my key"', "keyring:org/proxy/key", "env:OLD"]
    # What follows the program may be secret.
    assert str(keys[0]) == "exec:vault …"


def test_a_key_file_is_as_written_and_is_watched(tmp_path: Path) -> None:
    (tmp_path / "my.key").write_text("x")
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL + "store: {keys: ['file:my.key']}")
    watched: set[Path] = set()
    (key,) = load(path, environ={}, secret_files=watched).store.keys
    assert (key.name, key.written) == (str(tmp_path / "my.key"), "file:my.key")
    assert watched == {tmp_path / "my.key"}


@pytest.mark.parametrize(
    "key", ["exec:", "exec:  ", 'exec:"', "exec:''", "keyring:", "keyring:a", "keyring:/a", "keyring:a/"]
)
def test_a_command_without_a_program_and_a_keyring_without_a_name_are_errors(tmp_path: Path, key: str) -> None:
    (found,) = errors_of(tmp_path, MINIMAL + f"store: {{keys: [{json.dumps(key)}]}}")
    assert found.startswith(f"store.keys[0]: must be {key.partition(':')[0]}:")
