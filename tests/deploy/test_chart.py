"""The Helm chart: what it renders, and the values that it refuses."""

from pathlib import Path

import pytest
import yaml

from fakes.manifests import CHART, EXAMPLES, SECRETS, Manifests, chart, helm
from mcp_auth_proxy import __version__
from mcp_auth_proxy.app import DRAIN_SECONDS

pytestmark = pytest.mark.helm


def test_the_versions_are_those_of_the_package() -> None:
    found = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (found["appVersion"], found["version"]) == (__version__, __version__)


@pytest.mark.parametrize(
    ("example", "setting", "message"),
    [
        ("shared", "mode=other", 'mode is "other"; it must be shared or sidecar'),
        ("shared", "replicas=2", "replicas is 2; it must be 1, because the SQLite store works on one host"),
        ("shared", "replicas=2", "or set store.url to a postgresql:// database"),
        ("sidecar", "replicas=2", "replicas is 2"),
        ("replicas", "store.url=", "replicas is 3; it must be 1, because the SQLite store works on one host"),
        ("replicas", "store.url=sqlite:////data/x.db", "store.url must be postgresql://USER@HOST/DATABASE, or file:"),
        ("replicas", "store.url=file:/data/url", "store.url must be postgresql://USER@HOST/DATABASE, or file:/run/"),
        ("replicas", "store.url=postgresql://me:pw@db/proxy", "store.url has a password"),
        ("replicas", "store.url=postgresql://db/proxy?user=me&password=pw", "store.url has a password"),
        ("replicas", "persistence.enabled=true", "persistence.enabled is true; with store.url everything is in the"),
        ("sidecar", "store.importSecret=logins", "store.importSecret needs a store that outlasts the pod"),
        ("replicas", "replicas=0", "replicas is 0"),
        ("replicas", "replicas=some", "replicas: Invalid type"),
        ("shared", "replicas=0", "replicas is 0"),
        ("shared", "secretName=", "secretName is empty; create a Secret with the key store-key"),
        ("shared", "config.servers=null", "config.servers is empty"),
        ("shared", "allowAnonymous=false", "allowAnonymous is false; whoever reaches the Service uses its grants"),
        ("sidecar", "agent.image=", "agent.image is empty"),
        ("shared", "config.listen=127.0.0.1:1", "config.listen is set by the chart; remove it"),
        ("shared", "config.health_listen=127.0.0.1:1", "config.health_listen is set by the chart"),
        ("shared", "config.health_quit=true", "config.health_quit is set by the chart"),
        ("shared", "config.store.url=x", "config.store is set by the chart"),
        ("shared", "config.public_url=http://x", "config.public_url is set by the chart"),
        ("sidecar", "config.servers.warehouse.oauth.client_secret=s", "must be file:/run/secrets/mcp-auth-proxy/KEY"),
        ("sidecar", "config.servers.warehouse.oauth.private_key=env:KEY", "oauth.private_key must be file:"),
        ("sidecar", "config.servers.warehouse.oauth.idp.client_secret=s", "oauth.idp.client_secret must be file:"),
        ("shared", "config.servers.linear=x", "config.servers.linear"),
        ("shared", "config=null", "config is required"),
        ("shared", "replicaCount=1", "replicaCount is not allowed"),
        ("shared", "networkPolicy.form[0].podSelector=x", "form is not allowed"),
        ("shared", "networkPolicy.egressPorts={all}", "networkPolicy.egressPorts.0"),
        # Helm changes numbers: 1234567890.1234567890, as Slack's ids look, would be 1.2345678901234567e+09.
        ("shared", "config.servers.linear.oauth.client_id=1234567890", "oauth.client_id: Invalid type"),
        ("shared", "config.servers.linear.oauth.idp.client_id=7", "oauth.idp.client_id: Invalid type"),
        ("shared", "config.servers.linear.oauth.dpop=false", "oauth.dpop: Invalid type"),
        ("shared", "config.servers.linear.oauth.token_params.tenant=7", "oauth.token_params.tenant: Invalid type"),
        # Not true, although a template takes it for that.
        ("shared", "allowAnonymous=no", "allowAnonymous"),
        ("shared", "service.port=http", "service.port"),
        ("sidecar", "agent.name=7", "agent.name"),
        ("shared", "podAnnotations.number=7", "podAnnotations.number"),
    ],
)
def test_values_that_can_not_work_are_refused_with_the_remedy(example: str, setting: str, message: str) -> None:
    done = helm(setting, values=EXAMPLES / f"{example}.yaml")
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr


def test_the_values_alone_are_not_enough() -> None:
    done = helm()
    assert done.returncode == 1
    assert "secretName is empty" in done.stderr


@pytest.mark.parametrize("example", ["shared", "sidecar"])
def test_a_changed_configuration_starts_new_pods_and_nothing_else_does(example: str) -> None:
    def checksum(manifests: Manifests) -> str:
        return str(manifests.template["metadata"]["annotations"]["checksum/config"])

    before = checksum(chart(example))
    assert checksum(chart(example, "config.authorization.wait=7s")) != before
    assert checksum(chart(example, "service.type=NodePort")) == before


def test_a_shared_proxy_is_a_service_with_the_names_that_clients_send() -> None:
    shared = chart("shared")
    spec = shared.objects["Service"]["spec"]
    assert spec["selector"].items() <= shared.template["metadata"]["labels"].items()
    targets = {port["targetPort"] for port in spec["ports"]}
    assert targets == {port["name"] for port in shared.proxy["ports"]} == {"http", "health"}
    name = shared.objects["Service"]["metadata"]["name"]
    assert shared.config["inbound"]["allowed_hosts"] == [
        name,
        f"{name}.agents",
        f"{name}.agents.svc",
        f"{name}.agents.svc.cluster.local",
    ]
    assert shared.config["inbound"]["allow_anonymous"] is True


def test_allowed_hosts_of_the_values_are_kept() -> None:
    config = chart("shared", "config.inbound.allowed_hosts={mcp.example.com}").config
    assert "mcp.example.com" in config["inbound"]["allowed_hosts"]
    assert "mcp-auth-proxy" in config["inbound"]["allowed_hosts"]


def test_labels_and_annotations_of_the_values_take_nothing_from_the_chart() -> None:
    own = r"app\.kubernetes\.io/name"
    found = chart("shared", f"podLabels.{own}=x", "podLabels.team=a", "podAnnotations.checksum/config=x")
    selector = found.objects["Deployment"]["spec"]["selector"]["matchLabels"]
    assert {**selector, "team": "a"}.items() <= found.template["metadata"]["labels"].items()
    assert found.template["metadata"] == chart("shared", "podLabels.team=a").template["metadata"]


def test_the_network_policy_opens_only_what_is_named() -> None:
    closed = chart("shared", "networkPolicy.egressPorts=null", "agent.ports[0].containerPort=99")
    spec = closed.objects["NetworkPolicy"]["spec"]
    # A rule without ports would allow all of them.
    assert [[port["port"] for port in rule["ports"]] for rule in spec["egress"]] == [[53, 53]]
    assert [[port["port"] for port in rule["ports"]] for rule in spec["ingress"]] == [["http"], ["health"]]
    agent = chart("sidecar", "agent.ports[0].containerPort=99").objects["NetworkPolicy"]["spec"]
    assert [[port["port"] for port in rule["ports"]] for rule in agent["ingress"]] == [["health"], [99]]


def test_a_release_may_have_a_dot_in_its_name() -> None:
    done = helm(values=EXAMPLES / "shared.yaml", release="team.one")
    assert Manifests.read(done.stdout).objects["Service"]["metadata"]["name"] == "team-one-mcp-auth-proxy"


def test_replicas_share_a_database_whose_url_is_in_the_secret_and_need_no_volume() -> None:
    found = chart("replicas")
    spec = found.objects["Deployment"]["spec"]
    assert spec["replicas"] == 3
    assert found.config["store"] == {
        "url": f"file:{SECRETS}/database-url",
        "keys": [f"file:{SECRETS}/store-key"],
    }
    assert "PersistentVolumeClaim" not in found.objects
    (data,) = (volume for volume in found.pod["volumes"] if volume["name"] == "data")
    assert "emptyDir" in data
    egress = found.objects["NetworkPolicy"]["spec"]["egress"]
    assert [[port["port"] for port in rule["ports"]] for rule in egress] == [[53, 53], [5432], [443]]
    other = chart("replicas", "store.url=postgresql://me@db:6432/proxy", "store.port=6432")
    assert other.config["store"]["url"] == "postgresql://me@db:6432/proxy"
    assert {"port": 6432, "protocol": "TCP"} in other.objects["NetworkPolicy"]["spec"]["egress"][1]["ports"]


@pytest.mark.parametrize("example", ["shared", "replicas"])
def test_logins_from_elsewhere_are_taken_in_from_their_secret(example: str) -> None:
    found = chart(example, "store.importSecret=mcp-auth-proxy-logins")
    place = f"{SECRETS}-logins"
    assert found.config["store"]["import"] == [f"file:{place}/logins"]
    assert found.config["store"]["import_passphrase"] == f"file:{SECRETS}/import-passphrase"
    assert {"name": "logins", "mountPath": place, "readOnly": True} in found.proxy["volumeMounts"]
    assert {
        "name": "logins",
        "secret": {"secretName": "mcp-auth-proxy-logins", "defaultMode": 0o400},
    } in found.pod["volumes"]
    assert "logins" not in str(chart(example).pod)


def test_replicas_are_replaced_one_after_the_other_and_spread() -> None:
    found = chart("replicas")
    spec = found.objects["Deployment"]["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    # A request that still comes while its pod ends is served, and the time for those under way is as long as before.
    command = found.proxy["lifecycle"]["preStop"]["exec"]["command"]
    assert "time.sleep(5)" in command[-1]
    assert found.pod["terminationGracePeriodSeconds"] >= 5 + DRAIN_SECONDS
    labels = found.template["metadata"]["labels"]
    spread = found.pod["topologySpreadConstraints"]
    assert {each["topologyKey"] for each in spread} == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
    for each in spread:
        assert each["whenUnsatisfiable"] == "ScheduleAnyway"
        assert each["labelSelector"]["matchLabels"].items() <= labels.items()
    own = chart("replicas", "topologySpreadConstraints[0].topologyKey=rack")
    assert own.pod["topologySpreadConstraints"] == [{"topologyKey": "rack"}]


def test_one_replica_on_sqlite_ends_before_the_next_one_starts() -> None:
    for example in ("shared", "sidecar"):
        found = chart(example)
        assert found.objects["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}
        assert "topologySpreadConstraints" not in found.pod
        assert "lifecycle" not in found.proxy


def test_agents_may_share_a_database_too() -> None:
    found = chart("sidecar", "replicas=2", "store.url=postgresql://me@db/agents")
    assert found.objects["Deployment"]["spec"]["replicas"] == 2
    assert found.config["store"]["url"] == "postgresql://me@db/agents"
    assert "lifecycle" not in found.proxy


def test_a_node_can_be_drained() -> None:
    for example in ("shared", "sidecar", "replicas"):
        found = chart(example)
        spec = found.objects["PodDisruptionBudget"]["spec"]
        assert spec["maxUnavailable"] == 1
        assert "minAvailable" not in spec
        assert spec["selector"]["matchLabels"].items() <= found.template["metadata"]["labels"].items()


@pytest.mark.parametrize("example", ["shared", "sidecar"])
def test_prometheus_finds_the_metrics_through_a_service(example: str) -> None:
    found = chart(example, "serviceMonitor.enabled=true")
    spec = found.objects["ServiceMonitor"]["spec"]
    service = found.objects["Service"]
    assert spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = spec["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("health", "/metrics")
    assert "health" in {port["name"] for port in service["spec"]["ports"]}


def test_a_sidecar_has_no_service_that_would_lead_to_it() -> None:
    assert chart("sidecar").objects.keys() & {"Service", "ServiceMonitor", "PersistentVolumeClaim"} == set()
    ports = chart("sidecar", "serviceMonitor.enabled=true").objects["Service"]["spec"]["ports"]
    assert [port["name"] for port in ports] == ["health"]


def test_logins_of_a_shared_proxy_outlive_its_pod_and_its_release() -> None:
    shared = chart("shared")
    claim = shared.objects["PersistentVolumeClaim"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    (data,) = (volume for volume in shared.pod["volumes"] if volume["name"] == "data")
    assert data["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    (data,) = (volume for volume in chart("sidecar").pod["volumes"] if volume["name"] == "data")
    assert "emptyDir" in data


def test_a_claim_that_exists_is_used(tmp_path: Path) -> None:
    found = chart("sidecar", "persistence.enabled=true", "persistence.existingClaim=mine")
    (data,) = (volume for volume in found.pod["volumes"] if volume["name"] == "data")
    assert data["persistentVolumeClaim"] == {"claimName": "mine"}
    assert "PersistentVolumeClaim" not in found.objects


def test_the_values_of_a_pod_get_to_it() -> None:
    found = chart(
        "sidecar",
        "podLabels.team=a",
        "podAnnotations.note=b",
        "nodeSelector.disk=ssd",
        "tolerations[0].key=spot",
        "affinity.nodeAffinity.x=y",
        "imagePullSecrets[0].name=pull",
        "image.repository=registry.example/proxy",
        "image.tag=9",
        "image.pullPolicy=Always",
        "resources.limits.memory=1Gi",
        "agent.name=mine",
        "agent.args={one,two}",
        "agent.ports[0].containerPort=7000",
        "agent.resources.limits.memory=2Gi",
        "agent.securityContext.runAsUser=7",
    )
    assert found.template["metadata"]["labels"]["team"] == "a"
    assert found.template["metadata"]["annotations"]["note"] == "b"
    assert found.pod["nodeSelector"] == {"disk": "ssd"}
    assert found.pod["tolerations"] == [{"key": "spot"}]
    assert found.pod["affinity"] == {"nodeAffinity": {"x": "y"}}
    assert found.pod["imagePullSecrets"] == [{"name": "pull"}]
    assert (found.proxy["image"], found.proxy["imagePullPolicy"]) == ("registry.example/proxy:9", "Always")
    assert found.proxy["resources"]["limits"]["memory"] == "1Gi"
    (agent,) = found.pod["containers"]
    assert (agent["name"], agent["image"]) == ("mine", "registry.example.com/agent:1.0.0")
    assert (agent["args"], agent["ports"]) == (["one", "two"], [{"containerPort": 7000}])
    assert [variable["name"] for variable in agent["env"]] == ["MCP_SERVER_URL"]
    assert agent["resources"]["limits"]["memory"] == "2Gi"
    assert agent["securityContext"] == {"runAsUser": 7}
    # Who uses the agent still reaches it.
    assert {"ports": [{"port": 7000, "protocol": "TCP"}]} in found.objects["NetworkPolicy"]["spec"]["ingress"]


def test_the_values_of_a_service_get_to_it() -> None:
    found = chart(
        "shared",
        "publicUrl=https://mcp.example.com",
        "service.type=NodePort",
        "service.port=80",
        "persistence.size=3Gi",
        "persistence.storageClassName=fast",
        "serviceMonitor.interval=7s",
        "networkPolicy.egressPorts={443,8443}",
        "networkPolicy.monitoringFrom[0].ipBlock.cidr=10.0.0.0/8",
    )
    assert found.config["public_url"] == "https://mcp.example.com"
    service = found.objects["Service"]["spec"]
    assert (service["type"], service["ports"][0]) == ("NodePort", {"name": "http", "port": 80, "targetPort": "http"})
    claim = found.objects["PersistentVolumeClaim"]["spec"]
    assert (claim["accessModes"], claim["storageClassName"]) == (["ReadWriteOnce"], "fast")
    assert claim["resources"] == {"requests": {"storage": "3Gi"}}
    assert found.objects["ServiceMonitor"]["spec"]["endpoints"][0]["interval"] == "7s"
    policy = found.objects["NetworkPolicy"]["spec"]
    assert {"ports": [{"port": "health"}], "from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]} in policy["ingress"]
    assert [port["port"] for port in policy["egress"][-1]["ports"]] == [443, 8443]


def test_without_a_word_on_callers_only_pods_of_the_namespace_are_let_in() -> None:
    rules = chart("shared", "networkPolicy.from=null").objects["NetworkPolicy"]["spec"]["ingress"]
    assert {"ports": [{"port": "http"}], "from": [{"podSelector": {}}]} in rules


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("networkPolicy.enabled=false", "NetworkPolicy"),
        ("podDisruptionBudget.enabled=false", "PodDisruptionBudget"),
        ("serviceMonitor.enabled=false", "ServiceMonitor"),
        ("persistence.enabled=false", "PersistentVolumeClaim"),
    ],
)
def test_what_is_turned_off_is_not_made(setting: str, kind: str) -> None:
    assert kind in chart("shared").objects
    assert kind not in chart("shared", setting).objects
