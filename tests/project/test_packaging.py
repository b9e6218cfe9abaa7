"""What is shipped: one version everywhere, complete locks, and described commands.

The image and what is applied to a cluster have tests of their own (tests/deploy).
"""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from mcp_auth_proxy import __version__

ROOT = Path(__file__).resolve().parents[2]
LOCKS = [ROOT / "requirements" / name for name in ("dev.txt", "run.txt", "build.txt")]
TOOLS = [
    ROOT / "requirements" / f"{name}.txt" for name in ("clients", "conformance", "deploy", "fuzz", "sbom", "audit")
]
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


def pins(lock: Path) -> dict[str, str]:
    return dict(PINNED.findall(lock.read_text()))


def test_image_compose_documentation_and_changelog_name_the_version_of_the_package() -> None:
    assert f'image.version="{__version__}"' in (ROOT / "Dockerfile").read_text()
    assert f"image: mcp-auth-proxy:{__version__}\n" in (ROOT / "compose.yaml").read_text()
    for file in ("Dockerfile", "docs/deployment.md"):
        named = re.findall(r"mcp-auth-proxy:(\d+\.\d+\.\d+)", (ROOT / file).read_text())
        assert set(named) == {__version__}, file
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_locked_package_has_a_hash() -> None:
    for lock in LOCKS + TOOLS:
        for entry in re.split(r"\n(?=\S)", lock.read_text()):
            assert entry.startswith("#") or "--hash=sha256:" in entry, f"{lock.name}: {entry[:60]}"


def test_the_locks_name_no_index() -> None:
    for file in (ROOT / "requirements").iterdir():
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", file.read_text()), file.name


def test_every_dependency_is_locked_and_the_locks_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dev, run, build = map(pins, LOCKS)
    fuzz = pins(ROOT / "requirements/fuzz.txt")
    for requirement in project["dependencies"]:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        assert name in run, f"{name} is not in requirements/run.txt: run `make lock`"
        assert name in fuzz, f"{name} is not in requirements/fuzz.txt: run `make lock`"
    for name, version in {**run, **build}.items():
        assert dev[name] == version, f"{name} differs between the locks: run `make lock`"
    for name, version in run.items():
        assert fuzz.get(name, version) == version, f"{name} differs between the locks: run `make lock`"


def test_the_wheel_has_the_type_marker_the_pages_and_the_files_of_services(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=50)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "mcp_auth_proxy/py.typed" in names
    for folder in ("web/templates", "cli/units"):
        files = list((ROOT / "src/mcp_auth_proxy" / folder).iterdir())
        assert files
        assert {f"mcp_auth_proxy/{folder}/{file.name}" for file in files} <= set(names)


def test_only_systems_that_it_runs_on_are_classifiers() -> None:
    """uvloop and the module resource, which the program needs, do not exist on Windows."""
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    systems = {line.removeprefix("Operating System :: ") for line in classifiers if line.startswith("Operating")}
    assert systems == {"MacOS", "POSIX :: Linux"}


def test_the_package_says_that_it_is_typed() -> None:
    """A type checker reads the annotations of an installed package only if it has this file (PEP 561)."""
    assert (ROOT / "src/mcp_auth_proxy/py.typed").is_file()


def test_the_image_installs_by_hash_and_copies_only_what_the_build_context_holds() -> None:
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    instructions = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    installs = [rest for word, rest in instructions if word == "RUN" and "-r requirements" in rest]
    assert installs
    assert all(rest.count("--require-hashes") == rest.count("-r requirements") for rest in installs)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [rest.split()[:-1] for word, rest in instructions if word == "COPY" and "--from" not in rest]
    assert {name for names in copied for name in names} <= allowed


def test_make_prints_its_commands_and_they_are_described() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    printed = re.findall(r"^([a-z]+) ", done.stdout, re.MULTILINE)
    wanted = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert printed == wanted
    described = re.findall(r"^\| `make ([a-z]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert {*wanted} - {*described} == {"help", "clean"}


def test_ci_checks_the_chart_for_four_versions_of_kubernetes() -> None:
    versions = re.search(r"^KUBERNETES := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert versions
    assert len(set(versions[1].split())) >= 4
    done = subprocess.run(["make", "-n", "chart"], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    assert f"for version in {versions[1]}; do" in done.stdout
    assert re.search(r"kubernetes-validate .*deploy/kubernetes/\*\.yaml dist/chart/\*\.yaml", done.stdout)
    assert re.search(r"^(timeout \d+ )?make chart$", (ROOT / ".ci/run").read_text(), re.MULTILINE)


def test_the_ci_script_is_valid_and_can_be_started() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o100
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
