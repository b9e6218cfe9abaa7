"""Who may read and write the key file of a store."""

import os
from pathlib import Path

import pytest

from fakes.other_users import NOBODY, as_root
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.errors import StoreRejected
from mcp_auth_proxy.store.cipher import generate_key_file, key_errors, key_warnings, load_keys


def store(folder: Path, keys: str = "") -> StoreSettings:
    """The settings of a store whose default key file exists."""
    if not (folder / "proxy.key").exists():
        generate_key_file(folder / "proxy.key")
    config = folder / "c.yaml"
    config.write_text(f"store: {{url: 'sqlite:///proxy.db'{keys}}}\nservers: {{a: {{url: 'https://a.example/mcp'}}}}\n")
    return load(config).store


def test_a_default_key_file_of_its_user_alone_is_used(tmp_path: Path) -> None:
    settings = store(tmp_path)
    assert len(load_keys(settings)) == 1
    (tmp_path / "proxy.key").chmod(0o400)
    assert (key_errors(settings), key_warnings(settings)) == ([], [])


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602, 0o666, 0o610])
def test_a_default_key_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:  # T89
    settings = store(tmp_path)
    (tmp_path / "proxy.key").chmod(mode)
    with pytest.raises(StoreRejected, match=rf"mode {mode:04o}.*chmod 600 {tmp_path}/proxy\.key.*store\.keys"):
        load_keys(settings)
    (error,) = key_errors(settings)
    assert error.path == "store.keys"


def test_the_target_of_a_link_counts(tmp_path: Path) -> None:  # T89
    settings = store(tmp_path)
    (tmp_path / "proxy.key").rename(tmp_path / "elsewhere.key")
    (tmp_path / "proxy.key").symlink_to("elsewhere.key")
    assert len(load_keys(settings)) == 1
    (tmp_path / "elsewhere.key").chmod(0o644)
    with pytest.raises(StoreRejected, match="mode 0644"):
        load_keys(settings)


@as_root
def test_a_default_key_file_of_another_user_is_refused(tmp_path: Path) -> None:  # T89
    settings = store(tmp_path)
    os.chown(tmp_path / "proxy.key", NOBODY, -1)
    with pytest.raises(StoreRejected, match=f"belongs to another user .uid {NOBODY}"):
        load_keys(settings)


@pytest.mark.parametrize(
    ("mode", "warned"), [(0o600, False), (0o644, False), (0o440, False), (0o664, True), (0o646, True)]
)
@pytest.mark.parametrize("keys", [", keys: ['file:proxy.key']", ", keys: ['file:proxy.key', 'file:proxy.key']"])
def test_a_key_file_that_is_named_is_used_whatever_its_mode(  # T89
    tmp_path: Path, mode: int, warned: bool, keys: str
) -> None:
    settings = store(tmp_path, keys)
    (tmp_path / "proxy.key").chmod(mode)
    assert load_keys(settings)
    assert key_errors(settings) == []
    warnings = key_warnings(settings)
    assert bool(warnings) is warned
    assert not warned or f"chmod 600 {tmp_path}/proxy.key" in warnings[0]
