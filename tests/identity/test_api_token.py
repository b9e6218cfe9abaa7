"""The key of the API in mode ``none``: in a file that is its user's alone."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from identity.setup import PEER, bearer, identifying
from mcp_auth_proxy.config.settings import Address, AdminSettings, InboundSettings, Settings
from mcp_auth_proxy.errors import CallerRefused
from mcp_auth_proxy.identity import api_token
from mcp_auth_proxy.identity.api_token import obtain_token, read_token, token_path
from mcp_auth_proxy.models import LOCAL, Role
from store.builders import NOW, store_settings


def test_the_file_is_made_once_and_is_its_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "api-token"
    assert read_token(path) is None
    token = obtain_token(path, now=NOW)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == f"{token}\n"
    assert (read_token(path), obtain_token(path, now=NOW)) == (token, token)
    assert [file.name for file in path.parent.iterdir()] == ["api-token"]


def test_processes_that_make_it_at_once_have_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "api-token"
    others: list[str] = []

    def overtaken(where: Path) -> str | None:
        """Find nothing, the first time; then another process makes the file."""
        if others:
            return read_token(where)
        others.append("")
        others[0] = obtain_token(where, now=NOW)
        return None

    monkeypatch.setattr(api_token, "read_token", overtaken)
    assert obtain_token(path, now=NOW) == others[0] == read_token(path)


@pytest.mark.parametrize(("mode", "text"), [(0o644, None), (0o620, None), (0o600, "short"), (0o600, "")])
def test_a_file_that_can_not_be_trusted_is_replaced(tmp_path: Path, mode: int, text: str | None) -> None:
    path = tmp_path / "api-token"
    before = obtain_token(path, now=NOW)
    if text is not None:
        path.write_text(text)
    os.chmod(path, mode)
    assert read_token(path) is None
    after = obtain_token(path, now=NOW)
    assert after != before
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_fifo_in_its_place_stops_nobody(tmp_path: Path) -> None:
    path = tmp_path / "api-token"
    os.mkfifo(path, 0o600)
    assert read_token(path) is None
    assert obtain_token(path, now=NOW) == read_token(path)


def test_the_file_is_beside_the_store_unless_it_is_named(tmp_path: Path) -> None:
    settings = Settings(listen=Address("127.0.0.1", 0), public_url=None, store=store_settings(tmp_path), servers={})
    assert token_path(settings) == tmp_path / "api-token"
    named = AdminSettings(token_file=tmp_path / "elsewhere")
    assert token_path(replace(settings, admin=named)) == tmp_path / "elsewhere"


async def test_its_key_is_that_of_local_at_the_api_alone(tmp_path: Path) -> None:
    token = obtain_token(tmp_path / "api-token", now=NOW)
    async with identifying(tmp_path, InboundSettings()) as setup:
        setup.callers.accept_token(token)
        caller = await setup.callers.identify_api(bearer(token), PEER)
        assert caller is not None
        assert (caller.principal.id, caller.principal.role, caller.credential) == (LOCAL, Role.ADMIN, "token")
        with pytest.raises(CallerRefused):
            await setup.callers.identify_api(bearer(token[:-1] + "?"), PEER)
        # T76
        assert all(token.encode() not in file.read_bytes() for file in tmp_path.glob("store.db*"))
    async with identifying(tmp_path, InboundSettings(modes=("api_key",))) as setup:
        setup.callers.accept_token(token)
        with pytest.raises(CallerRefused):
            await setup.callers.identify_api(bearer(token), PEER)
