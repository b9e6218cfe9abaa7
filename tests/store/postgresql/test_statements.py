"""Named parameters become numbers, and nothing else is touched."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.store.postgresql.statements import numbered


@pytest.mark.parametrize(
    ("sql", "text", "names"),
    [
        ("SELECT 1", "SELECT 1", ()),
        ("a = :a AND b = :b OR c = :a", "a = $1 AND b = $2 OR c = $1", ("a", "b")),
        ("x::text = :x::bigint", "x::text = $1::bigint", ("x",)),
        ("':a' = :a", "':a' = $1", ("a",)),
        ("'it''s :a' = :a", "'it''s :a' = $1", ("a",)),
        ('":a" = :a', '":a" = $1', ("a",)),
        ("1 -- :b\n, :a", "1 -- :b\n, $1", ("a",)),
        ("1 /* :b */, :a", "1 /* :b */, $1", ("a",)),
        ("(:key_0, :key_1)", "($1, $2)", ("key_0", "key_1")),
    ],
)
def test_names_become_numbers(sql: str, text: str, names: tuple[str, ...]) -> None:
    found = numbered(sql)
    assert (found.text, found.names) == (text, names)


@given(st.lists(st.sampled_from(["'x :q'", '"y:q"', "::", ":a", ":b1", "text", " ", ",", "-- :q\n", "/*:q*/"])))
def test_every_name_outside_of_quotes_is_counted_once(parts: list[str]) -> None:
    found = numbered(" ".join(parts))
    wanted = list(dict.fromkeys(part[1:] for part in parts if re.fullmatch(r":[a-z]\w*", part)))
    if not any(part.endswith(":") for part in parts):
        assert list(found.names) == wanted
        assert found.text.count(":q") == sum(":q" in part for part in parts)
