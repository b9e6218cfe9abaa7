"""What the manifest and both modes of the chart have in common: an accepted configuration, probes, few privileges."""

import re
from pathlib import Path

import pytest
import yaml

from fakes.manifests import ROOT, SECRETS, Manifests, chart, manifest, write_in
from mcp_auth_proxy import __version__
from mcp_auth_proxy.app import DRAIN_SECONDS
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.settings import Settings
from mcp_auth_proxy.net.urls import is_loopback

SIDECARS = ["manifest", pytest.param("sidecar", marks=pytest.mark.helm)]


@pytest.fixture(params=[*SIDECARS, pytest.param("shared", marks=pytest.mark.helm)])
def applied(request: pytest.FixtureRequest) -> Manifests:
    return manifest() if request.param == "manifest" else chart(request.param)


@pytest.fixture(params=SIDECARS)
def sidecar(request: pytest.FixtureRequest) -> Manifests:
    return manifest() if request.param == "manifest" else chart(request.param)


def accepted(config: Path) -> Settings:
    """The settings as ``serve`` reads them: no environment, no flag."""
    return load(config, environ={}, allow_anonymous=False)


def test_the_configuration_is_accepted_with_what_the_secret_holds(applied: Manifests, tmp_path: Path) -> None:
    settings = accepted(applied.config_in(tmp_path))
    assert settings.store.path == tmp_path / "data/mcp-auth-proxy.db"
    assert settings.store.keys_named
    assert [Path(key.name) for key in settings.store.keys] == [tmp_path / "secrets/store-key"]
    assert settings.authorization.open_browser == "never"


def test_the_configuration_of_compose_is_accepted(tmp_path: Path) -> None:
    settings = accepted(write_in(tmp_path, (ROOT / "deploy/compose/config.yaml").read_text()))
    assert settings.store.keys_named
    assert not is_loopback(settings.listen.host)
    assert settings.inbound.allow_anonymous


def test_the_container_of_compose_has_few_rights_and_starts_again() -> None:
    (service,) = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    assert service["restart"] == "unless-stopped"
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ports"] == ["127.0.0.1:8787:8787"]
    assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN_SECONDS


def test_no_secret_is_applied(applied: Manifests) -> None:
    """`apply` and `helm upgrade` would write its placeholders over the real one."""
    assert "Secret" not in applied.objects
    assert "env" not in applied.proxy


def test_secrets_are_files_of_the_proxy_alone(applied: Manifests) -> None:
    (volume,) = (volume for volume in applied.pod["volumes"] if "secret" in volume)
    assert volume["secret"] == {"secretName": "mcp-auth-proxy", "defaultMode": 0o400}
    (mount,) = (mount for mount in applied.proxy["volumeMounts"] if mount["name"] == volume["name"])
    assert (mount["mountPath"], mount["readOnly"]) == (SECRETS, True)
    others = [container for container in applied.pod["containers"] if container["name"] != "mcp-auth-proxy"]
    assert all("volumeMounts" not in container for container in others)


def test_only_data_can_be_written(applied: Manifests) -> None:
    writable = [mount["mountPath"] for mount in applied.proxy["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["/data"]
    volumes = {volume["name"] for volume in applied.pod["volumes"]}
    assert {mount["name"] for mount in applied.proxy["volumeMounts"]} == volumes


def test_the_proxy_is_locked_down_and_the_pod_is_not_touched(applied: Manifests) -> None:
    assert applied.pod["securityContext"] == {"fsGroup": 10001}
    assert applied.pod["automountServiceAccountToken"] is False
    assert applied.proxy["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 0,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert [c for c in applied.pod["containers"] if c["name"] != "mcp-auth-proxy" and "securityContext" in c] == []


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("deploy/kubernetes/sidecar.yaml", ["store-key", "warehouse-client-secret"]),
        ("deploy/helm/mcp-auth-proxy/values.yaml", ["store-key"]),
    ],
)
def test_the_command_that_makes_the_secret_names_its_files(file: str, names: list[str]) -> None:
    text = (ROOT / file).read_text()
    command = re.search(r"# +kubectl create secret generic (\S+)((?:.*\\\n)*.*)", text)
    assert command
    assert command[1] == "mcp-auth-proxy"
    assert re.findall(r"--from-literal=([\w-]+)=", command[2]) == names


def test_names_that_refer_to_each_other_fit(applied: Manifests) -> None:
    deployment = applied.objects["Deployment"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= applied.template["metadata"]["labels"].items()
    volumes = {volume["name"]: volume for volume in applied.pod["volumes"]}
    assert volumes["config"]["configMap"] == {"name": applied.objects["ConfigMap"]["metadata"]["name"]}
    # The image names the file, and the ConfigMap has its name.
    named = re.search(r"\bMCP_AUTH_PROXY_CONFIG=(\S+)", (ROOT / "Dockerfile").read_text())
    assert named
    (mount,) = (mount for mount in applied.proxy["volumeMounts"] if mount["name"] == "config")
    assert [f"{mount['mountPath']}/{key}" for key in applied.objects["ConfigMap"]["data"]] == [named[1]]
    ports = [(port["name"], port["containerPort"]) for port in applied.proxy["ports"]]
    assert ports in ([("health", 8788)], [("http", 8787), ("health", 8788)])
    kinds = applied.objects.keys() - {"ConfigMap", "Deployment", "NetworkPolicy"}
    assert kinds <= {"PersistentVolumeClaim", "PodDisruptionBudget", "Service", "ServiceMonitor"}


def test_the_data_that_a_pod_loses_is_bounded(sidecar: Manifests) -> None:
    (data,) = (volume for volume in sidecar.pod["volumes"] if volume["name"] == "data")
    assert data == {"name": "data", "emptyDir": {"sizeLimit": "64Mi"}}


def test_a_changed_configuration_is_noticed(applied: Manifests) -> None:
    assert applied.template["metadata"]["annotations"]["checksum/config"]


def test_memory_and_ephemeral_storage_are_bounded(applied: Manifests) -> None:
    for container in [*applied.pod.get("initContainers", []), *applied.pod["containers"]]:
        assert container["resources"]["limits"].keys() >= {"memory", "ephemeral-storage"}
        assert container["resources"]["requests"].keys() >= {"cpu", "memory", "ephemeral-storage"}


def test_probes_ask_the_health_listener_by_the_name_of_its_port(applied: Manifests, tmp_path: Path) -> None:
    ports = {port["name"]: port["containerPort"] for port in applied.proxy["ports"]}
    health_listen = accepted(applied.config_in(tmp_path)).health_listen
    assert health_listen is not None
    assert (health_listen.host, health_listen.port) == ("0.0.0.0", ports["health"])
    asked = {name: applied.proxy[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert asked == {
        "startup": {"path": "/readyz", "port": "health"},
        "readiness": {"path": "/readyz", "port": "health"},
        "liveness": {"path": "/healthz", "port": "health"},
    }
    # It is asked often at first and has a minute; later one slow answer does not end it.
    times = {name: applied.proxy[f"{name}Probe"] for name in asked}
    assert times["startup"]["periodSeconds"] == 1
    assert times["startup"]["failureThreshold"] >= 60
    assert times["liveness"]["failureThreshold"] >= 3
    assert {probe["timeoutSeconds"] for probe in times.values()} == {5}


def test_there_is_one_proxy_at_a_time_and_it_has_time_to_drain(applied: Manifests) -> None:
    spec = applied.objects["Deployment"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert applied.pod["terminationGracePeriodSeconds"] > DRAIN_SECONDS


def test_the_image_is_of_this_version(applied: Manifests) -> None:
    assert applied.proxy["image"] == f"mcp-auth-proxy:{__version__}"


def test_a_network_policy_says_what_comes_in_and_what_goes_out(applied: Manifests) -> None:
    spec = applied.objects["NetworkPolicy"]["spec"]
    labels = applied.template["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"].items() <= labels.items()
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    named = {port["name"] for port in applied.proxy["ports"]}
    assert {port["port"] for rule in spec["ingress"] for port in rule["ports"]} == named
    # Whoever reaches the listener uses the grants, so its rule names the callers.
    assert all(rule.get("from") for rule in spec["ingress"] if {"port": "http"} in rule["ports"])
    out = [(port["port"], port["protocol"]) for rule in spec["egress"] for port in rule["ports"]]
    assert out == [(53, "UDP"), (53, "TCP"), (443, "TCP")]


def test_only_the_pod_itself_reaches_a_sidecar(sidecar: Manifests, tmp_path: Path) -> None:
    settings = accepted(sidecar.config_in(tmp_path))
    assert is_loopback(settings.listen.host)
    assert not settings.inbound.allow_anonymous
    assert [port["name"] for port in sidecar.proxy["ports"]] == ["health"]


def test_a_sidecar_is_up_before_its_agent_which_calls_a_configured_server(sidecar: Manifests) -> None:
    assert sidecar.proxy in sidecar.pod["initContainers"]
    assert sidecar.proxy["restartPolicy"] == "Always"
    (agent,) = sidecar.pod["containers"]
    (variable,) = agent["env"]
    config = sidecar.config
    assert variable["value"] in {f"http://{config['listen']}/{name}/mcp" for name in config["servers"]}
