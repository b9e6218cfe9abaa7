"""The package declares what it imports, and imports what it declares."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

NOT_IMPORTED: dict[str, str] = {}
"""Distribution → why it is declared though no module of the package imports it."""


def normalized(name: str) -> str:
    """Return the normalized name of a distribution (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*, extras: bool = False) -> set[str]:
    """Return the distributions in ``[project] dependencies``, and with ``extras`` those of extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"].values() if extras else ()
    requirements = [*project["dependencies"], *(requirement for extra in optional for requirement in extra)]
    return {normalized(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]) for requirement in requirements}


def modules_imported(source: str) -> Iterator[str]:
    """Yield the top-level name of each module that a source file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports are absolute"
            yield node.module.partition(".")[0]


def imported() -> set[str]:
    """Return the distributions that the package imports from."""
    files = sorted((ROOT / "src/mcp_auth_proxy").rglob("*.py"))
    modules = {module for file in files for module in modules_imported(file.read_text())}
    foreign = modules - sys.stdlib_module_names - {"mcp_auth_proxy"}
    distributions = packages_distributions()
    return {normalized(distributions[module][0]) for module in foreign}


def test_every_import_is_declared() -> None:
    assert imported() - declared(extras=True) == set()


def test_every_declared_dependency_is_imported() -> None:
    assert declared() - imported() - set(NOT_IMPORTED) == set()


def test_what_is_excused_is_declared_and_not_imported() -> None:
    assert set(NOT_IMPORTED) <= declared() - imported()
