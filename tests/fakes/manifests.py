"""What is applied to a cluster: the manifest as it is, and the chart as helm renders it."""

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from conftest import SEARCH

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/mcp-auth-proxy"
EXAMPLES = ROOT / "deploy/helm/examples"
SECRETS = "/run/secrets/mcp-auth-proxy"
"""Where the proxy's container finds the files of its Secret."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Manifests:
    """Objects by kind; there is one of each."""

    objects: Mapping[str, Json]

    @classmethod
    def read(cls, text: str) -> "Manifests":
        found = [document for document in yaml.safe_load_all(text) if document]
        objects = {str(document["kind"]): document for document in found}
        assert len(objects) == len(found)
        return cls(objects)

    @property
    def template(self) -> Json:
        template: Json = self.objects["Deployment"]["spec"]["template"]
        return template

    @property
    def pod(self) -> Json:
        pod: Json = self.template["spec"]
        return pod

    @property
    def proxy(self) -> Json:
        """The container of the proxy."""
        containers = [*self.pod.get("initContainers", []), *self.pod["containers"]]
        (found,) = (container for container in containers if container["name"] == "mcp-auth-proxy")
        return dict(found)

    @property
    def config_text(self) -> str:
        return str(self.objects["ConfigMap"]["data"]["config.yaml"])

    @property
    def config(self) -> Json:
        config: Json = yaml.safe_load(self.config_text)
        return config

    def config_in(self, folder: Path) -> Path:
        """Write the configuration with the paths of the container in ``folder``, and files for its secrets."""
        return write_in(folder, self.config_text)


def write_in(folder: Path, config: str) -> Path:
    """Write a configuration of a container with its paths in ``folder``, and files for its secrets."""
    for name in ("data", "secrets"):
        (folder / name).mkdir()
    for secret, value in (("store-key", "A" * 43 + "="), ("warehouse-client-secret", "s")):
        (folder / "secrets" / secret).write_text(value)
    text = config.replace(SECRETS, str(folder / "secrets")).replace("/run/secrets", str(folder / "secrets"))
    path = folder / "config.yaml"
    path.write_text(text.replace("sqlite:////data", f"sqlite:///{folder}/data"))
    return path


@cache
def manifest() -> Manifests:
    """Return what ``deploy/kubernetes/sidecar.yaml`` has."""
    return Manifests.read((ROOT / "deploy/kubernetes/sidecar.yaml").read_text())


def helm(
    *settings: str, values: Path | None = None, release: str = "mcp-auth-proxy"
) -> subprocess.CompletedProcess[str]:
    """Render the chart; ``settings`` are given to ``--set``."""
    program = shutil.which("helm", path=SEARCH)
    assert program is not None
    chosen = ["--values", str(values)] if values else []
    flags = [text for setting in settings for text in ("--set", setting)]
    command = [program, "template", release, str(CHART), "--namespace", "agents", *chosen, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@cache
def chart(example: str, *settings: str) -> Manifests:
    """Return the chart as one of its examples renders it."""
    done = helm(*settings, values=EXAMPLES / f"{example}.yaml")
    assert done.returncode == 0, done.stderr
    return Manifests.read(done.stdout)
