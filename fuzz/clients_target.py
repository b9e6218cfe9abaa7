"""The configuration files of MCP clients, which ``install`` edits."""

from mcp_auth_proxy.cli.install import undo
from mcp_auth_proxy.cli.install.jsonc import JsonEditor
from mcp_auth_proxy.cli.install.toml_text import TomlEditor
from mcp_auth_proxy.cli.install.undo import Editor, InvalidDocument

NAME = "a@b"
ENTRY = {"url": "http://127.0.0.1:8787/a@b/mcp"}

_EDITORS: tuple[Editor, ...] = (JsonEditor("mcpServers"), TomlEditor("mcp_servers"))


def clients(data: bytes) -> None:
    """Check that an entry is added and taken out again, and that nothing else of the file changes."""
    text = data.decode(errors="replace")
    for editor in _EDITORS:
        try:
            before = editor.entries(text)
            installed = undo.put(editor, text, NAME, ENTRY)
        except InvalidDocument as problem:
            assert str(problem), "an error that says nothing"
            continue
        after = editor.entries(installed)
        assert after.pop(NAME) == ENTRY, "another entry"
        before.pop(NAME, None)
        assert repr(after) == repr(before), "other entries"
        assert _rest(editor, installed) == _rest(editor, text), "something else"
        if NAME not in editor.entries(text):
            rest = iter(installed)
            assert all(character in rest for character in text), "not only insertions"
        assert undo.without(editor, installed, text, [NAME], lambda entry, name: False) == text, "not as before"


def _rest(editor: Editor, text: str) -> str:
    return repr({key: value for key, value in editor.content(text).items() if key != editor.container})
