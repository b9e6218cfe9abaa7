"""Entries are added to files of clients and taken out again as text: no other byte changes."""

import json
import tomllib
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.cli.install import undo
from mcp_auth_proxy.cli.install.jsonc import MAX_DEPTH, JsonEditor
from mcp_auth_proxy.cli.install.toml_text import TomlEditor
from mcp_auth_proxy.cli.install.undo import Editor, InvalidDocument

JSON = JsonEditor("mcpServers")
TOML = TomlEditor("mcp_servers")
LINEAR = {"type": "http", "url": "http://127.0.0.1:8787/linear/mcp"}
WORK = {"url": "http://127.0.0.1:8787/notes@work/mcp", "headers": {"Authorization": "Bearer ${KEY}"}}
CODEX = {"url": "http://127.0.0.1:8787/linear/mcp", "bearer_token_env_var": "KEY"}


def ours(entry: object, name: str) -> bool:
    return entry in (LINEAR, WORK, CODEX, {"url": "u"})


def put_all(editor: Editor, text: str, entries: Mapping[str, Any]) -> str:
    for name, entry in entries.items():
        text = undo.put(editor, text, name, entry)
    return text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", '{\n  "mcpServers": {\n    "a": {\n      "url": "u"\n    }\n  }\n}\n'),
        ("{}", '{\n  "mcpServers": {\n    "a": {\n      "url": "u"\n    }\n  }\n}'),
        ("{\n}\n", '{\n  "mcpServers": {\n    "a": {\n      "url": "u"\n    }\n  }\n}\n'),
        ('{"x":1}', '{"x":1,"mcpServers":{"a":{"url":"u"}}}'),
        ('{"x": 1}', '{"x": 1, "mcpServers": {"a": {"url": "u"}}}'),
        (
            '{\n\t"mcpServers": {\n\t\t"x": {} // mine\n\t}\n}',
            '{\n\t"mcpServers": {\n\t\t"x": {}, // mine\n\t\t"a": {\n\t\t\t"url": "u"\n\t\t}\n\t}\n}',
        ),
        (
            '{\r\n  "mcpServers": {\r\n    "x": {},\r\n  },\r\n}',
            '{\r\n  "mcpServers": {\r\n    "x": {},\r\n    "a": {\r\n      "url": "u"\r\n    },\r\n  },\r\n}',
        ),
        (
            '{\n    "mcpServers": {}, /* none */\n    "z": [1, 2,],\n}\n',
            '{\n    "mcpServers": {\n        "a": {\n            "url": "u"\n        }\n    }, /* none */\n'
            '    "z": [1, 2,],\n}\n',
        ),
        ('{"mcpServers": { // none\n}}', '{"mcpServers": { // none\n  "a": {\n    "url": "u"\n  }\n}}'),
    ],
)
def test_an_entry_looks_like_what_is_there(before: str, after: str) -> None:
    assert undo.put(JSON, before, "a", {"url": "u"}) == after
    assert (undo.without(JSON, after, before, ["a"], ours) or "") == before


@pytest.mark.parametrize(
    "text",
    [
        *(
            "[]",
            "{",
            '{"a" 1}',
            '{"a":1 "b":2}',
            "{} {}",
            '{"a":01}',
            "{'a':1}",
            '{"a":"\n"}',
            '{"a":NaN}',
            "{,}",
            "/*",
        ),
        *('{"a":1,,}', '"x"', "nul", '{"a":,}', '{"mcpServers": []}', '{"mcpServers": null}', '{"a":"\\x"}', "["),
        '{"a":' + "[" * (MAX_DEPTH + 1),
    ],
)
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidDocument):
        JSON.entries(text)


@pytest.mark.parametrize("text", ["a", "a = ", "[a]\n[a]", "mcp_servers = 1", 'a = "', "a = 1 b = 2", "\x00"])
def test_what_is_not_toml_is_refused(text: str) -> None:
    with pytest.raises(InvalidDocument):
        TOML.entries(text)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", '[mcp_servers.a]\nurl = "u"\n'),
        ("x = 1", 'x = 1\n\n[mcp_servers.a]\nurl = "u"\n'),
        ("x = 1\r\n", 'x = 1\r\n\r\n[mcp_servers.a]\r\nurl = "u"\r\n'),
        ("x = 1\n\n", 'x = 1\n\n[mcp_servers.a]\nurl = "u"\n'),
        ("[mcp_servers]\n# none\n", '[mcp_servers]\n# none\n\n[mcp_servers.a]\nurl = "u"\n'),
    ],
)
def test_an_entry_of_toml_is_a_table_at_the_end(before: str, after: str) -> None:
    assert undo.put(TOML, before, "a", {"url": "u"}) == after
    assert (undo.without(TOML, after, before, ["a"], ours) or "") == before


def test_a_name_that_is_no_bare_key_is_quoted() -> None:
    text = undo.put(TOML, "", "a@b", {"url": "u\x7f\\"})
    assert text.startswith('[mcp_servers."a@b"]\n')
    assert TOML.entries(text) == {"a@b": {"url": "u\x7f\\"}}


def test_tables_that_look_like_ours_inside_of_texts_are_not_edited() -> None:
    before = 'x = """\n[mcp_servers.a]\nurl = 1\n"""\ny = [\n  "[mcp_servers.a]", # [\n]\n'
    text = undo.put(TOML, before, "a", {"url": "u"})
    other = text.replace("y = [", "y = [1,").replace('"[mcp_servers.a]", # [', "2 # [")
    assert (
        undo.without(TOML, other, before, ["a"], ours)
        == 'x = """\n[mcp_servers.a]\nurl = 1\n"""\ny = [1,\n  2 # [\n]\n'
    )


@pytest.mark.parametrize("text", ["mcp_servers = {}\n", 'mcp_servers = {a = {url = "u"}}\n'])
def test_an_inline_table_is_refused_and_not_rewritten(text: str) -> None:
    with pytest.raises(InvalidDocument, match="mcp_servers"):
        undo.put(TOML, text, "a", {"url": "v"})


def test_an_entry_with_its_subtables_is_replaced_and_removed_as_one() -> None:
    text = '[mcp_servers.a]\nurl = "u"\n\n[mcp_servers.a.http_headers]\nX = "y"\n\n# about z\n[z]\nk = 1\n'
    assert undo.put(TOML, text, "a", {"url": "v"}) == '[mcp_servers.a]\nurl = "v"\n\n\n# about z\n[z]\nk = 1\n'
    assert TOML.content(undo.without(TOML, text, "", ["a"], ours) or "") == {"z": {"k": 1}}


def test_the_last_of_two_members_with_one_name_is_the_one_that_counts() -> None:
    text = '{"mcpServers": {"a": 1}, "mcpServers": {"b": {}}}'
    assert undo.put(JSON, text, "a", {}) == '{"mcpServers": {"a": 1}, "mcpServers": {"b": {}, "a": {}}}'


def test_a_comment_that_ends_with_its_line_does_not_swallow_what_follows() -> None:
    text = '{"mcpServers": {"x": {}, // about x\n"a": {}}}'
    assert JSON.removed(text, "a", with_container=False) == '{"mcpServers": {"x": {} // about x\n}}'


# Any document

blanks = st.sampled_from(["", " ", "\n", "\r\n", "\t", "  // note\n", "/* a, b */", "\n  // {\n  ", "\n    "])
scalars = st.sampled_from(["1", "-0.5e3", "true", "null", '"x"', '"\\u00e9\\n,"', '"//"', "[]", "[1, /**/ 2,]", "{}"])
keys = st.sampled_from(["a", "b c", "url", "é", "x//y", "}"])


@st.composite
def objects(draw: st.DrawFn, *, container: str | None = None, depth: int = 0) -> str:
    names = draw(st.lists(keys, max_size=3, unique=True))
    if container is not None and draw(st.booleans()):
        names.insert(draw(st.integers(0, len(names))), container)
    parts = []
    deeper = depth < 2 and draw(st.booleans())
    for name in names:
        nested = name == container or deeper
        value = draw(objects(depth=depth + 1)) if nested else draw(scalars)
        parts.append(f"{draw(blanks)}{json.dumps(name)}{draw(blanks)}:{draw(blanks)}{value}{draw(blanks)}")
    comma = "," if draw(st.booleans()) and parts else ""
    return f"{{{','.join(parts)}{comma}{draw(blanks)}}}"


json_documents = st.builds(lambda *parts: "".join(parts), blanks, objects(container="mcpServers"), blanks) | blanks
toml_values = st.sampled_from(["1", '"x"', "'#'", '"""\n[mcp_servers.linear]\n"""', "[\n  1, # one\n  2,\n]", "nan"])
toml_lines = st.one_of(
    st.just(""),
    st.sampled_from(["# note", "   ", "\t# [x]"]),
    st.builds(lambda value: f"@ = {value}", toml_values),
    st.sampled_from(["[@]", "[ @ . b ]", "[[@]]", '["@"] # c', "[mcp_servers.@]"]),
)


@st.composite
def toml_texts(draw: st.DrawFn) -> str:
    lines = [line.replace("@", f"k{number}") for number, line in enumerate(draw(st.lists(toml_lines, max_size=8)))]
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    text = "\n".join(lines) + ("\n" if draw(st.booleans()) else "")
    return text.replace("\n", newline)


json_names = st.sampled_from(["linear", "notes@work", "a"])
json_entries = st.dictionaries(json_names, st.sampled_from([LINEAR, WORK]), min_size=1)
toml_entries = st.dictionaries(st.sampled_from(["linear", "notes_work"]), st.just(CODEX), min_size=1)


def check_undo(editor: Editor, text: str, entries: dict[str, Any], first: str) -> None:
    installed = put_all(editor, text, entries)
    found = editor.entries(installed)
    assert {name: found[name] for name in entries} == entries
    kept = {name: entry for name, entry in editor.entries(text).items() if name not in entries}
    assert repr({name: entry for name, entry in found.items() if name not in entries}) == repr(kept)
    assert undo.without(editor, installed, text, list(entries), ours) == text
    left = undo.without(editor, installed, text, [first], ours)
    others = [name for name in entries if name != first]
    assert left is not None
    assert undo.without(editor, left, text, others, ours) == text


@given(json_documents, json_entries, st.data())
def test_json_is_as_before_after_install_and_remove(text: str, entries: dict[str, Any], data: st.DataObject) -> None:
    assert JSON.content(text) is not None
    check_undo(JSON, text, entries, data.draw(st.sampled_from(sorted(entries))))


@given(toml_texts(), toml_entries, st.data())
def test_toml_is_as_before_after_install_and_remove(text: str, entries: dict[str, Any], data: st.DataObject) -> None:
    tomllib.loads(text)
    check_undo(TOML, text, entries, data.draw(st.sampled_from(sorted(entries))))


@given(json_documents, st.sampled_from([LINEAR, WORK]))
def test_json_that_was_edited_meanwhile_loses_only_our_entry(text: str, entry: dict[str, Any]) -> None:
    edited = "// edited\n" + text + "\n// meanwhile\n"
    installed = "// edited\n" + undo.put(JSON, text, "linear", entry) + "\n// meanwhile\n"
    if not JSON.content(text) and "{" not in text:
        return
    assert undo.without(JSON, installed, text, ["linear"], ours) == edited


@given(toml_texts(), st.sampled_from(["# more\n", "[z]\nk = 1\n", "\n\n"]))
def test_toml_that_was_edited_meanwhile_loses_only_our_entry(text: str, more: str) -> None:
    installed = undo.put(TOML, text, "linear", CODEX)
    changed = "# edited\n" + installed + more
    # What was added behind our table is on a line of its own.
    assert undo.without(TOML, changed, text, ["linear"], ours) in [
        f"# edited\n{text}{lead}{more}" for lead in ("", "\n")
    ]


@given(json_documents, json_entries)
def test_json_without_a_backup_loses_only_our_entries(text: str, entries: dict[str, Any]) -> None:
    installed = put_all(JSON, text, entries)
    left = undo.without(JSON, installed, None, list(entries), ours)
    before = dict(JSON.content(text))
    kept = {name: entry for name, entry in JSON.entries(text).items() if name not in entries}
    after = dict(JSON.content(left or ""))
    assert after.pop("mcpServers", {}) == kept
    before.pop("mcpServers", None)
    assert after == before
