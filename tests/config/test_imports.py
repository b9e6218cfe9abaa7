"""``store.import`` and its passphrase, as they are written and what is refused."""

from pathlib import Path

import pytest
import yaml

from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.settings import ImportSettings
from mcp_auth_proxy.errors import ConfigurationError

SECRETS = {"PASSPHRASE": "correct horse battery", "SHORT": "short", "EMPTY": ""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "logins").write_bytes(b"sealed")
    (tmp_path / "passphrase").write_text("correct horse battery\n")
    return tmp_path


def read(folder: Path, store: dict[str, object], *, secrets: bool = True) -> ImportSettings:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"store": store, "servers": {"a": {"url": "https://a.example/mcp"}}}))
    return load(path, environ=SECRETS, secrets_of=None if secrets else ()).store.imports


@pytest.mark.parametrize("source", ["env:PASSPHRASE", "file:passphrase"])
def test_files_are_relative_to_the_configuration(folder: Path, source: str) -> None:
    found = read(folder, {"import": ["file:logins"], "import_passphrase": source})
    assert found.files == (folder / "logins",)
    assert found.passphrase is not None
    assert found.passphrase.value == "correct horse battery"
    assert "horse" not in repr(found)


def test_nothing_is_imported_by_default(folder: Path) -> None:
    assert read(folder, {}) == ImportSettings()


def test_commands_that_need_no_secrets_need_no_files_either(folder: Path) -> None:
    found = read(folder, {"import": ["file:missing"], "import_passphrase": "env:MISSING"}, secrets=False)
    assert found.passphrase is None


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ({"import": ["file:missing"], "import_passphrase": "env:PASSPHRASE"}, "store.import[0]: the file"),
        ({"import": ["env:LOGINS"], "import_passphrase": "env:PASSPHRASE"}, "store.import[0]: must be file:PATH"),
        ({"import": "file:logins", "import_passphrase": "env:PASSPHRASE"}, "store.import: must be a list"),
        ({"import": ["file:logins"]}, "store.import_passphrase: is missing"),
        ({"import": ["file:logins"], "import_passphrase": "battery horse staple"}, "must be env:NAME or file:PATH"),
        ({"import": ["file:logins"], "import_passphrase": "env:SHORT"}, "store.import_passphrase: is too short"),
        ({"import": ["file:logins"], "import_passphrase": "env:EMPTY"}, "is empty"),
        ({"import": ["file:logins"], "import_passphrase": "env:UNSET"}, "is not set"),
    ],
)
def test_what_cant_be_imported_is_an_error_with_its_key(folder: Path, store: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(folder, store)
    (line,) = map(str, caught.value.errors)
    assert said in line and "horse" not in line
