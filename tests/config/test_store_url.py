"""``store.url``: files, databases of PostgreSQL, and where the text comes from."""

import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.reader import Context
from mcp_auth_proxy.config.settings import PostgresqlUrl, StoreSettings
from mcp_auth_proxy.config.store_url import read_store_url
from mcp_auth_proxy.errors import ConfigurationError

CANARY = "cAnArY-4711"
KEY = {"KEY": "x" * 43}


def store(folder: Path, url: str, environ: dict[str, str] | None = None) -> StoreSettings:
    path = folder / "config.yaml"
    path.write_text(f"store: {{url: '{url}', keys: [env:KEY]}}\nservers: {{a: {{url: 'https://a.example/mcp'}}}}\n")
    return load(path, environ={**KEY, "XDG_RUNTIME_DIR": str(folder), **(environ or {})}).store


def error(folder: Path, url: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        store(folder, url, environ)
    (found,) = caught.value.errors
    return str(found)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://", "postgresql://"),
        ("postgres://db.example", "postgresql://db.example"),
        (f"postgresql://proxy:{CANARY}@db.example:5433/proxy?sslmode=require", "postgresql://db.example:5433/proxy"),
        (f"postgresql://proxy:{CANARY}%40x@[::1]/proxy", "postgresql://[::1]/proxy"),
        ("postgresql://a,b:5433/proxy?target_session_attrs=read-write", "postgresql://a,b:5433/proxy"),
        (f"postgresql:///proxy?host=/run/postgresql&password={CANARY}", "postgresql:///proxy"),
    ],
)
def test_a_database_is_shown_without_its_user_and_password(tmp_path: Path, url: str, shown: str) -> None:
    found = store(tmp_path, url)
    assert found.postgresql is not None
    assert found.postgresql.text == url
    assert found.shown == str(found.postgresql) == shown
    assert CANARY not in repr(found)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://proxy:{CANARY}/x@db.example/proxy",
        f"postgresql://proxy:a@{CANARY}@db.example/proxy",
        f"postgresql://proxy:a?{CANARY}@db.example/proxy",
        f"postgresql://proxy:a%{CANARY}@db.example/proxy",
        f"postgresql://db.example/proxy?sslmod={CANARY}",
        f"postgresql://db.example/ {CANARY}",
        f"postgresql://db.example/proxy#{CANARY}",
        f"mysql://proxy:{CANARY}@db.example/proxy",
        f"{CANARY}",
    ],
)
@pytest.mark.parametrize("source", ["", "env:URL", "file:url"])
def test_what_can_not_be_read_is_named_without_its_text(tmp_path: Path, url: str, source: str) -> None:
    (tmp_path / "url").write_text(url)
    found = error(tmp_path, source or url, {"URL": url})
    assert found.startswith("store.url: ")
    assert CANARY not in found


def test_an_unknown_parameter_is_named(tmp_path: Path) -> None:
    assert "'sslmod'" in error(tmp_path, "postgresql://db.example/proxy?sslmod=require")


@pytest.mark.parametrize("source", ["env:URL", "file:url"])
def test_variables_and_files_may_have_any_url(tmp_path: Path, source: str) -> None:
    for url in ("postgresql://db.example/proxy", "sqlite:///my.db"):
        (tmp_path / "url").write_text(f"{url}\n")
        direct = store(tmp_path, url)
        assert store(tmp_path, source, {"URL": url}) == direct
    assert direct.path == tmp_path / "my.db"


def test_a_missing_variable_or_file_is_named(tmp_path: Path) -> None:
    assert error(tmp_path, "env:URL") == "store.url: the environment variable 'URL' is not set"
    assert "can't be read" in error(tmp_path, "file:nothing")


def test_keys_must_be_given_with_a_database(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("store: {url: 'postgresql://db.example'}\nservers: {a: {url: 'https://a.example/mcp'}}\n")
    with pytest.raises(ConfigurationError) as caught:
        load(path, environ={})
    (found,) = caught.value.errors
    assert found.path == "store.keys"
    assert "openssl rand" in found.problem


def test_local_processes_share_a_name_for_each_database(tmp_path: Path) -> None:
    first = store(tmp_path, "postgresql://proxy:one@db.example/proxy")
    assert store(tmp_path, "postgresql://proxy:two@db.example/proxy").path == first.path
    assert store(tmp_path, "postgresql://proxy:one@db.example/other").path != first.path
    assert store(tmp_path, "postgresql://proxy:one@db.example/proxy", {"PGPORT": "1"}).path != first.path
    assert first.path.parent == tmp_path / "mcp-auth-proxy"
    assert not first.path.parent.exists()


@given(user=st.text(), password=st.text(), tail=st.text())
@example(user="u", password="p@ss/word?", tail="/db")
def test_nothing_between_scheme_and_host_is_ever_shown(user: str, password: str, tail: str) -> None:  # T91
    secret = f"{CANARY}{password}{CANARY}"
    try:
        found = read_store_url(f"postgresql://{user}:{secret}@h{tail}", Context({}, Path("/")))
    except ValueError as problem:
        assert CANARY not in str(problem)
    else:
        assert isinstance(found, PostgresqlUrl)
        assert CANARY not in repr(found) + str(found)


def test_a_driver_that_is_not_installed_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert "pip install 'mcp-auth-proxy[postgresql]'" in error(tmp_path, "postgresql://db.example")
