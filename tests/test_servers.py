"""The server map has one owner, which reports every change."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from mcp_auth_proxy.config.settings import OAuthSettings, Secret, ServerSettings
from mcp_auth_proxy.servers import ServerChange, ServerRegistry


def server(name: str, url: str = "https://{}.example/mcp", **oauth: object) -> ServerSettings:
    return ServerSettings(name=name, url=url.format(name), oauth=OAuthSettings(**oauth))  # type: ignore[arg-type]


def servers(*names: str) -> dict[str, ServerSettings]:
    return {name: server(name) for name in names}


def test_it_is_the_mapping_that_it_was_given() -> None:
    registry = ServerRegistry(servers("b", "a"))
    assert (list(registry), len(registry), "a" in registry, registry.get("c")) == (["b", "a"], 2, True, None)
    assert registry["a"] == server("a")
    with pytest.raises(KeyError):
        registry["c"]


def test_changes_to_the_mapping_it_was_given_have_no_effect() -> None:
    given = servers("a")
    registry = ServerRegistry(given)
    given.clear()
    assert list(registry) == ["a"]


def test_a_replacement_reports_what_was_added_removed_and_changed() -> None:
    registry = ServerRegistry(servers("a", "b", "c"))
    seen: list[tuple[ServerChange, list[str]]] = []
    registry.on_change(lambda change: seen.append((change, list(registry))))
    change = registry.replace({**servers("d", "a"), "b": server("b", "https://new.example/mcp")})
    assert change == ServerChange(added=("d",), removed=("c",), changed=("b",))
    # The callback sees the new mapping.
    assert seen == [(change, ["d", "a", "b"])]


def test_a_secret_that_was_read_again_is_a_change() -> None:
    registry = ServerRegistry({"a": server("a", client_secret=Secret("old"))})
    assert registry.replace({"a": server("a", client_secret=Secret("old"))}) == ServerChange()
    assert registry.replace({"a": server("a", client_secret=Secret("new"))}).changed == ("a",)


def test_without_a_change_no_callback_is_called_and_the_new_order_is_used() -> None:
    registry = ServerRegistry(servers("a", "b"))
    registry.on_change(lambda change: pytest.fail(f"called with {change}"))
    assert not registry.replace(servers("b", "a"))
    assert list(registry) == ["b", "a"]


def test_callbacks_are_called_in_order_until_they_unsubscribe() -> None:
    registry = ServerRegistry({})
    calls: list[str] = []

    def first(change: ServerChange) -> None:
        calls.append("first")

    end_once = registry.on_change(first)
    registry.on_change(first)
    registry.on_change(lambda change: calls.append("last"))
    end_once()
    end_once()  # which ends only its own subscription
    registry.replace(servers("a"))
    assert calls == ["first", "last"]


def test_a_callback_may_unsubscribe_while_it_is_called() -> None:
    registry = ServerRegistry({})
    calls: list[str] = []
    ends: list[Callable[[], None]] = []

    def once(change: ServerChange) -> None:
        calls.append("once")
        ends[0]()

    ends.append(registry.on_change(once))
    registry.on_change(lambda change: calls.append("always"))
    registry.replace(servers("a"))
    registry.replace(servers("b"))
    assert calls == ["once", "always", "always"]


def test_a_change_is_described_in_words() -> None:
    change = ServerChange(added=("a", "b"), removed=("c",))
    assert (str(change), bool(change), str(ServerChange()), bool(ServerChange())) == (
        "added a, b; removed c",
        True,
        "",
        False,
    )


def made(name: str, url: str = "https://{}.example/mcp") -> ServerSettings:
    return replace(server(name, url), id=f"srv_{name}", origin="api")


def test_servers_made_at_run_time_come_after_those_of_the_configuration() -> None:
    registry = ServerRegistry(servers("b", "a"))
    change = registry.replace_made({"c": made("c")})
    assert (change, list(registry)) == (ServerChange(added=("c",)), ["b", "a", "c"])
    # A reload leaves them alone.
    assert registry.replace(servers("a")) == ServerChange(removed=("b",))
    assert (list(registry), list(registry.configured), list(registry.made)) == (["a", "c"], ["a"], ["c"])
    assert registry.replace_made({}) == ServerChange(removed=("c",))


def test_the_configuration_wins_a_clash_and_the_other_comes_back_when_it_ends() -> None:
    registry = ServerRegistry(servers("a"))
    registry.replace_made({"b": made("b", "https://made.example/mcp")})
    assert registry.replace(servers("a", "b")).changed == ("b",)
    assert registry["b"].url == "https://b.example/mcp"
    assert registry.by_id("srv_b") is None
    assert registry.replace(servers("a")).changed == ("b",)
    assert registry["b"].url == "https://made.example/mcp"


def test_a_server_is_found_by_its_id_which_is_its_name_in_the_configuration() -> None:
    registry = ServerRegistry(servers("a"))
    registry.replace_made({"b": made("b")})
    assert (registry.by_id("a"), registry.by_id("srv_b")) == (server("a"), made("b"))
    assert [registry.by_id(it) for it in ("b", "", "srv_c")] == [None, None, None]
