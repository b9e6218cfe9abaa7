"""What is shipped: one version everywhere, complete locks, and an image and manifests with few privileges."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import yaml

from mcp_auth_proxy import __version__
from mcp_auth_proxy.config.load import load

ROOT = Path(__file__).resolve().parents[2]
LOCKS = [ROOT / "requirements" / name for name in ("dev.txt", "run.txt", "build.txt")]
TOOLS = [ROOT / "requirements" / name for name in ("conformance.txt", "fuzz.txt", "sbom.txt", "audit.txt")]
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


def pins(lock: Path) -> dict[str, str]:
    return dict(PINNED.findall(lock.read_text()))


def test_image_manifest_and_changelog_name_the_version_of_the_package() -> None:
    assert f'image.version="{__version__}"' in (ROOT / "Dockerfile").read_text()
    assert f"image: mcp-auth-proxy:{__version__}" in (ROOT / "deploy/kubernetes/sidecar.yaml").read_text()
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
    for name, version in {**run, **build}.items():
        assert dev[name] == version, f"{name} differs between the locks: run `make lock`"
    for name, version in run.items():
        assert fuzz[name] == version, f"{name} differs between the locks: run `make lock`"


def test_the_wheel_has_the_type_marker_and_the_pages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=50)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    templates = ROOT / "src/mcp_auth_proxy/web/templates"
    assert "mcp_auth_proxy/py.typed" in names
    assert {f"mcp_auth_proxy/web/templates/{page.name}" for page in templates.iterdir()} <= set(names)


def test_only_systems_that_it_runs_on_are_classifiers() -> None:
    """uvloop and the module resource, which the program needs, do not exist on Windows."""
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    systems = {line.removeprefix("Operating System :: ") for line in classifiers if line.startswith("Operating")}
    assert systems == {"MacOS", "POSIX :: Linux"}


def test_the_package_says_that_it_is_typed() -> None:
    """A type checker reads the annotations of an installed package only if it has this file (PEP 561)."""
    assert (ROOT / "src/mcp_auth_proxy/py.typed").is_file()


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def final_stage() -> list[tuple[str, str]]:
    lines = instructions()
    last = max(index for index, (word, _) in enumerate(lines) if word == "FROM")
    return lines[last:]


def test_the_image_runs_as_a_fixed_user_who_is_not_root() -> None:
    assert [rest for word, rest in final_stage() if word == "USER"] == ["10001:10001"]


def test_the_image_writes_to_one_volume_only() -> None:
    stage = final_stage()
    assert [rest for word, rest in stage if word == "VOLUME"] == ["/data"]
    assert ("WORKDIR", "/data") in stage
    assert any(word == "ENV" and "PYTHONDONTWRITEBYTECODE=1" in rest for word, rest in stage)


def test_the_image_checks_its_health_with_the_python_that_it_has() -> None:
    (check,) = [rest for word, rest in final_stage() if word == "HEALTHCHECK"]
    command = json.loads(check.partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "healthcheck", "exec")
    assert "/healthz" in command[2]
    assert not re.search(r"\b(curl|wget)\b", (ROOT / "Dockerfile").read_text())


def test_the_image_starts_the_program_directly_so_that_it_gets_the_signals() -> None:
    stage = dict(final_stage())
    assert json.loads(stage["ENTRYPOINT"]) == ["mcp-auth-proxy"]
    assert json.loads(stage["CMD"]) == ["serve", "--config", "/etc/mcp-auth-proxy/config.yaml"]
    assert stage["STOPSIGNAL"] == "SIGTERM"
    assert stage["EXPOSE"] == "8787"


def test_the_image_installs_by_hash_and_copies_only_what_the_build_context_holds() -> None:
    installs = [rest for word, rest in instructions() if word == "RUN" and "-r requirements" in rest]
    assert installs
    assert all(rest.count("--require-hashes") == rest.count("-r requirements") for rest in installs)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [rest.split()[:-1] for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    assert {name for names in copied for name in names} <= allowed


def documents() -> dict[str, Any]:
    text = (ROOT / "deploy/kubernetes/sidecar.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text) if document}


def pod() -> Any:
    return documents()["Deployment"]["spec"]["template"]["spec"]


def test_the_sidecar_configuration_is_accepted_with_what_the_secret_holds(tmp_path: Path) -> None:
    found = documents()
    secret = found["Secret"]["stringData"]
    references = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in pod()["initContainers"][0]["env"]}
    assert {reference["name"] for reference in references.values()} == {found["Secret"]["metadata"]["name"]}
    file = tmp_path / "config.yaml"
    file.write_text(found["ConfigMap"]["data"]["config.yaml"])
    settings = load(file, environ={name: secret[reference["key"]] for name, reference in references.items()})
    assert settings.store.path == Path("/data/mcp-auth-proxy.db")
    assert settings.listen.host == "127.0.0.1"
    assert set(settings.servers) == {"warehouse"}


def test_the_agent_is_pointed_at_a_configured_server() -> None:
    config = yaml.safe_load(documents()["ConfigMap"]["data"]["config.yaml"])
    (variable,) = pod()["containers"][0]["env"]
    assert variable["value"] in {f"http://{config['listen']}/{name}/mcp" for name in config["servers"]}


def test_every_container_of_the_pod_is_locked_down() -> None:
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert pod()["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod()["initContainers"] + pod()["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]


def test_the_sidecar_is_up_before_the_agent_and_has_time_to_drain() -> None:
    sidecar = pod()["initContainers"][0]
    assert sidecar["restartPolicy"] == "Always"
    assert pod()["terminationGracePeriodSeconds"] > 30
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = sidecar[name]["exec"]["command"]
        assert command[:2] == ["python", "-c"]
        compile(command[2], name, "exec")


def test_make_prints_its_commands_and_they_are_described() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    printed = re.findall(r"^([a-z]+) ", done.stdout, re.MULTILINE)
    wanted = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert printed == wanted
    described = re.findall(r"^\| `make ([a-z]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert {*wanted} - {*described} == {"help", "clean"}


def test_the_ci_script_is_valid_and_can_be_started() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o100
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
