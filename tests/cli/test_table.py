"""The table of ``status``: aligned, within the window, and links whole."""

import re

from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.cli.table import MIN_PROSE, Line, columns, lay_out

LINK = "http://127.0.0.1:8787/connect/notes?flow=" + "F" * 40
LINES = [
    Line(cells=("a", "connected"), prose="since today by https://as.example, renews itself", colored=1, color="green"),
    Line(cells=("notes@work", "needs consent"), prose=f"needs authorization: {LINK}", colored=1, color="cyan"),
]


def plain(lines: list[str]) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in map(str, lines)]


def test_without_a_window_each_connection_is_one_line_under_no_header() -> None:
    assert plain([*lay_out(LINES, width=None, headers=("server", "state", "details"))]) == [
        "a           connected      since today by https://as.example, renews itself",
        f"notes@work  needs consent  needs authorization: {LINK}",
    ]


def test_in_a_window_prose_is_wrapped_under_its_column_and_a_link_is_whole() -> None:
    assert plain([*lay_out(LINES, width=61, headers=("server", "state", "details"))]) == [
        "SERVER      STATE          DETAILS",
        "a           connected      since today by https://as.example,",
        "                           renews itself",
        "notes@work  needs consent  needs authorization:",
        LINK,
    ]


def test_in_a_narrow_window_prose_stands_below() -> None:
    assert plain([*lay_out(LINES[:1], width=30, headers=("server", "state", "details"))]) == [
        "a  connected",
        "  since today by",
        "  https://as.example, renews",
        "  itself",
    ]


def test_the_state_has_its_color_and_texts_of_others_have_none() -> None:
    (line,) = lay_out([Line(cells=("a\x1b[31m", "ended"), prose="\x1b]0;x\x07", colored=1, color="red")], width=None)
    assert str(line) == "a\\x1b[31m  \x1b[31mended\x1b[0m  \\x1b]0;x\\x07"


def test_wide_characters_take_two_columns() -> None:
    assert (columns("日本"), columns("e\u0301"), columns("ab")) == (4, 1, 2)


words = st.text(alphabet="ab日", min_size=1, max_size=12)


@given(
    st.lists(st.tuples(words, words, st.lists(words, max_size=12)), min_size=1, max_size=4), st.integers(MIN_PROSE, 120)
)
def test_a_table_fits_any_window_and_loses_nothing(rows: list[tuple[str, str, list[str]]], width: int) -> None:
    lines = [Line(cells=(name, state), prose=" ".join(prose)) for name, state, prose in rows]
    shown = plain([*lay_out(lines, width=width, headers=("s", "s", "d"))])
    assert max(map(columns, shown)) <= max(width, 2 * 12 * 2 + 2)
    said = [word for name, state, prose in rows for word in (name, state, *prose)]
    found = " ".join(shown).split()
    assert found[-len(said) :] == said
