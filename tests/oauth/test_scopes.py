"""Which scopes are requested."""

import pytest

from mcp_auth_proxy.oauth import scopes
from mcp_auth_proxy.oauth.scopes import choose


def test_duplicates_and_invalid_scopes_are_dropped() -> None:
    assert scopes.parse('a  b a c"d e\\f \x00 é g') == ("a", "b", "g")


@pytest.mark.parametrize(
    ("configured", "challenged", "resource", "expected"),
    [
        (("c",), ("x",), ("r",), ("c",)),
        ((), ("x",), ("r",), ()),
        (None, ("x",), ("r",), ("x",)),
        (None, None, ("r", "s", "r"), ("r", "s")),
        (None, None, None, ()),
    ],
)
def test_configuration_then_challenge_then_resource_metadata(
    configured: tuple[str, ...] | None,
    challenged: tuple[str, ...] | None,
    resource: tuple[str, ...] | None,
    expected: tuple[str, ...],
) -> None:
    chosen = choose(
        configured=configured, challenged=challenged, supported_by_resource=resource, supported_by_server=("z",)
    )

    assert chosen == expected


@pytest.mark.parametrize("challenged", [None, ("s",)], ids=["resource metadata", "challenge"])
def test_of_endless_scopes_the_first_4000_characters_are_requested(challenged: tuple[str, ...] | None) -> None:  # T79
    endless = ("first", *(f"{number:05}" for number in range(20_000)))

    chosen = choose(
        configured=None,
        challenged=challenged and endless,
        supported_by_resource=None if challenged else endless,
        supported_by_server=None,
    )

    assert chosen == endless[: len(chosen)]
    assert 3990 < len(" ".join(chosen)) <= 4000


@pytest.mark.parametrize(("configured", "expected"), [(None, ("a", "b", "c")), (("d",), ("a", "b", "d", "c"))])
def test_a_step_up_requests_old_and_new_scopes_in_order(
    configured: tuple[str, ...] | None, expected: tuple[str, ...]
) -> None:  # T19
    chosen = choose(
        configured=configured,
        challenged=("b", "c"),
        supported_by_resource=("r",),
        supported_by_server=None,
        already=("a", "b"),
    )

    assert chosen == expected


@pytest.mark.parametrize(
    ("asked", "listed", "offline", "expected"),
    [
        (("a",), ("a", "offline_access"), True, ("a", "offline_access")),
        (("offline_access", "a"), ("offline_access",), True, ("offline_access", "a")),
        (("a",), ("a",), True, ("a",)),
        (("a",), None, True, ("a",)),
        (("a",), ("offline_access",), False, ("a",)),
        ((), ("offline_access",), True, ()),
    ],
)
def test_offline_access_is_added_if_the_server_lists_it(
    asked: tuple[str, ...], listed: tuple[str, ...] | None, offline: bool, expected: tuple[str, ...]
) -> None:
    chosen = choose(
        configured=None,
        challenged=asked,
        supported_by_resource=None,
        supported_by_server=listed,
        offline_access=offline,
    )

    assert chosen == expected
