"""Write the bill of materials of a running proxy (CycloneDX 1.6, JSON), and check it. Runs where cyclonedx-bom is.

The lock has the versions and hashes for all platforms; the environment that the packages are installed in has their
licenses and what each depends on.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "run.txt"
PROXY = "mcp-auth-proxy"

_VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)
_LOCKED = re.compile(r"^([\w.-]+)==(\S+)((?:.*\\\n)*.*)", re.MULTILINE)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")

Json = dict[str, Any]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--environment", required=True, help="where the packages are installed")
    options.add_argument("--output", type=Path, required=True)
    arguments = options.parse_args()
    document = cyclonedx("requirements", str(LOCK), "--pyproject", str(ROOT / "pyproject.toml"))
    complete(document, cyclonedx("environment", arguments.environment))
    text = json.dumps(document, indent=2) + "\n"
    problems = [*invalid(text), *missing(document)]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    print(f"{arguments.output}: {len(document['components'])} packages")
    return 0


def cyclonedx(*command: str) -> Json:
    """Return the document that ``cyclonedx-py`` makes."""
    program = [sys.executable, "-W", "ignore", "-m", "cyclonedx_py", *command]
    done = subprocess.run(
        [*program, "--spec-version", "1.6", "--output-reproducible"], stdout=subprocess.PIPE, check=True
    )
    document: Json = json.loads(done.stdout)
    return document


def complete(document: Json, environment: Json) -> None:
    """Add to the document of the lock what the environment knows: licenses, descriptions and dependencies."""
    installed = {normalized(component["name"]): component for component in environment["components"]}
    needs = {name_of(entry["ref"]): entry.get("dependsOn", []) for entry in environment["dependencies"]}
    root = document["metadata"]["component"]
    root["version"] = version()
    refs = {normalized(component["name"]): component["purl"] for component in document["components"]}
    for component in document["components"]:
        del component["description"]  # lines of the lock
        known = installed.get(normalized(component["name"]), {})
        component |= {key: known[key] for key in ("description", "licenses") if key in known}
        component["bom-ref"] = component["purl"]
    document["dependencies"] = [
        {
            "ref": ref,
            "dependsOn": sorted({refs[name_of(need)] for need in needs.get(name, []) if name_of(need) in refs}),
        }
        for name, ref in {PROXY: root["bom-ref"], **refs}.items()
    ]


def name_of(ref: str) -> str:
    """Return the package of a reference of an environment's document, which is ``name==version``."""
    return normalized(ref.partition("==")[0])


def normalized(name: str) -> str:
    """Return the normalized name of a package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def version() -> str:
    found = _VERSION.search((ROOT / "src/mcp_auth_proxy/__init__.py").read_text())
    assert found is not None, "the package has no version"
    return found[1]


def invalid(text: str) -> Iterator[str]:
    """Yield how a document breaks the schema."""
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if error is not None:
        yield f"not CycloneDX: {error}"


def missing(document: Json) -> Iterator[str]:
    """Yield each package of the lock that is not in a document with its version and hashes, or not at all."""
    parts = {normalized(component["name"]): component for component in document["components"]}
    locked = _LOCKED.findall(LOCK.read_text())
    for name, number, rest in locked:
        part = parts.pop(normalized(name), {})
        places = part.get("externalReferences", [])
        hashes = {
            entry["content"] for place in places for entry in place.get("hashes", []) if entry["alg"] == "SHA-256"
        }
        if part.get("version") != number or not hashes or hashes != set(_HASH.findall(rest)):
            yield f"{name} {number} is not in it with this version and its hashes"
        elif "licenses" not in part and ";" not in rest:
            yield f"{name} has no license"
    yield from (f"{name} is not in the lock" for name in parts)


if __name__ == "__main__":
    sys.exit(main())
