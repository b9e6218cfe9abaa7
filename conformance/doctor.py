"""The command that runs ``mcp-auth-proxy doctor`` against a scenario's server: ``python -m conformance.doctor URL``.

It writes doctor's verdict to ``doctor.json`` in the current folder. The exit code is always 1: the suite then reports
whether it requires that a client succeeds.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from conformance.scenarios import SERVER, Scenario, write_configuration

SAID = "doctor.json"


@dataclass(frozen=True, slots=True)
class Said:
    """Doctor's exit code, and verdict and summary of its JSON; if it failed, an empty verdict and the error."""

    code: int
    verdict: str
    summary: str

    @classmethod
    def read(cls, folder: Path) -> "Said | None":
        """Return what was written to the folder; None if doctor did not get that far."""
        path = folder / SAID
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def main() -> None:
    said = examine(Scenario.current(sys.argv[-1]))
    Path(SAID).write_text(json.dumps(asdict(said)), encoding="utf-8")
    sys.exit(1)


def examine(scenario: Scenario) -> Said:
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        config = write_configuration(scenario, Path(folder), "0s")
        command = [sys.executable, "-m", "mcp_auth_proxy", "doctor", SERVER, "--config", str(config), "--json"]
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return Said(done.returncode, "", done.stderr.strip())
    return Said(done.returncode, report["verdict"], report["summary"])


if __name__ == "__main__":
    main()
