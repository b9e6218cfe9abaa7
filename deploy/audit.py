"""Look for known vulnerabilities in the locked packages. Runs where pip-audit is, and asks pypi.org.

The exit code is 0 only if every package was looked up and nothing is known, 1 if a vulnerability is known, and 2 if a
package could not be looked up: pip-audit itself takes that for a success.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("run", "build", "dev")
OPTIONS = ("--require-hashes", "--disable-pip", "--progress-spinner", "off", "--format", "json")


def main() -> int:
    packages: dict[tuple[str, str], Mapping[str, Any]] = {}
    for lock in LOCKS:
        command = [sys.executable, "-m", "pip_audit", *OPTIONS, "-r", str(ROOT / "requirements" / f"{lock}.txt")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            found = json.loads(done.stdout)["dependencies"]
        except ValueError:
            print(f"{unreachable()}\n{done.stderr.strip()[-500:]}")
            return 2
        packages |= {(one["name"], one.get("version", "")): one for one in found}
    code, text = verdict(packages.values())
    print(text)
    return code


def verdict(packages: Iterable[Mapping[str, Any]]) -> tuple[int, str]:
    """Return the exit code, and what to print about the packages of pip-audit's report."""
    packages = list(packages)
    vulnerable = [
        f"{one['name']} {one['version']}: {known['id']}, fixed in {', '.join(known['fix_versions']) or 'no version'}"
        for one in packages
        for known in one.get("vulns", [])
    ]
    unknown = [f"{one['name']}: {one['skip_reason']}" for one in packages if "skip_reason" in one]
    if vulnerable:
        return 1, "\n".join(["Known vulnerabilities:", *vulnerable, *unknown])
    if not packages or len(unknown) == len(packages):
        return 2, "\n".join([unreachable(), *unknown[:1]])
    if unknown:
        return 2, "\n".join(["Some packages could not be looked up:", *unknown])
    return 0, f"{len(packages)} packages, no known vulnerabilities"


def unreachable() -> str:
    return "Nothing was audited: the vulnerability service at pypi.org can't be reached from here, or does not answer."


if __name__ == "__main__":
    sys.exit(main())
