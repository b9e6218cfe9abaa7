"""What must be decided in one place is decided there: names in the code that belong to one module alone."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "mcp_auth_proxy"

SPLITTERS = frozenset({"urlsplit", "urlparse", "urlunsplit", "urlunparse", "urljoin"})
"""Functions that read a URL in another way than ``net.urls`` does."""

LOOPBACK = frozenset({"127.0.0.0/8", "::1", "::1/128", "localhost", ".localhost"})

ALLOWED: dict[str, dict[str, str]] = {
    "urls": {
        "cli/demo_servers/": "the demo's servers share nothing with the proxy that they show",
        "cli/doctor/providers.py": "the host of a known provider, to be looked up in a table",
        "store/plain_files.py": "mcp-use names its files by what urlsplit finds",
        "net/forward_proxy.py": "HTTPS_PROXY may hold a user name and a password, which no other URL may",
        "oauth/discovery.py": "paths are put together from the issuer's own spelling (RFC 8414 §3.1, RFC 9728 §3.1)",
        "oauth/dpop.py": "htu is the URL without query and fragment (RFC 9449 §4.2)",
        "proxy/upstream_client.py": "a reference is resolved (RFC 3986 §5), and the result read by net.urls",
    },
    "TLS contexts": {"net/tls.py": "the one client context"},
    "prints": {"cli/terminal.py": "the one place, which escapes control characters"},
    "names looked up": {"net/resolver.py": "the one look-up, whose answer is checked and dialed"},
    "connections opened": {
        "net/dial.py": "the one dialer",
        "cli/demo_servers/": "sockets that listen, and a free port",
        "cli/listener.py": "the socket that listens",
        "client/consent.py": "the socket that listens, in a program without the proxy",
        "cli/notify.py": "a datagram to the service manager",
        "store/postgresql/connection.py": "the driver's socket once more, to cut it",
        "net/addresses.py": "a datagram socket that sends nothing, to ask the system for a route",
    },
    "the environment's forward proxy": {"net/forward_proxy.py": "the one reading"},
    "cookies read by a library": {},  # web/cookies.py does it in linear time
    "loopback addresses": {
        "net/urls.py": "the one is_loopback",
        "net/addresses.py": "one of the classes of addresses, in a table of them all",
        "config/settings.py": "the address that stands for a wildcard",
        "cli/demo_servers/": "the demo's servers share nothing with the proxy that they show",
    },
}
"""What is looked for → path, or folder, that may have it → why."""


def found_in(tree: ast.AST, names: frozenset[str]) -> Iterator[str]:
    """Yield each use of one of the names: as a name, as an attribute, or imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield node.attr
        elif isinstance(node, ast.Name) and node.id in names:
            yield node.id
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from (alias.name for alias in node.names if alias.name.rpartition(".")[2] in names)


def texts_in(tree: ast.AST) -> Iterator[str]:
    """Yield the string constants that are no docstrings."""
    described = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
            yield node.value


def look_for(what: str, tree: ast.AST) -> list[str]:
    """Return what a module has of one of the things in ``ALLOWED``."""
    match what:
        case "urls":
            return list(found_in(tree, SPLITTERS))
        case "TLS contexts":
            return list(
                found_in(tree, frozenset({"create_default_context", "SSLContext", "_create_unverified_context"}))
            )
        case "prints":
            return list(found_in(tree, frozenset({"echo", "secho", "print"})))
        case "names looked up":
            return list(found_in(tree, frozenset({"getaddrinfo", "gethostbyname", "gethostbyname_ex"})))
        case "connections opened":
            names = frozenset({"create_connection", "open_connection", "sock_connect", "connect_ex", "socketpair"})
            return list(found_in(tree, names)) + [
                "socket.socket()"
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "socket.socket"
            ]
        case "cookies read by a library":
            library = list(found_in(tree, frozenset({"cookie_parser", "SimpleCookie"})))
            return library + [node for node in map(ast.unparse, ast.walk(tree)) if node == "request.cookies"]
        case "the environment's forward proxy":
            wanted = ("no_proxy", "https_proxy", "http_proxy", "all_proxy")
            return [text for text in texts_in(tree) if text.lower() in wanted]
        case _:
            properties = [
                ast.unparse(node)
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and node.attr == "is_loopback" and ast.unparse(node.value) != "urls"
            ]
            return properties + [text for text in texts_in(tree) if text in LOOPBACK]


@cache
def modules() -> tuple[tuple[str, ast.Module], ...]:
    return tuple(
        (path.relative_to(SOURCES).as_posix(), ast.parse(path.read_text())) for path in sorted(SOURCES.rglob("*.py"))
    )


def is_allowed(module: str, places: dict[str, str]) -> bool:
    return any(module == place or (place.endswith("/") and module.startswith(place)) for place in places)


@pytest.mark.parametrize("what", ALLOWED)
def test_what_has_one_place_is_nowhere_else(what: str) -> None:
    places = ALLOWED[what]
    strays = {
        module: uses for module, tree in modules() if (uses := look_for(what, tree)) and not is_allowed(module, places)
    }
    assert strays == {}, "use the module that has it, or say here why that does not do"


@pytest.mark.parametrize("what", ALLOWED)
def test_no_exception_has_outlived_its_reason(what: str) -> None:
    having = [module for module, tree in modules() if look_for(what, tree)]
    idle = [place for place in ALLOWED[what] if not any(is_allowed(module, {place: ""}) for module in having)]
    assert idle == []


@pytest.mark.parametrize("function", ["is_loopback", "parse_origin", "raw_origin", "split_authority", "is_host"])
def test_no_other_module_has_a_function_of_that_name(function: str) -> None:
    defined = [
        module
        for module, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.strip("_") == function
    ]
    assert defined == ["net/urls.py"]


@pytest.mark.parametrize(
    ("what", "source"),
    [
        ("urls", "from urllib.parse import urlsplit"),
        ("urls", "import urllib.parse\nx = urllib.parse.urlparse(y)"),
        ("TLS contexts", "import ssl\nssl.create_default_context()"),
        ("TLS contexts", "from ssl import SSLContext"),
        ("prints", "click.echo('x')"),
        ("prints", "print('x')"),
        ("names looked up", "await loop.getaddrinfo(host, 1)"),
        ("connections opened", "asyncio.open_connection(host, 1)"),
        ("connections opened", "socket.socket()"),
        ("the environment's forward proxy", "os.environ.get('NO_PROXY')"),
        ("cookies read by a library", "request.cookies"),
        ("cookies read by a library", "from starlette.requests import cookie_parser"),
        ("loopback addresses", "host in ('localhost', '127.0.0.1')"),
        ("loopback addresses", "ipaddress.ip_address(host).is_loopback"),
    ],
)
def test_a_second_place_would_be_noticed(what: str, source: str) -> None:
    assert look_for(what, ast.parse(source))
